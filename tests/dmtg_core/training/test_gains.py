"""Gains: values of the published tables, paired by name whatever their order."""

import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmtg_core import MetricSums, Task, normalized_gain, total_error
from dmtg_core.training.metrics import ERRORS, GAIN_FORMS, error_of

NAN = math.nan

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
    """Largest rounding error of a printed figure."""
    return Decimal(5).scaleb(int(Decimal(printed).as_tuple().exponent) - 1)


def as_metrics(tasks, row: str, metric: str, better: int):
    """The metrics of a printed row, each half a digit better (1), half a digit worse (-1), or unchanged (0)."""
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
def test_both_forms_reproduce_the_published_table_of_losses(method, form):
    row, printed = LOSSES[method]
    bounds = gain_bounds(LOSS_TASKS, row, SINGLE_TASK_LOSSES, metric="loss", form=form)
    assert fits(printed, bounds)
    assert bounds[1] - bounds[0] < max(1.2, 0.02 * abs(float(printed)))  # a narrow range


@pytest.mark.parametrize("method", EVALUATIONS)
def test_the_score_form_reproduces_the_published_table_of_evaluation_metrics(method):
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
def test_errors_are_unchanged_and_scores_are_inverted(metric, value, error):
    assert error_of(metric, value) == pytest.approx(error)


def test_every_metric_of_a_task_is_known_as_error_or_score():
    from dmtg_core.tasks import METRICS

    scores = {
        "accuracy",
        "balanced_accuracy",
        "f1",
        "auroc",
        "average_precision",
        "r2",
        "miou",
        "within_11",
        "within_22",
        "within_30",
    }
    assert {name for names in METRICS.values() for name in names} | {"loss", "log_loss"} == scores | set(ERRORS)
