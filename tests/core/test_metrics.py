"""Metrics: fixed values, sums that no batch size or worker can change, gains paired by name."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmtg_core import MetricSums, Task, normalized_gain, total_error
from dmtg_core.metrics import ERRORS, error_of
from tests.core import samples
from tests.core.samples import IMAGE, MIXED

NAN = math.nan


def measure(task: Task, output, target) -> dict[str, float]:
    """Metrics of one batch."""
    sums = MetricSums([task])
    sums.update({task.name: torch.as_tensor(output)}, {task.name: torch.as_tensor(target)})
    return sums.compute()[task.name]


BINARY, CLASSES = Task("t", "binary"), Task("t", "multiclass", 3)
SEGMENTS = Task("t", "dense_classification", 3, ignore_index=255)
VALUES = Task("t", "regression", offset=(100.0,), scale=(10.0,))
NORMALS = Task("t", "dense_regression", 3, metric="within_30")


def one_hot(ids, channels: int = 3) -> torch.Tensor:
    """Logits that choose the given classes, `(B, C)` or `(B, C, H, W)`."""
    return torch.nn.functional.one_hot(torch.tensor(ids), channels).float().movedim(-1, 1)


# name → (task, output, target, metrics made by hand)
TABLE = {
    # true positives 2, false negatives 1, false positives 1, true negatives 1; the last has no label
    "binary": (
        BINARY,
        [2.0, 1.0, -1.0, 3.0, -2.0, 9.0],
        [1.0, 1.0, 1.0, 0.0, 0.0, NAN],
        {"accuracy": 3 / 5, "balanced_accuracy": (2 / 3 + 1 / 2) / 2, "f1": 2 / 3, "auroc": 3 / 6},
    ),
    "perfect binary": (
        BINARY,
        [3.0, 2.0, -3.0, -2.0],
        [1.0, 1.0, 0.0, 0.0],
        {"accuracy": 1.0, "balanced_accuracy": 1.0, "f1": 1.0, "auroc": 1.0},
    ),
    "reversed binary": (
        BINARY,
        [-3.0, -2.0, 3.0, 2.0],
        [1.0, 1.0, 0.0, 0.0],
        {"accuracy": 0.0, "balanced_accuracy": 0.0, "f1": 0.0, "auroc": 0.0},
    ),
    "ties count half": (BINARY, [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0], {"auroc": 0.5}),
    # positives at 2, 0; negatives at 2, 1, 0: of 6 pairs 2 won, 2 tied
    "some ties": (BINARY, [2.0, 0.0, 2.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0], {"auroc": 0.5}),
    "ties and wins": (BINARY, [2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], {"auroc": 3.5 / 4}),
    "one class only": (
        BINARY,
        [1.0, -1.0],
        [1.0, 1.0],
        {"accuracy": 0.5, "auroc": NAN, "balanced_accuracy": NAN, "f1": 2 / 3},
    ),
    "no positive at all": (BINARY, [-1.0, -1.0], [0.0, 0.0], {"accuracy": 1.0, "f1": NAN, "auroc": NAN}),
    "logits beyond the range": (BINARY, [99.0, math.inf, -99.0], [1.0, 1.0, 0.0], {"auroc": 1.0}),
    # class 0: 1 of 2 found, class 1: 1 of 1, class 2 absent
    "classes": (
        CLASSES,
        one_hot([0, 2, 1, 0]),
        [0, 0, 1, -1],
        {"accuracy": 2 / 3, "balanced_accuracy": (1 / 2 + 1) / 2},
    ),
    # true 0 0 1 1 (one pixel ignored), guessed 0 1 1 2: class 0: 1/2, class 1: 1/3, class 2 absent
    "segments": (
        SEGMENTS,
        one_hot([[[0, 1, 1, 2, 0]]]),
        [[[0, 0, 1, 1, 255]]],
        {"miou": (1 / 2 + 1 / 3) / 2, "accuracy": 2 / 4, "balanced_accuracy": (1 / 2 + 1 / 2) / 2},
    ),
    "perfect segments": (SEGMENTS, one_hot([[[0, 1, 2]]]), [[[0, 1, 2]]], {"miou": 1.0, "accuracy": 1.0}),
    # raw truth 110, 90, 130; raw guess 120, 90, 110: errors 10, 0, 20; squared 500 of 800 around the mean 110
    "values in raw units": (
        VALUES,
        [2.0, -1.0, 1.0, 7.0],
        [1.0, -1.0, 3.0, NAN],
        {"rmse": math.sqrt(500 / 3), "mae": 10.0, "r2": 1 - 500 / 800},
    ),
    "perfect values": (VALUES, [1.0, 2.0], [1.0, 2.0], {"rmse": 0.0, "mae": 0.0, "r2": 1.0, "loss": 0.0}),
    "the mean as a guess": (VALUES, [2.0, 2.0], [1.0, 3.0], {"r2": 0.0}),
    # raw truth (1, 10), (3, 30); errors 1, 0, 0, 20
    "values of two channels": (
        Task("t", "regression", 2, offset=(1.0, 10.0), scale=(2.0, 20.0)),
        [[0.5, 0.0], [1.0, 0.0]],
        [[0.0, 0.0], [1.0, 1.0]],
        {"rmse": math.sqrt(401 / 4), "mae": 21 / 4},
    ),
    # pixels at 0°, 90°, exactly opposite, 20°, and one without a label
    "angles": (
        NORMALS,
        torch.tensor(
            [[2.0, 0, 0], [0, 1, 0], [-1, 0, 0], [math.cos(math.pi / 9), math.sin(math.pi / 9), 0], [1, 1, 1]]
        ).T.reshape(1, 3, 1, 5),
        torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [3, 0, 0], [NAN, 0, 0]]).T.reshape(1, 3, 1, 5),
        {"within_30": 2 / 4, "mean_angle": (0 + 90 + 180 + 20) / 4},
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_metrics_at_fixed_values(case):
    task, output, target, expected = TABLE[case]
    found = measure(task, output, target)
    assert {name: found[name] for name in expected} == pytest.approx(expected, nan_ok=True, abs=2e-5)


def test_the_loss_is_the_mean_over_labels_and_not_over_batches():
    sums = MetricSums([Task("t", "regression")])
    for output, target in (([1.0, 1.0, 1.0], [0.0, NAN, NAN]), ([3.0, 3.0], [0.0, 0.0])):
        sums.update({"t": torch.tensor(output)}, {"t": torch.tensor(target)})
    assert sums.compute()["t"]["loss"] == pytest.approx((1 + 9 + 9) / 3)


@given(data=st.data(), rows=st.integers(2, 40))
def test_auroc_equals_the_share_of_pairs_in_order(data, rows):
    # multiples of a quarter lie in bins of their own, so that equal scores tie and others do not
    score = data.draw(st.lists(st.integers(-40, 40), min_size=rows, max_size=rows))
    label = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    positives = [s for s, y in zip(score, label, strict=True) if y]
    negatives = [s for s, y in zip(score, label, strict=True) if not y]
    won = sum((p > q) + 0.5 * (p == q) for p in positives for q in negatives)
    expected = won / (len(positives) * len(negatives)) if positives and negatives else NAN
    found = measure(BINARY, [s / 4 for s in score], [float(y) for y in label])["auroc"]
    assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e3])
def test_r2_of_a_constant_target_is_not_defined(value):
    assert math.isnan(measure(Task("t", "regression"), [value + 1.0] * 1000, [value] * 1000)["r2"])


@pytest.mark.parametrize("task", MIXED, ids=lambda t: t.name)
def test_every_task_reports_its_loss_and_its_headline_metric(task):
    batch = samples.batch(IMAGE, [task])
    shape = {"multiclass": (5, task.channels), "dense_classification": (5, task.channels, 16, 16)}
    output = torch.zeros(shape.get(task.kind, batch.targets[task.name].shape))
    found = measure(task, output, batch.targets[task.name])
    assert {"loss", task.metric} <= found.keys()
    assert all(math.isfinite(found[name]) for name in ("loss", task.metric))


def outputs_like(batch, tasks) -> dict[str, torch.Tensor]:
    """Random outputs for a batch."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for task in tasks:
        target = batch.targets[task.name]
        shape = (len(target), task.channels, *target.shape[1:]) if task.classes else target.shape
        found[task.name] = torch.randn(shape, generator=generator)
    return found


