"""Metrics: fixed values, sums that no batch size or worker can change, gains paired by name."""

import math
from dataclasses import replace
from decimal import Decimal
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmtg_core import MetricSums, Task, normalized_gain, total_error
from dmtg_core.metrics import ERRORS, GAIN_FORMS, error_of
from tests.core import samples
from tests.core.samples import IMAGE

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
EVALUATED = [
    Task("depth", "dense_regression"),
    Task("normal", "dense_regression", 3, metric="within_30"),
    Task("segmentation", "dense_classification", 18),
    Task("keypoints", "dense_regression", metric="f1", threshold=100.0),
    Task("edges", "dense_regression", metric="f1", threshold=1000.0),
]

# Gao et al. 2024, Taskonomy-5, as printed: losses and their gain over single-task
SINGLE_TASK_LOSSES = "1.60e-5 .107 .0916 1.30e-4 1.56e-4"
LOSSES = {
    "K3 random": ("2.57e-2 .108 .0843 6.87e-3 6.88e-3", "-33939"),
    "K3 HOA": ("5.85e-3 .111 .0733 2e-6 8.6e-5", "-7266"),
    "K3 TAG": ("5.15e-3 .121 .0843 2e-6 8.6e-5", "-6390"),
    "MTG-Net": ("2.04e-4 .107 .0828 6.39e-4 4.08e-4", "-344"),
    "K3 DMTG": ("1.19e-7 .107 .0665 4.3e-5 3.6e-7", "58.88"),
    "K4 DMTG": ("1.19e-7 .105 .0646 4.7e-5 1.2e-5", "57.44"),
    "K5 DMTG": ("1.19e-7 .105 .0634 1e-6 4.2e-7", "66.36"),
}
# the same for evaluation metrics, all but depth in per cent, and their gain over naive MTL; for K4 and K5 no depth
# is printed, and the one of their losses stands here: it is 0 beside that of naive MTL
NAIVE_METRICS = "8.67e-3 84.32 48.21 76.08 76.56"
EVALUATIONS = {
    "single-task": ("1.59e-5 84.28 37.88 85.86 86.75", "20.90"),
    "K3 random": ("2.57e-2 84.35 42.84 78.71 79.71", "-39.88"),
    "K3 HOA": ("5.85e-3 83.56 47.25 86.86 87.07", "11.50"),
    "K3 TAG": ("5.15e-3 82.00 42.84 86.86 87.07", "10.92"),
    "K3 MTG-Net": ("2.04e-4 84.32 48.21 84.47 85.98", "24.20"),
    "K3 DMTG": ("1.19e-7 84.52 48.93 86.34 87.94", "26.02"),
    "K4 DMTG": ("1.19e-7 84.71 49.69 86.31 87.65", "26.30"),
    "K5 DMTG": ("1.19e-7 84.40 49.85 86.90 87.94", "26.52"),
}


def half_digit(printed: str) -> Decimal:
    """How far a figure can be from what was printed of it."""
    return Decimal(5).scaleb(int(Decimal(printed).as_tuple().exponent) - 1)


def as_metrics(tasks, row: str, metric: str, better: int):
    """The metrics of a printed row, each half a digit better (1) or worse (-1) than it says, or as it says (0)."""
    found = {}
    for task, printed in zip(tasks, row.split(), strict=True):
        name = metric or task.metric
        up = -better if name in ERRORS else better
        value = Decimal(printed) + up * half_digit(printed)
        found[task.name] = {name: float(value if name in ERRORS else value / 100)}
    return found


def gain_bounds(tasks, row: str, reference: str, *, metric: str = "", form: str) -> tuple[float, float]:
    """The least and the largest gain that fit the printed figures."""
    return tuple(
        normalized_gain(
            tasks,
            as_metrics(tasks, row, metric, better),
            as_metrics(tasks, reference, metric, -better),
            metric=metric,
            form=form,
        )
        for better in (-1, 1)
    )


def fits(printed: str, bounds: tuple[float, float]) -> bool:
    """Whether a printed gain is one of a range of gains, rounded."""
    half = float(half_digit(printed))
    return bounds[0] - half <= float(printed) <= bounds[1] + half


