"""The columns of y as tasks: their kinds, their labels, and predictions in the values of y."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_array
from torch import Tensor

from dmtg_core.sklearn.frames import is_frame
from dmtg_core.tables.cells import cell_text
from dmtg_core.tasks import Task

KINDS = ("binary", "multiclass", "regression")
MOST_CLASSES = 20  # different whole numbers that are classes


@dataclass(frozen=True)
class Target:
    """A column of y.

    Args:
        label: Its name in y.
        task: The task. Labels of a regression are in units of zero mean and unit deviation.
        classes: The classes in their order, of a task that is no regression.
        mean, deviation: Mean and standard deviation of the labels of a regression.
    """

    label: Hashable
    task: Task
    classes: np.ndarray | None = None
    mean: float = 0.0
    deviation: float = 1.0

    def encode(self, values: np.ndarray, known: np.ndarray) -> np.ndarray:
        """The stored labels `(n,)`, 0 where a label is missing."""
        if self.classes is None:
            numbers = values[known].astype(np.float64)
            stored = np.zeros(len(values), np.float32)
            stored[known] = (numbers - self.mean) / self.deviation
            return stored
        code = {value: place for place, value in enumerate(self.classes.tolist())}
        found = zip(values.tolist(), known.tolist(), strict=True)
        return np.array([code[value] if there else 0 for value, there in found], np.int32)

    def probabilities(self, output: Tensor) -> np.ndarray:
        """Float64 `(n, C)`, the probabilities of the classes, from the output of a network `(n,)` or `(n, C)`."""
        assert self.classes is not None
        if self.task.kind == "binary":
            found = output.double().sigmoid()
            found = torch.stack([1 - found, found], 1)[:, : len(self.classes)]
        else:
            found = output.double().softmax(1)
        return np.asarray(found / found.sum(1, keepdim=True))

    def predictions(self, output: Tensor) -> np.ndarray:
        """Values as in y `(n,)`, from the output of a network."""
        if self.classes is None:
            return np.asarray(output.double()) * self.deviation + self.mean
        return self.classes[self.probabilities(output).argmax(1)]


@dataclass(frozen=True)
class Labels:
    """The columns of y, before their kinds are known.

    Args:
        names: Their names in y.
        values: A column each, `(n,)`.
        known: For each column, bool `(n,)`: False for a missing label.
        vector: Whether y has one axis.
    """

    names: list[Hashable]
    values: list[np.ndarray]
    known: list[np.ndarray]
    vector: bool


def read_labels(y: Any) -> Labels:
    """The columns of y.

    Args:
        y: `(n,)` or `(n, N)`: a DataFrame, a Series or an array.

    Raises:
        ValueError: For another number of axes, and for infinite values.
    """
    if is_frame(y):
        columns = [_of_series(y.iloc[:, place]) for place in range(y.shape[1])]
        names, vector = list(y.columns), False
    elif hasattr(y, "iloc"):
        columns, names, vector = [_of_series(y)], ["target" if y.name is None else y.name], True
    else:
        array = check_array(
            y, dtype=None, ensure_2d=False, ensure_all_finite=False, allow_nd=True, ensure_min_samples=0,
            input_name="y",
        )  # fmt: skip
        if array.ndim not in (1, 2):
            raise ValueError(f"expected y of shape (n,) or (n, N), got {array.shape}")
        vector = array.ndim == 1
        columns = [_of_array(column) for column in (array[:, None] if vector else array).T]
        names = ["target"] if vector else [f"target_{place}" for place in range(array.shape[1])]
    if not columns:
        raise ValueError("expected at least one column in y, got none")
    return Labels(names, [values for values, _ in columns], [known for _, known in columns], vector)


def _of_series(series: Any) -> tuple[np.ndarray, np.ndarray]:
    known = ~np.asarray(series.isna(), bool)
    if isinstance(series.dtype, np.dtype):
        return _plain(series.to_numpy(), known), known
    values = np.empty(len(series), object)
    values[:] = series.tolist()
    return (values if str(series.dtype) == "category" else _plain(values, known)), known


def _of_array(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if values.dtype.kind == "f":
        return values, ~np.isnan(values)
    if values.dtype.kind != "O":
        return values, np.ones(len(values), bool)
    known = np.array([cell_text(one) != "" or isinstance(one, str) for one in values.tolist()], bool)
    return _plain(values, known), known


def _plain(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Objects that are all numbers as an array of numbers; other values unchanged."""
    if values.dtype.kind != "O" or not known.any():
        return values
    found = np.array(values[known].tolist())
    if found.dtype.kind not in "iuf" or any(isinstance(one, str | bool) for one in values[known]):
        return values
    numbers = np.zeros(len(values), found.dtype)
    numbers[known] = found
    return numbers


def targets_of(labels: Labels, kinds: str | Mapping[Any, str] | None) -> list[Target]:
    """The targets of the columns of y.

    Args:
        labels: The columns.
        kinds: One of `KINDS` for all columns, or name → kind for some of them. Of the others, numbers are a
            regression if they have fractions or more than `MOST_CLASSES` values, or if more than two values have
            less than two labels each on average. All other values are classes.

    Raises:
        ValueError: For a column with fewer than two labels, and for an unknown kind or name.
    """
    given: Mapping[Any, str] = dict.fromkeys(labels.names, kinds) if isinstance(kinds, str) else (kinds or {})
    unknown = [str(name) for name in given if name not in labels.names]
    if unknown:
        raise ValueError(f"kinds names {', '.join(unknown)}, expected some of {', '.join(map(str, labels.names))}")
    columns = zip(labels.names, labels.values, labels.known, strict=True)
    return [_target(name, values[known], given.get(name)) for name, values, known in columns]


def _target(label: Hashable, values: np.ndarray, kind: str | None) -> Target:
    name = str(label)
    if len(values) < 2:
        raise ValueError(f"target {name!r} has {len(values)} labels: at least 2 are needed")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"target {name!r} contains infinity")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of target {name!r}, expected one of {', '.join(KINDS)}")
    if (kind or _kind(values)) == "regression":
        if values.dtype.kind not in "biuf":
            raise ValueError(f"target {name!r} is a regression, its labels are {values.dtype}")
        numbers = values.astype(np.float64)
        deviation = float(numbers.std())
        return Target(label, Task(name, "regression"), None, float(numbers.mean()), deviation or 1.0)
    classes = _classes(values)
    if kind == "binary" and len(classes) > 2:
        raise ValueError(f"target {name!r} is binary, its labels have {len(classes)} values")
    if len(classes) > 2 or kind == "multiclass":
        return Target(label, Task(name, "multiclass", max(len(classes), 2)), classes)
    return Target(label, Task(name, "binary"), classes)


def _kind(values: np.ndarray) -> str:
    if values.dtype.kind not in "iuf":
        return "classes"
    count = len(np.unique(values))
    few = count <= 2 or count <= min(MOST_CLASSES, len(values) // 2)
    # the type is asked for few values only, because scikit-learn warns of many classes
    return "classes" if few and type_of_target(values) in ("binary", "multiclass") else "regression"


def _classes(values: np.ndarray) -> np.ndarray:
    try:
        return np.unique(values)
    except TypeError:  # values of several types
        different = sorted(set(values.tolist()), key=lambda value: (type(value).__name__, value))
        found = np.empty(len(different), object)
        found[:] = different
        return found
