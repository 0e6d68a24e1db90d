"""Metrics as sums and counts, accumulated on the device and summed over workers once.

`MetricSums` does not average batch means. Batch sizes, workers and missing labels therefore do not change a
metric. AUROC and average precision are not sums: their scores are gathered, see `dmtg_core.training.ranking`. All
metrics are computed in float64.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dmtg_core.addresses import is_address
from dmtg_core.loss_options import LossOptions
from dmtg_core.own_code import own_metric_sums
from dmtg_core.tasks import ANGLES, LOSSES, Task
from dmtg_core.training.context import TrainContext, gather
from dmtg_core.training.losses import label_count, sample_loss, valid
from dmtg_core.training.ranking import EXACT, Scores

log = logging.getLogger(__name__)

Metrics = dict[str, dict[str, float]]  # task → metric → value

# Metrics that are errors, as are those of the user. All others are scores in [0, 1] with the error 1 - score.
ERRORS = ("loss", "log_loss", "rmse", "mae", "mean_angle")
IN_UNITS = ("rmse", "mae")  # metrics in the unit of their task

# Metric → largest angle in degrees. The metric is the share of pixels with at most this angle.
WITHIN: Mapping[str, float] = {"within_11": 11.25, "within_22": 22.5, "within_30": 30.0}

# Divisor of the change of a score: the error (1 - score) of the reference, or its score.
GAIN_FORMS = ("error", "score")


def _class_sums(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """Correct predictions, labels and predictions of each class, flattened `(3·C,)`.

    Predictions without a label are omitted.
    """
    known, guess = valid(task, target).double(), output.argmax(1)
    truth = target.clamp(0, task.channels - 1)
    counts = torch.zeros(3, task.channels, dtype=torch.float64, device=output.device)
    for row, (of, what) in zip(
        counts, ((truth, known * (guess == truth)), (truth, known), (guess, known)), strict=True
    ):
        row.index_add_(0, of.flatten(), what.flatten())
    return counts.flatten()


def _binary_sums(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """True positives, false negatives, false positives, true negatives."""
    known = valid(task, target).double()
    positive = (target > 0.5).double()
    guess = (output > 0).double()
    cells = [(known * a * b).sum() for a in (positive, 1 - positive) for b in (guess, 1 - guess)]
    return torch.stack(cells)


def _value_sums(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """Count, Σe², Σ|e|, Σd, Σd² in raw units, then `_angle_sums` and `_positive_sums` if they apply.

    d is the difference of the value to the task's offset: a variance from squares of large values loses precision.
    """
    axis = [1, -1] + [1] * (target.dim() - 2) if target.dim() > 1 else [-1]
    scale = target.new_tensor(task.scale).reshape(axis)
    offset = target.new_tensor(task.offset).reshape(axis)
    known = valid(task, target)
    filled = target.masked_fill(~known, 0.0)
    distance, error = filled * scale * known, (output - filled) * scale * known
    sums = [known.double().sum(), (error**2).sum(), error.abs().sum(), distance.sum(), (distance**2).sum()]
    if task.metric in ANGLES:
        sums += _angle_sums(output, target, known)
    if task.threshold is not None:
        # in float32 as in `Task.encode`, so that equal values compare as equal
        level = (torch.tensor(task.threshold, device=target.device) - offset.float()) / scale.float()
        sums += _positive_sums(output >= level, target >= level, known)
    return torch.stack(sums)


def _angle_sums(output: Tensor, target: Tensor, known: Tensor) -> list[Tensor]:
    """Annotated pixels, the sum of their angles in degrees, and the number within each limit of `WITHIN`."""
    cosine = torch.cosine_similarity(output, target.masked_fill(~known, 0.0), dim=1).clamp(-1, 1)
    angle = torch.rad2deg(torch.acos(cosine))
    pixel = known.all(1).double()
    near = [((angle <= limit) * pixel).sum() for limit in WITHIN.values()]
    return [pixel.sum(), (angle * pixel).sum(), *near]


def _positive_sums(guess: Tensor, positive: Tensor, known: Tensor) -> list[Tensor]:
    """True positives, false negatives and false positives among the annotated values."""
    cells = (guess & positive, ~guess & positive, guess & ~positive)
    return [(cell & known).sum().double() for cell in cells]


SUMS: Mapping[str, Callable[[Task, Tensor, Tensor], Tensor]] = {
    "binary": _binary_sums,
    "multiclass": _class_sums,
    "regression": _value_sums,
    "dense_classification": _class_sums,
    "dense_regression": _value_sums,
}


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _f1(tp: float, fn: float, fp: float) -> float:
    return _ratio(2 * tp, 2 * tp + fn + fp)


def _binary_metrics(_task: Task, sums: Tensor) -> dict[str, float]:
    tp, fn, fp, tn = sums.tolist()
    return {
        "accuracy": _ratio(tp + tn, tp + fn + fp + tn),
        "balanced_accuracy": (_ratio(tp, tp + fn) + _ratio(tn, tn + fp)) / 2,
        "f1": _f1(tp, fn, fp),
    }


def _class_metrics(task: Task, sums: Tensor) -> dict[str, float]:
    right, true, guessed = sums.reshape(3, task.channels)
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
    if spread <= 1e-12 * total_squared:  # only rounding: the values are constant
        spread = 0.0
    found = {
        "rmse": math.sqrt(_ratio(squared, count)) if count else math.nan,
        "mae": _ratio(absolute, count),
        "r2": 1 - _ratio(squared, spread),
    }
    if task.metric in ANGLES:
        pixels, angle, *near = sums[5 : 7 + len(WITHIN)].tolist()
        found |= {name: _ratio(inside, pixels) for name, inside in zip(WITHIN, near, strict=True)}
        found["mean_angle"] = _ratio(angle, pixels)
    if task.threshold is not None:
        found["f1"] = _f1(*sums[-3:].tolist())
    return found


METRICS_OF: Mapping[str, Callable[[Task, Tensor], dict[str, float]]] = {
    "binary": _binary_metrics,
    "multiclass": _class_metrics,
    "regression": _value_metrics,
    "dense_classification": _class_metrics,
    "dense_regression": _value_metrics,
}


def task_sums(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """Compute the sums of a batch from which `task_metrics` computes the metrics of a task."""
    sums = SUMS[task.kind](task, output, target)
    return torch.cat([sums, own_metric_sums(task, output, target)]) if is_address(task.metric) else sums


def task_metrics(task: Task, sums: Tensor) -> dict[str, float]:
    """Compute the metrics of a task from its sums: those of its kind, and that of the user."""
    if not is_address(task.metric):
        return METRICS_OF[task.kind](task, sums)
    return METRICS_OF[task.kind](task, sums[:-2]) | {task.metric: _ratio(*sums[-2:].tolist())}


def with_plain_loss(task: Task) -> Task:
    """Return a task of classes or flags with the cross-entropy without options as its loss, any other as it is."""
    if task.kind != "binary" and not task.classes:
        return task
    return replace(task, loss=LOSSES[task.kind][0], loss_options=LossOptions())


class MetricSums:
    """Sums of the metrics of all tasks over samples.

    All tasks have "loss" (mean over labels). Tasks of classes and flags with another loss than the cross-entropy,
    or with options of it, also have "log_loss", the cross-entropy without options. Binary tasks have accuracy,
    balanced_accuracy, f1, auroc and average_precision (see `ranking`). Multiclass tasks have accuracy and
    balanced_accuracy (mean recall over the classes present). Dense classification also has miou (mean over the
    classes present). Regression kinds have rmse, mae and r2 in raw units. A task with three channels and one of
    `ANGLES` as headline metric has all of `ANGLES`: within_11, within_22 and within_30 (share of pixels with an
    angle of at most 11.25°, 22.5°, 30°) and mean_angle in degrees. A task with a threshold has f1. A metric that
    is not defined (no label, or only one class for auroc) is NaN.

    f1 of a dense task (keypoints, edges) is 2·TP / (2·TP + FN + FP) over all annotated pixels of a split. Raw
    values of at least `Task.threshold` are positive, in the target and in the output. Gao et al. 2024 report a
    keypoint F1 and an edge F1 without a threshold, and their published code has only losses, accuracy and IoU, so
    their definition is not known. Their values seem to come from constant targets, for which F1 has no meaning. f1
    is counted over a split, not averaged over images. It is defined if at least one pixel is positive in target or
    output, and NaN otherwise. An image without a keypoint only adds its false positives. miou also differs from
    their code: the mean is over the classes present, not over all 18.

    Args:
        tasks: The tasks.
        exact: Number of scores of each binary task up to which auroc and average_precision are exact.
    """

    def __init__(self, tasks: Sequence[Task], exact: int = EXACT) -> None:
        self.tasks = tuple(tasks)
        self.exact = exact
        self.sums: dict[str, Tensor] = {}
        self.plain = {task.name: plain for task in tasks if (plain := with_plain_loss(task)) != task}
        self.plain_sums: dict[str, Tensor] = {}  # loss and labels of `plain`
        self.scores = {task.name: Scores(exact) for task in tasks if task.kind == "binary"}

    def update(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
        """Add a batch: outputs of `GroupingNetwork.forward` and encoded targets."""
        for task in self.tasks:
            output, target = outputs[task.name].double(), targets[task.name]
            target = target.double() if target.is_floating_point() else target
            loss = sample_loss(task, output, target).sum()
            head = torch.stack([loss, label_count(task, target).double()])
            sums = torch.cat([head, task_sums(task, output, target)])
            held = self.sums.get(task.name)
            self.sums[task.name] = sums if held is None else held + sums
            if task.name in self.scores:
                self.scores[task.name].add(outputs[task.name], targets[task.name])
            if task.name in self.plain:
                plain = self.plain[task.name]
                pair = torch.stack([sample_loss(plain, output, target).sum(), label_count(plain, target).double()])
                self.plain_sums[task.name] = self.plain_sums.get(task.name, 0.0) + pair

    def reduce(self, context: TrainContext) -> None:
        """Sum over workers, with one message, and two messages for each binary task.

        Each worker must have at least one sample.
        """
        if context.world_size == 1:
            return
        counts = [self.scores[name].count for name in self.scores]
        parts = [self.sums[task.name] for task in self.tasks]
        plain = list(self.plain_sums.values())
        flat = context.sum(torch.cat([*parts, *plain, parts[0].new_tensor(counts)]))
        *parts, total = flat.split([*map(len, parts), *map(len, plain), len(counts)])
        self.plain_sums = dict(zip(self.plain_sums, parts[len(self.tasks) :], strict=True))
        self.sums = dict(zip((task.name for task in self.tasks), parts, strict=False))
        for (name, scores), count in zip(self.scores.items(), total.tolist(), strict=True):
            packs = gather(scores.packed(coarse=count > self.exact).to(context.device), context)
            self.scores[name] = Scores.joined(packs, self.exact)

    def start_as(self, other: MetricSums) -> None:
        """Start with sums of 0 in the form of another object with the same tasks."""
        self.sums = {name: torch.zeros_like(sums) for name, sums in other.sums.items()}
        self.plain_sums = {name: torch.zeros_like(sums) for name, sums in other.plain_sums.items()}

    @classmethod
    def joined(cls, parts: Sequence[MetricSums], exact: int = EXACT) -> MetricSums:
        """Return the sums over the samples of several parts with the same tasks."""
        whole = cls(parts[0].tasks, exact)
        whole.sums = _added([part.sums for part in parts])
        whole.plain_sums = _added([part.plain_sums for part in parts])
        for name in whole.scores:
            packs = [part.scores[name].packed(coarse=False) for part in parts]
            whole.scores[name] = Scores.joined(packs, exact)
        return whole

    def compute(self) -> Metrics:
        """Compute task → metric → value."""
        found: Metrics = {}
        for task in self.tasks:
            sums = self.sums[task.name].cpu()
            loss, count = sums[:2].tolist()
            found[task.name] = {"loss": _ratio(loss, count)} | task_metrics(task, sums[2:])
            if task.name in self.scores:
                found[task.name] |= _ranking_metrics(task, self.scores[task.name])
            if task.name in self.plain_sums:
                found[task.name]["log_loss"] = _ratio(*self.plain_sums[task.name].tolist())
        return found


def _added(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sum of each entry over parts with the same entries."""
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def _ranking_metrics(task: Task, scores: Scores) -> dict[str, float]:
    bins = scores.bins()
    bounds = bins.error_bounds()
    if any(bounds.values()):
        within = ", ".join(f"{name} to within {bound:.1g}" for name, bound in bounds.items())
        log.info("task %s has %d scores, counted in bins: %s", task.name, scores.count, within)
    return scores.metrics(bins)


