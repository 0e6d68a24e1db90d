"""Statistics of labels as mergeable sums, and what they say against training on a task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmtg_core.tasks import Task

Sums = dict[str, Any]  # task → JSON-ready sums


def label_sums(task: Task, labels: Sequence[np.ndarray | None], masks: Sequence[np.ndarray | None]) -> Sums:
    """Sums of one task over samples; a label is None where it is missing, a mask marks annotated pixels.

    Returns:
        `rows`, `missing` (samples), `values` (labels: samples, or pixels of a dense task), and for classes and
        flags `classes` (labels of each class), for values `sum`, `squares`, `min`, `max` in raw units.
    """
    present = [(label, mask) for label, mask in zip(labels, masks, strict=True) if label is not None]
    sums: Sums = {"rows": len(labels), "missing": len(labels) - len(present)}
    kept = [_annotated(task, label, mask) for label, mask in present]
    values = np.concatenate(kept) if kept else np.zeros(0)
    sums["values"] = int(values.size)
    if task.classes or task.kind == "binary":
        count = 2 if task.kind == "binary" else task.channels
        sums["classes"] = np.bincount(values.astype(np.int64), minlength=count).tolist()
    elif values.size:
        values = values.astype(np.float64)
        sums |= {"sum": float(values.sum()), "squares": float((values**2).sum())}
        sums |= {"min": float(values.min()), "max": float(values.max())}
    return sums


def _annotated(task: Task, label: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    values = np.asarray(label)
    if mask is not None:
        values = values[np.asarray(mask, dtype=bool)]
    values = values.reshape(-1)
    if task.classes:
        return values[values != task.ignore_index]
    values = values[~np.isnan(values.astype(np.float32))]
    return values if task.valid_below is None else values[values < task.valid_below]


def merge(parts: Sequence[Sums]) -> Sums:
    """The sums of all parts together."""
    total: Sums = {key: sum(part[key] for part in parts) for key in ("rows", "missing", "values")}
    if parts and "classes" in parts[0]:
        total["classes"] = [sum(column) for column in zip(*(part["classes"] for part in parts), strict=True)]
        return total
    filled = [part for part in parts if "sum" in part]
    if filled:
        total |= {key: sum(part[key] for part in filled) for key in ("sum", "squares")}
        total |= {"min": min(p["min"] for p in filled), "max": max(p["max"] for p in filled)}
    return total


def summary(sums: Sums) -> dict[str, Any]:
    """What a person reads: missing rate, then classes with their share, or mean, deviation and range."""
    found: dict[str, Any] = {
        "rows": sums["rows"],
        "missing_rate": sums["missing"] / sums["rows"] if sums["rows"] else math.nan,
    }
    if "classes" in sums:
        return found | {"classes": sums["classes"]}
    if not sums["values"]:
        return found
    mean = sums["sum"] / sums["values"]
    variance = max(sums["squares"] / sums["values"] - mean**2, 0.0)
    return found | {"mean": mean, "std": math.sqrt(variance), "min": sums["min"], "max": sums["max"]}


def constant(sums: Sums) -> str:
    """Why a target carries no signal, in words; empty when it does."""
    if not sums["values"]:
        return "it has no label at all"
    if "classes" in sums:
        present = [i for i, count in enumerate(sums["classes"]) if count]
        return f"every label is class {present[0]}" if len(present) == 1 else ""
    return f"every value is {sums['min']:g}" if sums["min"] == sums["max"] else ""


def thin_support(task: Task, sums: Mapping[str, Any], least: int) -> str:
    """Why a result on this split says little, in words; empty when there are labels enough.

    Dense tasks count pixels, of which one sample holds thousands, so only the number of samples is asked of them.
    """
    samples = sums["rows"] - sums["missing"]
    if samples < least:
        return f"{samples} labelled samples"
    if "classes" not in sums or task.dense:
        return ""
    names = task.labels or tuple(str(i) for i in range(len(sums["classes"])))
    few = [f"{name}: {count}" for name, count in zip(names, sums["classes"], strict=True) if count < least]
    return f"classes with fewer than {least} labels ({', '.join(few)})" if few else ""
