"""Metrics as sums and counts: added up on the device, summed over workers once, divided once.

`MetricSums` never averages batch means, so batch sizes, workers and missing labels cannot change a figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dmtg_core.losses import label_counts, sample_loss, valid
from dmtg_core.tasks import Task

Metrics = dict[str, dict[str, float]]  # task → metric → value

# Equal bins of the logit between -16 and 16 (probabilities 1e-7 to 1 - 1e-7): scores in one bin count as tied.
AUROC_BINS = 2048
AUROC_RANGE = 16.0

# Metrics that are errors already; every other is a score in [0, 1] whose error is 1 - score.
ERRORS = ("loss", "rmse", "mae", "mean_angle")


def _confusion(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """Counts of (true class, predicted class), flattened `(C·C,)`; labels outside the mask are left out."""
    known = valid(task, target)
    cell = target.clamp(0, task.channels - 1) * task.channels + output.argmax(1)
    counts = torch.zeros(task.channels**2, dtype=torch.float64, device=output.device)
    return counts.index_add_(0, cell.flatten(), known.flatten().double())


def _binary_sums(task: Task, output: Tensor, target: Tensor) -> Tensor:
    known = valid(task, target).double()
    positive = (target > 0.5).double()
    guess = (output > 0).double()
    cells = [
        (known * a * b).sum() for a in (positive, 1 - positive) for b in (guess, 1 - guess)
    ]  # true positives, false negatives, false positives, true negatives
    step = (output.float() + AUROC_RANGE) / (2 * AUROC_RANGE) * AUROC_BINS
    slot = step.nan_to_num(0.0).clamp(0, AUROC_BINS - 1).long()
    histogram = torch.zeros(2 * AUROC_BINS, dtype=torch.float64, device=output.device)
    histogram.index_add_(0, slot + AUROC_BINS * (1 - positive.long()), known)
    return torch.cat([torch.stack(cells), histogram])


def _value_sums(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """Count, Σe², Σ|e|, Σy, Σy² in raw units, then pixels, Σangle and pixels within 30° for three channels."""
    axis = [1, -1] + [1] * (target.dim() - 2) if target.dim() > 1 else [-1]
    scale = target.new_tensor(task.scale).reshape(axis)
    offset = target.new_tensor(task.offset).reshape(axis)
    known = valid(task, target)
    filled = target.masked_fill(~known, 0.0)
    truth = (filled * scale + offset).double() * known
    error = ((output.float() - filled) * scale).double() * known
    sums = [known.double().sum(), (error**2).sum(), error.abs().sum(), truth.sum(), (truth**2).sum()]
    if task.metric in ("within_30", "mean_angle"):
        sums += _angle_sums(output.float(), target, known)
    return torch.stack(sums)


def _angle_sums(output: Tensor, target: Tensor, known: Tensor) -> list[Tensor]:
    cosine = torch.cosine_similarity(output, target.masked_fill(~known, 0.0), dim=1).clamp(-1, 1)
    angle = torch.rad2deg(torch.acos(cosine)).double()
    pixel = known.all(1).double()
    return [pixel.sum(), (angle * pixel).sum(), ((angle <= 30) * pixel).sum()]


SUMS: Mapping[str, Callable[[Task, Tensor, Tensor], Tensor]] = {
    "binary": _binary_sums,
    "multiclass": _confusion,
    "regression": _value_sums,
    "dense_classification": _confusion,
    "dense_regression": _value_sums,
}


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _binary_metrics(_task: Task, sums: Tensor) -> dict[str, float]:
    tp, fn, fp, tn = sums[:4].tolist()
    positive, negative = sums[4:].reshape(2, AUROC_BINS)
    below = negative.cumsum(0) - negative / 2  # negatives under each positive, ties count half
    return {
        "accuracy": _ratio(tp + tn, tp + fn + fp + tn),
        "balanced_accuracy": (_ratio(tp, tp + fn) + _ratio(tn, tn + fp)) / 2,
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "auroc": _ratio(float(positive @ below), (tp + fn) * (fp + tn)),
    }


def _class_metrics(task: Task, sums: Tensor) -> dict[str, float]:
    table = sums.reshape(task.channels, task.channels)
    right, true, guessed = table.diagonal(), table.sum(1), table.sum(0)
    present = true > 0
    if not present.any():
        return {"accuracy": math.nan, "balanced_accuracy": math.nan} | ({"miou": math.nan} if task.dense else {})
    found = {
        "accuracy": float(right.sum() / true.sum()),
        "balanced_accuracy": float((right / true)[present].mean()),
    }
    if task.dense:
        found["miou"] = float((right / (true + guessed - right))[present].mean())
    return found


def _value_metrics(task: Task, sums: Tensor) -> dict[str, float]:
    count, squared, absolute, total, total_squared = sums[:5].tolist()
    spread = total_squared - _ratio(total**2, count)
    if spread <= 1e-12 * total_squared:  # nothing but rounding: a constant has no spread to explain
        spread = 0.0
    found = {
        "rmse": math.sqrt(_ratio(squared, count)) if count else math.nan,
        "mae": _ratio(absolute, count),
        "r2": 1 - _ratio(squared, spread),
    }
    if task.metric in ("within_30", "mean_angle"):
        pixels, angle, near = sums[5:].tolist()
        found |= {"within_30": _ratio(near, pixels), "mean_angle": _ratio(angle, pixels)}
    return found


METRICS_OF: Mapping[str, Callable[[Task, Tensor], dict[str, float]]] = {
    "binary": _binary_metrics,
    "multiclass": _class_metrics,
    "regression": _value_metrics,
    "dense_classification": _class_metrics,
    "dense_regression": _value_metrics,
}


class MetricSums:
    """Sums of every task's metrics over the samples seen.

    Metrics: "loss" for every task (mean over labels); binary: accuracy, balanced_accuracy, f1, auroc (from
    `AUROC_BINS` bins of the logit); multiclass: accuracy, balanced_accuracy (mean recall over the classes
    present); dense classification: those and miou (mean over the classes present); regression kinds: rmse, mae,
    r2 in raw units; three channels with an angle as headline metric: within_30 (share of pixels within 30°) and
    mean_angle in degrees. A figure that is not defined (no label, one class only for auroc) is NaN.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tuple(tasks)
        self.sums: dict[str, Tensor] = {}

    def update(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
        """Add a batch: outputs as `GroupingNetwork.forward` gives them, encoded targets."""
        counts = label_counts(self.tasks, targets).double()
        for task, count in zip(self.tasks, counts, strict=True):
            output, target = outputs[task.name], targets[task.name]
            loss = sample_loss(task, output, target).sum().double()
            sums = torch.cat([torch.stack([loss, count]), SUMS[task.kind](task, output, target)])
            held = self.sums.get(task.name)
            self.sums[task.name] = sums if held is None else held + sums

    def reduce(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Sum over workers with one call of `reduce_sum`. Every worker must have seen at least one sample."""
        flat = reduce_sum(torch.cat([self.sums[task.name] for task in self.tasks]))
        sizes = [len(self.sums[task.name]) for task in self.tasks]
        self.sums = dict(zip((task.name for task in self.tasks), flat.split(sizes), strict=True))

    def compute(self) -> Metrics:
        """Task → metric → value."""
        found: Metrics = {}
        for task in self.tasks:
            sums = self.sums[task.name].cpu()
            loss, count = sums[:2].tolist()
            found[task.name] = {"loss": _ratio(loss, count)} | METRICS_OF[task.kind](task, sums[2:])
        return found


def error_of(metric: str, value: float) -> float:
    """The error that belongs to a metric: the metric itself, or 1 - score."""
    return value if metric in ERRORS else 1 - value


def normalized_gain(tasks: Sequence[Task], metrics: Metrics, reference: Metrics, *, metric: str = "") -> float:
    """Mean relative reduction of the error, in per cent: `100 · mean_n((err_ref[n] - err[n]) / err_ref[n])`.

    Gao et al. 2024: against naive MTL with evaluation errors, against single-task with losses.

    Args:
        metric: One metric for all tasks ("loss"); by default each task's headline metric.

    Returns:
        NaN when a reference error is 0 or not defined.

    Raises:
        KeyError: When a task is missing in either: values are paired by name, never by order.
    """
    gains = []
    for task in tasks:
        name = metric or task.metric
        base = error_of(name, reference[task.name][name])
        gains.append(_ratio(base - error_of(name, metrics[task.name][name]), base))
    return 100 * sum(gains) / len(gains)


def total_error(tasks: Sequence[Task], metrics: Metrics) -> float:
    """`100 · Σ_n (1 - accuracy_n)`, as the CelebA tables print it."""
    return 100 * sum(1 - metrics[task.name]["accuracy"] for task in tasks)
