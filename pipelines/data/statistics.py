"""Statistics of labels as mergeable sums, the problems of a task that they show, and repeated inputs."""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from dmtg_core.names import listed
from dmtg_core.tasks import Task

Sums = dict[str, Any]  # JSON-ready sums of a task
# differences between splits that are visible in a plot
VISIBLE_SHARE = 0.05
VISIBLE_DEVIATIONS = 0.2
DIGEST = 8  # bytes: two of a million different inputs have the same digest with a probability of 3e-8


def label_sums(task: Task, labels: Sequence[np.ndarray | None], masks: Sequence[np.ndarray | None]) -> Sums:
    """Sums of one task over samples. A missing label is None; a mask marks annotated pixels.

    Returns:
        `rows`, `missing` (samples) and `values` (labels: samples, or pixels of a dense task); for classes and
        flags `classes` (labels of each class), and for values `sum`, `squares`, `min`, `max` in raw units. A task
        of several channels also has the latter for each channel, in `channels`.
    """
    present = [(label, mask) for label, mask in zip(labels, masks, strict=True) if label is not None]
    sums: Sums = {"rows": len(labels), "missing": len(labels) - len(present)}
    width = 1 if task.classes else task.channels
    kept = [_annotated(label, mask).reshape(-1, width) for label, mask in present]
    values = np.concatenate(kept) if kept else np.zeros((0, width))
    if task.classes or task.kind == "binary":
        found = _known(task, values[:, 0])
        count = 2 if task.kind == "binary" else task.channels
        classes = np.bincount(found.astype(np.int64), minlength=count)
        return sums | {"values": int(found.size), "classes": classes.tolist()}
    channels = [_value_sums(_known(task, values[:, channel])) for channel in range(width)]
    return sums | _added(channels) | ({"channels": channels} if width > 1 else {})