def pieces(tensors: dict[str, torch.Tensor], edges: list[int]) -> list[dict[str, torch.Tensor]]:
    """A batch cut at the given rows."""
    bounds = [0, *sorted(edges), None]
    return [{name: t[start:stop] for name, t in tensors.items()} for start, stop in pairwise(bounds)]


def assert_same_metrics(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9, nan_ok=True), name


ROWS = 12


@given(edges=st.lists(st.integers(1, ROWS - 1), max_size=5, unique=True), missing=st.sampled_from([0.0, 0.5, 1.0]))
def test_uneven_batches_give_the_metrics_of_the_whole(edges, missing):
    batch = samples.batch(IMAGE, MIXED, ROWS, missing=missing)
    outputs = outputs_like(batch, MIXED)
    whole, parts = MetricSums(MIXED), MetricSums(MIXED)
    whole.update(outputs, batch.targets)
    for out, target in zip(pieces(outputs, edges), pieces(batch.targets, edges), strict=True):
        parts.update(out, target)
    assert_same_metrics(parts.compute(), whole.compute())


@given(split=st.integers(1, ROWS - 1), missing=st.sampled_from([0.0, 0.5]))
def test_two_workers_give_the_metrics_of_the_whole_with_one_message(split, missing):
    batch = samples.batch(IMAGE, MIXED, ROWS, missing=missing)
    outputs = outputs_like(batch, MIXED)
    whole = MetricSums(MIXED)
    whole.update(outputs, batch.targets)
    workers = []
    for out, target in zip(pieces(outputs, [split]), pieces(batch.targets, [split]), strict=True):
        workers.append(MetricSums(MIXED))
        workers[-1].update(out, target)
    sent: list[torch.Tensor] = []
    workers[1].reduce(lambda t: sent.append(t) or t)
    assert len(sent) == 1
    workers[0].reduce(lambda t: t + sent[0])
    assert_same_metrics(workers[0].compute(), whole.compute())


