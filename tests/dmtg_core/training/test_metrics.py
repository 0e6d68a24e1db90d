"""Metrics: fixed values, and sums that do not depend on batch sizes or workers."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmtg_core import MetricSums, Task
from tests.dmtg_core import samples
from tests.dmtg_core.parallel import in_threads
from tests.dmtg_core.samples import IMAGE

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
# network units (raw - 50) / 100: positive from 0.5 on
KEYPOINTS = Task("t", "dense_regression", offset=(50.0,), scale=(100.0,), threshold=100.0, metric="f1")
# tasks of every kind, the last of them with a threshold
MIXED = (*samples.MIXED[:-1], replace(samples.MIXED[-1], threshold=900.0))


def directions(*degrees: float) -> torch.Tensor:
    """Unit vectors so many degrees off the first axis, `(1, 3, 1, W)`."""
    turn = torch.tensor(degrees).deg2rad()
    return torch.stack([turn.cos(), turn.sin(), torch.zeros_like(turn)]).reshape(1, 3, 1, -1)


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
    "infinite logits": (
        BINARY,
        [99.0, math.inf, -99.0],
        [1.0, 1.0, 0.0],
        {"auroc": 1.0, "average_precision": 1.0},
    ),
    "a logit that is no number": (
        BINARY,
        [1.0, NAN, 0.0],
        [1.0, 1.0, 0.0],
        {"auroc": NAN, "average_precision": NAN},
    ),
    "a logit that is no number and has no label": (BINARY, [1.0, NAN, 0.0], [1.0, NAN, 0.0], {"auroc": 1.0}),
    "the two zeros tie": (BINARY, [0.0, -0.0], [1.0, 0.0], {"auroc": 0.5, "average_precision": 0.5}),
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
        {"within_30": 2 / 4, "within_22": 2 / 4, "within_11": 1 / 4, "mean_angle": (0 + 90 + 180 + 20) / 4},
    ),
    "all angles at each limit": (
        replace(NORMALS, metric="mean_angle"),
        directions(5, 11.2, 11.3, 22.4, 22.6, 29.9, 30.1, 90),
        directions(0).expand(1, 3, 1, 8),
        {"within_11": 2 / 8, "within_22": 4 / 8, "within_30": 6 / 8, "mean_angle": 222.5 / 8},
    ),
    # raw truth 150, 150, 50, 50, 100; raw guess 200, 50, 150, 0, 100; and two pixels without a label
    "keypoints": (
        KEYPOINTS,
        [[[[1.5, 0.0, 1.0, -0.5, 0.5, 9.0, -9.0]]]],
        [[[[1.0, 1.0, 0.0, 0.0, 0.5, NAN, NAN]]]],
        {"f1": 2 * 2 / (2 * 2 + 1 + 1), "rmse": math.sqrt((50**2 + 100**2 + 100**2 + 50**2) / 5)},
    ),
    "f1 beside another headline metric": (
        replace(KEYPOINTS, metric="r2"),
        [[[[1.0, 1.0]]]],
        [[[[1.0, 0.0]]]],
        {"f1": 2 / 3, "r2": -1.0},
    ),
    "an image without a positive takes no part of its own": (
        KEYPOINTS,
        [[[[1.0, 0.0]]], [[[0.0, 0.0]]]],
        [[[[1.0, 0.0]]], [[[0.0, 0.0]]]],
        {"f1": 1.0},
    ),
    "no positive in target and output": (KEYPOINTS, [[[[0.0, 0.1]]]], [[[[0.0, 0.0]]]], {"f1": NAN}),
    "no positive in the target": (KEYPOINTS, [[[[1.0, 0.1]]]], [[[[0.0, 0.0]]]], {"f1": 0.0}),
    "no label at all": (KEYPOINTS, [[[[1.0, 0.1]]]], [[[[NAN, NAN]]]], {"f1": NAN, "rmse": NAN}),
    # positive from 10 on: network units 0 of the first channel, -2 of the second; the values of both count
    "a threshold over channels of their own scale": (
        Task("t", "dense_regression", 2, offset=(10.0, 20.0), scale=(1.0, 5.0), threshold=10.0),
        [[[[0.0, -1.0]], [[-2.0, -2.0]]]],
        [[[[0.0, 1.0]], [[-3.0, -1.0]]]],
        {"f1": 2 * 2 / (2 * 2 + 1 + 1)},
    ),
    # the first pixel is 0° off and positive in its first channel, the second 90° and positive in its second
    "angles and f1 together": (
        replace(NORMALS, threshold=0.5),
        directions(0, 0),
        directions(0, 90),
        {"within_11": 1 / 2, "mean_angle": 45.0, "f1": 2 * 1 / (2 * 1 + 1 + 1)},
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


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e3])
def test_r2_of_a_constant_target_is_not_defined(value):
    assert math.isnan(measure(Task("t", "regression"), [value + 1.0] * 1000, [value] * 1000)["r2"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metric": "f1"}, r"'t': metric f1 needs a threshold"),
        ({"threshold": math.inf}, r"'t': threshold must be a finite raw value, got inf"),
        ({"kind": "regression", "threshold": 1.0}, r"'t': threshold is for dense_regression, not for regression"),
        (
            {"kind": "binary", "metric": "f1", "threshold": 0.0},
            r"threshold is for dense_regression, not for binary",
        ),
        ({"channels": 2, "metric": "within_11"}, r"metric within_11 needs 3 channels, got 2"),
    ],
)
def test_a_threshold_or_a_metric_that_does_not_fit_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Task("t", **{"kind": "dense_regression"} | values)


@given(threshold=st.integers(1, 2**16 - 2), offset=st.floats(-2000, 2000), scale=st.floats(0.01, 3000))
def test_a_stored_value_is_positive_exactly_from_the_threshold_on(threshold, offset, scale):
    task = Task("t", "dense_regression", offset=(offset,), scale=(scale,), threshold=threshold)
    around = torch.tensor([[[threshold - 1, threshold, threshold + 1]]], dtype=torch.int32)
    target = task.encode(around)
    # all guessed positive: one of the three is a false positive; the value itself as a guess: none is
    assert measure(task, torch.full_like(target, 1e9), target)["f1"] == pytest.approx(4 / 5)
    assert measure(task, target, target)["f1"] == 1.0


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
def test_uneven_batches_have_the_metrics_of_the_whole(edges, missing):
    batch = samples.batch(IMAGE, MIXED, ROWS, missing=missing)
    outputs = outputs_like(batch, MIXED)
    whole, parts = MetricSums(MIXED), MetricSums(MIXED)
    whole.update(outputs, batch.targets)
    for out, target in zip(pieces(outputs, edges), pieces(batch.targets, edges), strict=True):
        parts.update(out, target)
    assert_same_metrics(parts.compute(), whole.compute())


@given(split=st.integers(1, ROWS - 1), missing=st.sampled_from([0.0, 0.5]))
def test_two_workers_have_the_metrics_of_the_whole(split, missing):
    batch = samples.batch(IMAGE, MIXED, ROWS, missing=missing)
    outputs = outputs_like(batch, MIXED)
    whole = MetricSums(MIXED)
    whole.update(outputs, batch.targets)
    shares = list(zip(pieces(outputs, [split]), pieces(batch.targets, [split]), strict=True))

    def reduced(context) -> tuple[dict, int]:
        sums = MetricSums(MIXED)
        sums.update(*shares[context.rank])
        sums.reduce(context)
        return sums.compute(), context.messages

    binary = sum(task.kind == "binary" for task in MIXED)
    for metrics, messages in in_threads(2, reduced):
        assert_same_metrics(metrics, whole.compute())
        assert messages == 1 + 2 * binary