def _annotated(label: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    values = np.asarray(label)
    return values if mask is None else values[np.asarray(mask, dtype=bool)]


def _known(task: Task, values: np.ndarray) -> np.ndarray:
    """The values `(n,)` of a channel that are labels: without ignored, undefined and invalid ones."""
    if task.classes:
        return values[values != task.ignore_index]
    values = values[~np.isnan(values.astype(np.float32))]
    return values if task.valid_below is None else values[values < task.valid_below]


def _value_sums(values: np.ndarray) -> Sums:
    if not values.size:
        return {"values": 0}
    wide = values.astype(np.float64)
    sums = {"values": int(wide.size), "sum": float(wide.sum()), "squares": float((wide**2).sum())}
    return sums | {"min": float(wide.min()), "max": float(wide.max())}


def _added(parts: Sequence[Sums]) -> Sums:
    """The total of sums of values."""
    total: Sums = {"values": sum(part["values"] for part in parts)}
    filled = [part for part in parts if part["values"]]
    if filled:
        total |= {key: sum(part[key] for part in filled) for key in ("sum", "squares")}
        total |= {"min": min(p["min"] for p in filled), "max": max(p["max"] for p in filled)}
    return total


def merge(parts: Sequence[Sums]) -> Sums:
    """The total of the sums of all parts."""
    total: Sums = {key: sum(part[key] for part in parts) for key in ("rows", "missing", "values")}
    if parts and "classes" in parts[0]:
        total["classes"] = [sum(column) for column in zip(*(part["classes"] for part in parts), strict=True)]
        return total
    if parts and all("channels" in part for part in parts):
        total["channels"] = [_added(column) for column in zip(*(part["channels"] for part in parts), strict=True)]
    return total | _added(parts)


def summary(sums: Sums) -> dict[str, Any]:
    """Readable statistics: missing rate, and labels of each class or mean, deviation and range."""
    found: dict[str, Any] = {
        "rows": sums["rows"],
        "missing_rate": sums["missing"] / sums["rows"] if sums["rows"] else math.nan,
    }
    return found | ({"classes": sums["classes"]} if "classes" in sums else moments(sums))


def moments(sums: Sums) -> dict[str, float]:
    """Mean, deviation and range from the sums of values; empty if there is no value."""
    if not sums["values"]:
        return {}
    mean = sums["sum"] / sums["values"]
    variance = max(sums["squares"] / sums["values"] - mean**2, 0.0)
    return {"mean": mean, "std": math.sqrt(variance), "min": sums["min"], "max": sums["max"]}


def by_channel(sums: Sums) -> list[Sums]:
    """Sums of values of each channel; the total if there is one channel or if older shards hold nothing else."""
    channels: list[Sums] = sums.get("channels", [sums])
    return channels


def in_network_units(task: Task, found: Mapping[str, float], channel: int = 0) -> dict[str, float]:
    """`moments` of a channel in the units of the network; see `Task.encode`."""
    offset, scale = (values[channel if len(values) > 1 else 0] for values in (task.offset, task.scale))
    return {key: (value - (0.0 if key == "std" else offset)) / scale for key, value in found.items()}


def drift(task: Task, train: Sums, other: Sums) -> str:
    """Description of how the labels of a split differ from those of training; empty for a small difference.

    A difference counts if it is above three standard errors. The error is computed from the number of samples,
    also for dense tasks: pixels of one sample are similar, and the mean of a sample varies no more than its
    pixels.
    """
    samples = [sums["rows"] - sums["missing"] for sums in (train, other)]
    if not train["values"] or not other["values"]:
        return ""
    sampling = 3 * math.sqrt(1 / samples[0] + 1 / samples[1])
    if "classes" in train:
        return _share_drift(task, train, other, sampling)
    here, there = moments(train), moments(other)
    change = abs(there["mean"] - here["mean"])
    if change <= max(VISIBLE_DEVIATIONS, sampling) * here["std"]:
        return ""
    apart = f", {change / here['std']:.1f} standard deviations apart" if here["std"] else ""
    return f"mean {there['mean']:.4g}, in train {here['mean']:.4g}{apart}"


def _share_drift(task: Task, train: Sums, other: Sums, sampling: float) -> str:
    """Description of the class whose share differs most; empty if the difference can be chance."""
    shares = [np.array(sums["classes"]) / sums["values"] for sums in (train, other)]
    both = (np.array(train["classes"]) + other["classes"]) / (train["values"] + other["values"])
    change = np.abs(shares[1] - shares[0])
    change[change <= np.maximum(VISIBLE_SHARE, sampling * np.sqrt(both * (1 - both)))] = 0
    if not change.any():
        return ""
    most = 1 if task.kind == "binary" else int(change.argmax())
    return f"class {class_name(task, most)} has {shares[1][most]:.1%}, in train {shares[0][most]:.1%}"


def class_name(task: Task, number: int) -> str:
    """Name of a class or of the value of a flag; its number if it has no name."""
    return task.labels[number] if 0 <= number < len(task.labels) else str(number)


def constant(sums: Sums) -> str:
    """The reason why a target is constant; empty if it is not."""
    if not sums["values"]:
        return "it has no label"
    if "classes" in sums:
        present = [i for i, count in enumerate(sums["classes"]) if count]
        return f"every label is class {present[0]}" if len(present) == 1 else ""
    return f"every value is {sums['min']:g}" if sums["min"] == sums["max"] else ""


def thin_loss(task: Task, sums: Mapping[str, Any], least: int) -> str:
    """The reason why a mean loss on this split has little meaning; empty if there are enough labels.

    It needs enough labelled samples, and for classes enough labels outside of the most frequent class: the loss of
    that class alone does not show what a network has learned. For dense tasks only the samples are counted.
    """
    samples = sums["rows"] - sums["missing"]
    if samples < least:
        return f"{samples} labelled samples"
    if "classes" not in sums or task.dense:
        return ""
    others = sum(sums["classes"]) - max(sums["classes"])
    return f"{others} labels outside of its most frequent class" if others < least else ""


def thin_support(task: Task, sums: Mapping[str, Any], least: int) -> str:
    """The reason why a result on this split is unreliable; empty if there are enough labels.

    For dense tasks only the number of samples is checked, because one sample holds thousands of labelled pixels.
    """
    samples = sums["rows"] - sums["missing"]
    if samples < least:
        return f"{samples} labelled samples"
    if "classes" not in sums or task.dense:
        return ""
    names = task.labels or tuple(str(i) for i in range(len(sums["classes"])))
    few = [f"{name}: {count}" for name, count in zip(names, sums["classes"], strict=True) if count < least]
    return f"classes with fewer than {least} labels ({listed(few)})" if few else ""


def input_digests(inputs: Iterable[np.ndarray]) -> str:
    """Return the digests of stored inputs as text for JSON."""
    found = (blake2b(value.tobytes(), digest_size=DIGEST).digest() for value in inputs)
    return b64encode(b"".join(found)).decode()


def repeated_inputs(digests: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Count the samples of other splits whose stored input is that of a training sample, byte for byte.

    Args:
        digests: Split → texts of `input_digests`.

    Returns:
        Split → count, for the other splits with samples.
    """
    found = {split: np.frombuffer(b"".join(map(b64decode, texts)), np.uint64) for split, texts in digests.items()}
    known = np.unique(found.pop("train"))
    return {split: int(np.isin(own, known).sum()) for split, own in found.items() if own.size}