# --- gains

LOSS_TASKS = [Task(name, "regression") for name in ("depth", "normal", "segmentation", "keypoints", "edges")]
SINGLE_TASK_LOSSES = (1.60e-5, 0.107, 0.0916, 1.30e-4, 1.56e-4)


@pytest.mark.parametrize(
    ("losses", "published"),
    [
        ((2.57e-2, 0.108, 0.0843, 6.87e-3, 6.88e-3), -33939),  # K3 random
        ((5.85e-3, 0.111, 0.0733, 2e-6, 8.6e-5), -7266),  # K3 HOA
        ((5.15e-3, 0.121, 0.0843, 2e-6, 8.6e-5), -6390),  # K3 TAG
        ((2.04e-4, 0.107, 0.0828, 6.39e-4, 4.08e-4), -344),  # MTG-Net
        ((1.19e-7, 0.107, 0.0665, 4.3e-5, 3.6e-7), 58.88),  # K3 DMTG
        ((1.19e-7, 0.105, 0.0646, 4.7e-5, 1.2e-5), 57.44),  # K4 DMTG
        ((1.19e-7, 0.105, 0.0634, 1e-6, 4.2e-7), 66.36),  # K5 DMTG
    ],
)
def test_gain_of_loss_equals_the_published_taskonomy_table(losses, published):
    """Table of Gao et al. for Taskonomy-5 against single-task; its losses have three digits."""
    metrics, reference = (
        {task.name: {"loss": loss} for task, loss in zip(LOSS_TASKS, values, strict=True)}
        for values in (losses, SINGLE_TASK_LOSSES)
    )
    found = normalized_gain(LOSS_TASKS, metrics, reference, metric="loss")
    assert found == pytest.approx(published, rel=0.005)


EVALUATED = [
    Task("depth", "dense_regression"),
    Task("normals", "dense_regression", 3, metric="within_30"),
    Task("segments", "dense_classification", 18),
    Task("keypoints", "binary", metric="f1"),
    Task("edges", "binary", metric="f1"),
]


