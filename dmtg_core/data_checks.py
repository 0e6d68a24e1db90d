"""Checks of options, and of samples in memory: lengths, types, shapes, ranges and finiteness."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from dmtg_core.input_spec import InputSpec
from dmtg_core.tasks import Task

BLOCK = 2**20  # values of which the slow check looks at the same time


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise ValueError for an option that is none of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(allowed)}")


def check_counts(numbers: Mapping[str, int]) -> None:
    """Raise ValueError for a number, given by its name, that is no whole number of at least 1."""
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value}")


def check_finite(numbers: Mapping[str, float]) -> None:
    """Raise ValueError for a number, given by its name, that is NaN or infinite."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def check_lengths(inputs: np.ndarray, labels: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]) -> None:
    """Check that all values are NumPy arrays with as many samples as the inputs.

    Raises:
        TypeError: For something that is no NumPy array.
        ValueError: For an array of another length. The message names it.
    """
    named = {f"labels of task {name!r}": values for name, values in labels.items()}
    named |= {f"entries of present of task {name!r}": values for name, values in present.items()}
    for what, values in {"inputs": inputs, **named}.items():
        if not isinstance(values, np.ndarray):
            raise TypeError(f"expected {what} as a NumPy array, got {type(values).__name__}")
        if values.ndim == 0 or len(values) != len(inputs):
            got = len(values) if values.ndim else "one value without an axis"
            raise ValueError(f"expected {len(inputs)} {what}, as many as inputs, got {got}")


def _check_type(what: str, values: np.ndarray, kinds: str) -> None:
    if values.dtype.kind not in kinds:
        wanted = "booleans" if kinds == "b" else "numbers"
        raise ValueError(f"expected {what} as an array of {wanted}, got {values.dtype}")


def check_samples(
    what: str,
    inputs: np.ndarray,
    labels: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray],
    tasks: Sequence[Task],
) -> None:
    """Check that inputs are finite and labels are what their tasks say, except those that are not present.

    Args:
        what: Name of the samples in a message.

    Raises:
        ValueError: For the first problem.
    """
    _check_type(f"inputs of {what}", inputs, "biuf")
    if inputs.dtype.kind == "f" and not _all_finite(inputs):
        row = int(np.flatnonzero(~np.isfinite(inputs.reshape(len(inputs), -1)).all(1))[0])
        raise ValueError(f"{what}: the inputs of sample {row} are not finite: replace or remove NaN and infinity")
    for task in tasks:
        if task.name not in labels:
            raise ValueError(f"{what}: no labels of task {task.name!r}, there are those of {', '.join(labels)}")
        _check_type(f"labels of task {task.name!r}", labels[task.name], "biuf")
        _check_shape(what, task, labels[task.name])
        known = present.get(task.name)
        if known is not None:
            _check_type(f"present of task {task.name!r}", known, "b")
        shapes = (inputs.shape[:1], labels[task.name].shape[: 3 if task.dense else 1])
        if known is not None and known.shape not in shapes:
            raise ValueError(f"{what}: present of task {task.name!r} has the shape {known.shape}")
        _check_values(what, task, labels[task.name], known)


def _check_shape(what: str, task: Task, labels: np.ndarray) -> None:
    axes = ["n", "H", "W"] if task.dense else ["n"]
    several = not task.classes and task.channels > 1
    if labels.ndim != len(axes) + several or (several and labels.shape[-1] != task.channels):
        wanted = ", ".join([*axes, *([str(task.channels)] if several else [])])
        raise ValueError(
            f"{what}: expected labels ({wanted}) of the {task.kind} task {task.name!r}, got {labels.shape}"
        )


def _check_values(what: str, task: Task, labels: np.ndarray, known: np.ndarray | None) -> None:
    """Check the values of labels; the fast check of the whole array is enough for almost all data sets."""
    if not labels.size:
        return
    if not (task.classes or task.kind == "binary"):
        if labels.dtype.kind != "f" or _all_finite(labels):
            return
        wrong = np.isinf(labels)
    else:
        if labels.dtype.kind == "b" or (labels.dtype.kind != "f" and _within(labels, task.channels)):
            return
        most = task.channels - 1 if task.classes else 1
        wrong = ~np.isin(labels, np.arange(most + 1))
        wrong &= labels != task.ignore_index if task.classes else ~np.isnan(labels.astype(np.float64))
    if known is not None:
        wrong &= known.reshape(known.shape + (1,) * (wrong.ndim - known.ndim))
    if wrong.any():
        raise ValueError(f"{what}: {_expected(task)}, got {labels[wrong][0]}")


def _expected(task: Task) -> str:
    if task.classes:
        missing = f"or {task.ignore_index} for a missing label"
        return f"class ids of task {task.name!r} are 0 to {task.channels - 1}, {missing}"
    if task.kind == "binary":
        return f"labels of the binary task {task.name!r} are 0 and 1"
    return f"labels of the regression task {task.name!r} are finite, or NaN for a missing label"


def _within(labels: np.ndarray, channels: int) -> bool:
    return bool(labels.min() >= 0 and labels.max() < max(channels, 2))


def _all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite. A sum finds them without a temporary array, if it does not overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum(dtype=np.float64)):
            return True
    flat = values.reshape(-1)
    return all(np.isfinite(flat[start : start + BLOCK]).all() for start in range(0, flat.size, BLOCK))


def check_input(what: str, inputs: np.ndarray, spec: InputSpec) -> None:
    """Check that inputs have the shape of a network's input, and token ids are in its vocabulary.

    Raises:
        ValueError: For another shape or id.
    """
    if inputs.shape[1:] != spec.shape:
        wanted = ", ".join(map(str, spec.shape))
        raise ValueError(f"{what}: expected inputs of shape (n, {wanted}), got {inputs.shape}")
    if spec.kind == "tokens" and inputs.size and not 0 <= inputs.min() <= inputs.max() < spec.vocabulary:
        raise ValueError(f"{what}: token ids are 0 to {spec.vocabulary - 1}, got {inputs.min()} to {inputs.max()}")