@pytest.mark.parametrize("form", GAIN_FORMS)
@pytest.mark.parametrize("method", LOSSES)
def test_either_form_gives_every_gain_of_the_published_table_of_losses(method, form):
    row, printed = LOSSES[method]
    bounds = gain_bounds(LOSS_TASKS, row, SINGLE_TASK_LOSSES, metric="loss", form=form)
    assert fits(printed, bounds)
    assert bounds[1] - bounds[0] < max(1.2, 0.02 * abs(float(printed)))  # narrow enough to say something


@pytest.mark.parametrize("method", EVALUATIONS)
def test_the_score_form_gives_every_gain_of_the_published_table_of_evaluation_metrics(method):
    row, printed = EVALUATIONS[method]
    bounds = gain_bounds(EVALUATED, row, NAIVE_METRICS, form="score")
    assert fits(printed, bounds)
    assert bounds[1] - bounds[0] < 0.4
    assert not fits(printed, gain_bounds(EVALUATED, row, NAIVE_METRICS, form="error"))


def test_the_forms_divide_a_score_by_the_error_or_by_the_score_of_the_reference():
    """K3 DMTG against naive MTL on Taskonomy-5, by hand."""
    metrics, reference = (as_metrics(EVALUATED, r, "", 0) for r in (EVALUATIONS["K3 DMTG"][0], NAIVE_METRICS))
    depth = 1 - 1.19e-7 / 8.67e-3
    by_error = (depth, 0.20 / 15.68, 0.72 / 51.79, 10.26 / 23.92, 11.38 / 23.44)
    by_score = (depth, 0.20 / 84.32, 0.72 / 48.21, 10.26 / 76.08, 11.38 / 76.56)
    assert normalized_gain(EVALUATED, metrics, reference) == pytest.approx(100 * sum(by_error) / 5)
    assert normalized_gain(EVALUATED, metrics, reference, form="score") == pytest.approx(100 * sum(by_score) / 5)


def test_an_unknown_form_of_the_gain_is_refused():
    with pytest.raises(ValueError, match="unknown form of the gain 'ratio', expected one of error, score"):
        normalized_gain([], {}, {}, form="ratio")


@pytest.mark.parametrize("reference", [0.0, -0.5, NAN])
def test_the_score_form_over_a_score_that_is_not_positive_is_not_defined(reference):
    task = Task("a", "regression", metric="r2")
    assert math.isnan(normalized_gain([task], {"a": {"r2": 0.5}}, {"a": {"r2": reference}}, form="score"))


@given(data=st.data(), rows=st.integers(1, 20), count=st.integers(1, 9))
def test_total_error_is_the_number_of_tasks_less_the_sum_of_their_accuracies(data, rows, count):
    """On CelebA, as Gao et al. 2024 count it: right answers over samples, for each attribute, in per cent."""
    tasks = [Task(f"attribute_{n}", "binary") for n in range(count)]
    flags = st.lists(st.booleans(), min_size=rows, max_size=rows)
    truth, guess = ({t.name: torch.tensor(data.draw(flags)) for t in tasks} for _ in range(2))
    sums = MetricSums(tasks)
    sums.update({k: g.float() - 0.5 for k, g in guess.items()}, {k: t.float() for k, t in truth.items()})
    right = sum(int((truth[t.name] == guess[t.name]).sum()) for t in tasks)
    assert total_error(tasks, sums.compute()) == pytest.approx(100 * (count - right / rows))


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
     ("loss", 0.1, 0.1), ("r2", 0.4, 0.6), ("within_30", 0.9, 0.1), ("within_11", 0.3, 0.7),
     ("auroc", 0.75, 0.25), ("f1", 1.0, 0.0)],
)  # fmt: skip
def test_errors_stay_and_scores_turn_around(metric, value, error):
    assert error_of(metric, value) == pytest.approx(error)


def test_every_metric_of_a_task_is_known_as_error_or_score():
    from dmtg_core.tasks import METRICS

    scores = {"accuracy", "balanced_accuracy", "f1", "auroc", "r2", "miou", "within_11", "within_22", "within_30"}
    assert {name for names in METRICS.values() for name in names} | {"loss"} == scores | set(ERRORS)