def evaluated(depth: float, normals: float, miou: float, keypoints: float, edges: float):
    """Metrics as the published table prints them, in per cent but for depth."""
    return {
        "depth": {"rmse": depth}, "normals": {"within_30": normals / 100}, "segments": {"miou": miou / 100},
        "keypoints": {"f1": keypoints / 100}, "edges": {"f1": edges / 100},
    }  # fmt: skip


def test_gain_of_evaluation_errors_takes_a_score_as_one_minus_itself():
    """K3 DMTG against naive MTL on Taskonomy-5.

    By hand, with err = 1 - score: depth .99999, normals .20/15.68, segments .72/51.79, keypoints 10.26/23.92,
    edges 11.38/23.44. The table prints 26.02 because it divides the change of a score by the score and not by
    its error.
    """
    gain = normalized_gain(
        EVALUATED, evaluated(1.19e-7, 84.52, 48.93, 86.34, 87.94), evaluated(8.67e-3, 84.32, 48.21, 76.08, 76.56)
    )
    parts = (1 - 1.19e-7 / 8.67e-3, 0.20 / 15.68, 0.72 / 51.79, 10.26 / 23.92, 11.38 / 23.44)
    assert gain == pytest.approx(100 * sum(parts) / 5)
    assert gain == pytest.approx(38.82, abs=0.01)


def test_values_are_paired_by_name_whatever_their_order():
    tasks = [Task("a", "binary"), Task("b", "binary")]
    reference = {"a": {"accuracy": 0.8}, "b": {"accuracy": 0.5}}
    metrics = {"b": {"accuracy": 0.6}, "a": {"accuracy": 0.9}}
    # a: (.2 − .1) / .2, b: (.5 − .4) / .5
    assert normalized_gain(tasks, metrics, reference) == pytest.approx(100 * (0.5 + 0.2) / 2)
    assert normalized_gain(tasks[::-1], dict(reversed(metrics.items())), reference) == pytest.approx(35)
    assert total_error(tasks, metrics) == pytest.approx(100 * (0.1 + 0.4))


@pytest.mark.parametrize("side", ["metrics", "reference"])
def test_a_task_that_is_missing_is_an_error(side):
    tasks = [Task("a", "binary"), Task("b", "binary")]
    whole, part = ({name: {"accuracy": 0.5} for name in names} for names in ("ab", "a"))
    with pytest.raises(KeyError, match="b"):
        normalized_gain(tasks, *((part, whole) if side == "metrics" else (whole, part)))
    with pytest.raises(KeyError, match="b"):
        total_error(tasks, part)


def test_gain_against_a_reference_without_error_is_not_defined():
    task = Task("a", "binary")
    assert math.isnan(normalized_gain([task], {"a": {"accuracy": 0.9}}, {"a": {"accuracy": 1.0}}))


@given(st.lists(st.floats(0.01, 0.99), min_size=3, max_size=3))
def test_gain_over_itself_is_zero_and_over_perfection_a_hundred(scores):
    tasks = [Task(name, "binary") for name in "abc"]
    metrics = {name: {"accuracy": s} for name, s in zip("abc", scores, strict=True)}
    assert normalized_gain(tasks, metrics, metrics) == 0
    assert normalized_gain(tasks, {n: {"accuracy": 1.0} for n in "abc"}, metrics) == pytest.approx(100)


@pytest.mark.parametrize(
    ("metric", "value", "error"),
    [("accuracy", 0.8, 0.2), ("miou", 0.3, 0.7), ("rmse", 4.0, 4.0), ("mae", 4.0, 4.0), ("mean_angle", 12.0, 12.0),
     ("loss", 0.1, 0.1), ("r2", 0.4, 0.6), ("within_30", 0.9, 0.1), ("auroc", 0.75, 0.25), ("f1", 1.0, 0.0)],
)  # fmt: skip
def test_errors_stay_and_scores_turn_around(metric, value, error):
    assert error_of(metric, value) == pytest.approx(error)


def test_every_metric_of_a_task_is_known_as_error_or_score():
    from dmtg_core.tasks import METRICS

    scores = {"accuracy", "balanced_accuracy", "f1", "auroc", "r2", "miou", "within_30"}
    assert {name for names in METRICS.values() for name in names} | {"loss"} == scores | set(ERRORS)