def error_of(metric: str, value: float) -> float:
    """Convert a metric to an error: the metric itself (also that of a user), or 1 - score."""
    return value if metric in ERRORS or is_address(metric) else 1 - value


def error_scale(task: Task) -> float:
    """The divisor with which errors of tasks in different units have a mean.

    It is the scale of the task for metrics in its unit, for a table the standard deviation of the training labels;
    with several channels their root mean square. It is 1 for other metrics.
    """
    squares = [scale**2 for scale in task.scale]
    return math.sqrt(math.fsum(squares) / len(squares)) if task.metric in IN_UNITS else 1.0


def normalized_gain(
    tasks: Sequence[Task], metrics: Metrics, reference: Metrics, *, metric: str = "", form: str = "error"
) -> float:
    """Compute the mean relative gain over a reference, in per cent. Positive is better.

    The form "error" is `100 · mean_n((err_ref[n] - err[n]) / err_ref[n])`, where the error of a score is
    1 - score. It is the formula of Gao et al. 2024, of their code for CelebA, and of their table of losses against
    single-task.
    The form "score" divides the change of a score by the reference's score, `(s[n] - s_ref[n]) / s_ref[n]`. For
    errors both forms are the same. It is the formula of their Taskonomy table of evaluation metrics against naive
    MTL.

    Args:
        metric: One metric for all tasks ("loss"). The default is the headline metric of each task.
        form: One of `GAIN_FORMS`.

    Returns:
        The gain; NaN if the divisor of a task is not positive or not defined.

    Raises:
        KeyError: If a task is missing in one of the two. Values are paired by name, never by order.
        ValueError: For an unknown form.
    """
    if form not in GAIN_FORMS:
        raise ValueError(f"unknown form of the gain {form!r}, expected one of {', '.join(GAIN_FORMS)}")
    gains = []
    for task in tasks:
        name = metric or task.metric
        base, value = reference[task.name][name], metrics[task.name][name]
        gained = error_of(name, base) - error_of(name, value)
        divisor = error_of(name, base) if form == "error" else base
        gains.append(gained / divisor if divisor > 0 else math.nan)
    return 100 * sum(gains) / len(gains)


def total_error(tasks: Sequence[Task], metrics: Metrics) -> float:
    """Compute `100 · Σ_n (1 - accuracy_n)` as in the CelebA tables, each accuracy over all samples of the split.

    Raises:
        KeyError: If a task or its accuracy is missing.
    """
    return 100 * sum(1 - metrics[task.name]["accuracy"] for task in tasks)
