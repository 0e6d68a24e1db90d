"""Tasks (`Task`), with the conversion of stored values to network units and back.

Stored ("raw") values are the contents of the label files: 16-bit depth, class ids, 0/1 flags. The network uses
its own units. Only `Task.encode` and `Task.decode` convert between the two.

A missing label is NaN in a floating-point target and `Task.ignore_index` in an integer target, everywhere in the
core. Losses and metrics omit such entries from sums and counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmtg_core.addresses import checked_name
from dmtg_core.loss_options import LossOptions, checked_options
from dmtg_core.names import listed

CLASS_KINDS = ("multiclass", "dense_classification")
DENSE_KINDS = ("dense_classification", "dense_regression")

MOST_SHARES = 1000  # classes of a task whose probabilities are listed by name

# Metrics of a direction with three components, for example a surface normal.
ANGLES = ("within_11", "within_22", "within_30", "mean_angle")

# The first entry of each tuple is the default.
LOSSES: Mapping[str, tuple[str, ...]] = {
    "binary": ("binary_cross_entropy", "focal"),
    "multiclass": ("cross_entropy", "focal", "ordinal"),
    "regression": ("mse", "l1", "smooth_l1", "huber", "quantile"),
    "dense_classification": ("cross_entropy", "focal", "ordinal"),
    "dense_regression": ("l1", "mse", "l1_shift", "huber", "quantile"),
}
METRICS: Mapping[str, tuple[str, ...]] = {
    "binary": ("accuracy", "balanced_accuracy", "f1", "auroc", "average_precision"),
    "multiclass": ("accuracy", "balanced_accuracy"),
    "regression": ("rmse", "mae", "r2"),
    "dense_classification": ("miou", "accuracy"),
    "dense_regression": ("rmse", "mae", "r2", *ANGLES, "f1"),
}


def _one_of(what: str, value: str, allowed: Sequence[str], task: str) -> None:
    if value not in allowed:
        raise ValueError(f"task {task!r}: unknown {what} {value!r}, expected one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Task:
    """One prediction task.

    Args:
        name: Name, unique among the tasks of a network. It is shown as it is; see `names.key_of`.
        kind: A key of `LOSSES`.
        channels: Number of classes, or of values for each sample (or pixel) of a regression task; 1 if binary.
        loss: One of `LOSSES[kind]` or the address of a function (`own_code.own_loss`); empty for the default.
        metric: The headline metric, one of `METRICS[kind]` or the address of a function
            (`own_code.own_metric_sums`); empty for the default. The normalized gain is computed from it.
        ignore_index: Class id that means "not annotated" (integer targets only).
        offset, scale: Network units are `(raw - offset) / scale`. One value for all channels or one for each.
        valid_below: Raw values of at least `valid_below` are not annotated (dense regression only).
        labels: Names of the classes.
        threshold: Smallest raw value of a positive pixel for the metric "f1" (dense regression only).
        flip: Factor of each channel, in network units, for an image that is mirrored left to right: -1 for the x
            of a surface normal (dense regression only). Empty if no channel changes.
        unit: Unit of a raw value, for display.
        weight: Factor of this task's loss in the training loss.
        loss_options: A `LossOptions`, or some of its fields as a dictionary.

    Raises:
        ValueError: For an unknown kind, loss, option or metric, and for numbers that do not fit the kind.
    """

    name: str
    kind: str
    channels: int = 1
    loss: str = ""
    metric: str = ""
    ignore_index: int = -1
    offset: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    valid_below: float | None = None
    threshold: float | None = None
    flip: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()
    unit: str = ""
    weight: float = 1.0
    loss_options: LossOptions = field(default_factory=LossOptions)

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, tuple(LOSSES), self.name)
        for key, known in (("loss", LOSSES[self.kind]), ("metric", METRICS[self.kind])):
            name = checked_name(key, getattr(self, key) or known[0], known, f"task {self.name!r}: ")
            object.__setattr__(self, key, name)
        for name in ("offset", "scale", "flip", "labels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_numbers()
        options = checked_options(self.loss_options, self.name, self.kind, self.channels, self.loss)
        object.__setattr__(self, "loss_options", options)

    def _check_numbers(self) -> None:
        if self.kind in CLASS_KINDS and self.channels < 2:
            raise ValueError(
                f"task {self.name!r}: a {self.kind} task needs at least 2 classes, got {self.channels}"
            )
        if self.kind == "binary" and self.channels != 1:
            raise ValueError(f"task {self.name!r}: a binary task has 1 channel, got {self.channels}")
        if self.channels < 1:
            raise ValueError(f"task {self.name!r}: channels must be at least 1, got {self.channels}")
        for name, values in (("offset", self.offset), ("scale", self.scale)):
            if len(values) not in (1, self.channels):
                raise ValueError(
                    f"task {self.name!r}: {name} needs 1 or {self.channels} values, got {len(values)}"
                )
        if self.labels and self.kind in CLASS_KINDS and len(self.labels) != self.channels:
            raise ValueError(f"task {self.name!r}: {len(self.labels)} class names for {self.channels} classes")
        if self.metric in ANGLES and self.channels != 3:
            raise ValueError(f"task {self.name!r}: metric {self.metric} needs 3 channels, got {self.channels}")
        self._check_units()
        self._check_dense_fields()

    def _check_units(self) -> None:
        if not all(0 < s < math.inf for s in self.scale):
            raise ValueError(f"task {self.name!r}: scale must be positive, got {self.scale}")
        if not all(map(math.isfinite, self.offset)):
            raise ValueError(f"task {self.name!r}: offset must be finite, got {self.offset}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"task {self.name!r}: weight must not be negative, got {self.weight}")

    def _check_dense_fields(self) -> None:
        if self.kind != "dense_regression":
            for name in ("threshold", "flip"):
                if getattr(self, name) not in (None, ()):
                    raise ValueError(f"task {self.name!r}: {name} is for dense_regression, not for {self.kind}")
            return
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"task {self.name!r}: threshold must be a finite raw value, got {self.threshold}")
        if self.metric == "f1" and self.threshold is None:
            raise ValueError(f"task {self.name!r}: metric f1 needs a threshold, the raw value of a positive pixel")
        if len(self.flip) not in (0, self.channels):
            raise ValueError(f"task {self.name!r}: flip needs 0 or {self.channels} values, got {len(self.flip)}")
        if any(factor not in (1, -1) for factor in self.flip):
            raise ValueError(f"task {self.name!r}: flip takes factors of 1 and -1, got {self.flip}")

    @property
    def dense(self) -> bool:
        """Whether there is a label for every pixel."""
        return self.kind in DENSE_KINDS

    @property
    def classes(self) -> bool:
        """Whether labels are class ids."""
        return self.kind in CLASS_KINDS

    def encode(self, raw: Tensor, present: Tensor | None = None) -> Tensor:
        """Convert stored values to a training target.

        Args:
            raw: `(B,)` or `(B, C)` for a sample-wise task; `(B, H, W)` or `(B, H, W, C)` for a dense one; any
                dtype.
            present: Bool, `(B,)` or `(B, H, W)`; False for a missing label.

        Returns:
            int64 `(B,)` or `(B, H, W)` for class ids; float32 `(B,)`, `(B, C)` or `(B, C, H, W)` otherwise.
            The axis `C` exists for all dense regression tasks and for regression tasks of more than one channel.
        """
        if self.classes:
            target = raw.long()
            return target if present is None else target.where(_expand(present, target), self.ignore_index)
        missing = [] if present is None else [~_expand(present, raw)]
        # one new tensor, changed in place: the time of this function is memory traffic
        value = raw.to(torch.float32, copy=True)
        if raw.is_floating_point():
            missing.append(raw.isnan())
        if self.valid_below is not None:
            missing.append(value >= self.valid_below)
        if self.kind != "binary":
            # the channel is the last axis of the stored values; a single channel is stored without it
            value.sub_(value.new_tensor(self.offset)).div_(value.new_tensor(self.scale))
        for where in missing:
            value.masked_fill_(where, torch.nan)
        return self.in_layout(value)

    def encode_rows(self, raw: np.ndarray, present: np.ndarray | None, out: np.ndarray) -> None:
        """Do the same as `encode` in host memory, with NumPy.

        It uses one thread. PyTorch would divide each operation among as many threads as a training step, which
        compete with those of the step and of readers.

        Args:
            raw, present: See `encode`.
            out: Receives the targets in the layout of `raw`, int64 for class ids and float32 otherwise.
        """
        np.copyto(out, raw, casting="unsafe")
        missing = [] if present is None else [~present.reshape(present.shape + (1,) * (raw.ndim - present.ndim))]
        if self.valid_below is not None:
            missing.append(out >= np.float32(self.valid_below))
        if self.kind not in ("binary", *CLASS_KINDS):
            out -= np.array(self.offset, np.float32)
            out /= np.array(self.scale, np.float32)
        for where in missing:
            np.copyto(out, self.ignore_index if self.classes else np.nan, where=where)

    def in_layout(self, target: Tensor) -> Tensor:
        """View encoded values in the layout of stored labels in the layout of targets."""
        if self.kind != "dense_regression":
            return target
        return target.unsqueeze(1) if target.dim() == 3 else target.permute(0, 3, 1, 2)

    def decode(self, output: Tensor) -> Tensor:
        """Convert a network output to predictions in the layout of the stored labels.

        Args:
            output: `(B,)`, `(B, C)` or `(B, C, H, W)`, as returned by `GroupModel`.

        Returns:
            binary: probability of class 1, `(B,)`; multiclass: probabilities, `(B, C)`; regression: values in
            raw units, `(B,)` or `(B, C)`; dense classification: class ids, int64 `(B, H, W)`; dense regression:
            values in raw units, `(B, H, W)` or `(B, H, W, C)`.
        """
        output = output.float()
        if self.kind == "binary":
            return output.sigmoid()
        if self.kind == "multiclass":
            return output.softmax(1)
        if self.kind == "dense_classification":
            return output.argmax(1)
        if self.kind == "dense_regression":
            output = output.squeeze(1) if self.channels == 1 else output.permute(0, 2, 3, 1)
        return output * output.new_tensor(self.scale) + output.new_tensor(self.offset)

    @property
    def shares(self) -> tuple[tuple[int, str], ...]:
        """The classes whose probabilities are listed by name: id of the class, and its name.

        They are all classes of a multiclass task with at most `MOST_SHARES` classes, and the positive class of a
        binary task. A task without names of classes has none.
        """
        if self.kind == "binary" and len(self.labels) == 2:
            return ((1, self.labels[1]),)
        named = self.kind == "multiclass" and self.channels <= MOST_SHARES
        return tuple(enumerate(self.labels)) if named else ()

    def named_shares(self, decoded: np.ndarray) -> dict[str, np.ndarray]:
        """Return the probability of each class of `shares`, `(B,)`, under the name `<task>.<class>`.

        Args:
            decoded: Result of `decode` for a batch, `(B,)` or `(B, C)`.
        """
        columns = decoded if decoded.ndim > 1 else np.stack((1 - decoded, decoded), 1)
        return {f"{self.name}.{name}": columns[:, number] for number, name in self.shares}

    def in_units_of(self, other: Task, output: Tensor) -> Tensor:
        """Convert a network output to the network units of another task. The decoded value does not change.

        Args:
            other: The same task with another `offset` or `scale`.
            output: `(B,)`, `(B, C)` or `(B, C, H, W)`, as returned by `GroupModel`.

        Returns:
            Shape of `output`. Outputs of classes and flags have no units and do not change.
        """
        if self.kind in CLASS_KINDS or self.kind == "binary":
            return output
        if (self.offset, self.scale) == (other.offset, other.scale):
            return output
        shape = [1, -1] + [1] * (output.dim() - 2) if output.dim() > 1 else [-1]

        def constant(values: tuple[float, ...]) -> Tensor:
            return output.new_tensor(values).reshape(shape)

        raw = output * constant(self.scale) + constant(self.offset)
        return (raw - constant(other.offset)) / constant(other.scale)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields ready for JSON. `from_dict` reads them."""
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        options = self.loss_options.to_dict()
        return {k: v for k, v in (values | {"loss_options": options}).items() if k != "loss_options" or options}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Task:
        """The inverse of `to_dict`.

        Raises:
            ValueError: If `Task` does not have a field.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"task has no field {', '.join(sorted(unknown))}")
        return cls(**values)


def _expand(present: Tensor, like: Tensor) -> Tensor:
    return present.reshape(present.shape + (1,) * (like.dim() - present.dim()))


def check_names(tasks: Sequence[Task]) -> None:
    """Raise ValueError if there is no task, or if two have one name."""
    counts = Counter(task.name for task in tasks)
    if not counts:
        raise ValueError("at least one task is needed, got none")
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise ValueError(f"task names must be unique, got {listed(twice)} more than once")
