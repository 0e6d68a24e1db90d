"""Metrics and losses equal those of scikit-learn and scipy for any scores, batches and workers."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn import metrics as sk

from dmtg_core import Grouping, MetricSums, Task
from dmtg_core.evaluation.bootstrap import BlockSums
from tests.dmtg_core.parallel import in_threads

FLAG = Task("t", "binary")
CLOSE = 1e-9


@st.composite
def scored(draw, most: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of any spread, shift, share of positives and number of ties; both labels occur."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = draw(st.integers(2, most))
    label = rng.random(rows) < draw(st.sampled_from([0.002, 0.05, 0.5, 0.9, 0.999]))
    label[:2] = True, False
    spread, shift = 10.0 ** draw(st.integers(-8, 4)), draw(st.sampled_from([0.0, -3.0, 0.1, 40.0, -1e4]))
    score = shift + spread * (rng.normal(size=rows) + draw(st.sampled_from([-1.0, 0.0, 0.5, 3.0])) * label)
    if draw(st.booleans()):
        score = shift + spread * np.round((score - shift) / spread * draw(st.sampled_from([1, 4, 100])))
    return score.astype(draw(st.sampled_from([np.float32, np.float64]))), label


def tensors(score: np.ndarray, label: np.ndarray) -> tuple[dict, dict]:
    return {"t": torch.from_numpy(score)}, {"t": torch.from_numpy(label.astype(np.float32))}


def cut(values: dict, start: int, stop: int) -> dict:
    return {name: value[start:stop] for name, value in values.items()}


def measure(task: Task, output: np.ndarray, target: np.ndarray) -> dict[str, float]:
    sums = MetricSums([task])
    sums.update({"t": torch.from_numpy(output)}, {"t": torch.from_numpy(target)})
    return sums.compute()["t"]


@given(case=scored(), batch=st.integers(1, 1000), workers=st.integers(1, 3))
def test_auroc_and_average_precision_of_any_scores_batches_and_workers(case, batch, workers):
    score, label = case
    outputs, targets = tensors(score, label)
    edges = [i * len(score) // workers for i in range(workers + 1)]
    if len(set(edges)) <= workers:
        edges, workers = [0, len(score)], 1

    def measured(context) -> dict[str, float]:
        sums = MetricSums([FLAG])
        first, last = edges[context.rank : context.rank + 2]
        for start in range(first, last, batch):
            stop = min(start + batch, last)
            sums.update(cut(outputs, start, stop), cut(targets, start, stop))
        sums.reduce(context)
        return sums.compute()["t"]

    for found in in_threads(workers, measured):
        assert found["auroc"] == pytest.approx(sk.roc_auc_score(label, score), abs=CLOSE)
        assert found["average_precision"] == pytest.approx(sk.average_precision_score(label, score), abs=CLOSE)


@given(case=scored(), missing=st.floats(0, 0.9), seed=st.integers(0, 2**32))
def test_samples_without_a_label_are_omitted(case, missing, seed):
    score, label = case
    known = np.random.default_rng(seed).random(len(score)) >= missing
    known[:2] = True
    found = measure(FLAG, score, np.where(known, label, np.nan).astype(np.float32))
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(label[known], score[known]), abs=CLOSE)
    expected = sk.average_precision_score(label[known], score[known])
    assert found["average_precision"] == pytest.approx(expected, abs=CLOSE)


@given(case=scored())
def test_binary_metrics_and_loss(case):
    score, label = case
    found, guess = measure(FLAG, score, label.astype(np.float32)), score > 0
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(label, guess), abs=CLOSE)
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(label, guess), abs=CLOSE)
    assert found["f1"] == pytest.approx(sk.f1_score(label, guess), abs=CLOSE)
    if np.abs(score).max() < 30:  # for larger scores scikit-learn's probabilities are rounded to 0 and 1
        chance = 1 / (1 + np.exp(-score.astype(np.float64)))
        assert found["loss"] == pytest.approx(
            sk.log_loss(label, chance, labels=[False, True]), rel=1e-8, abs=CLOSE
        )


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(2, 500),
    classes=st.sampled_from([2, 3, 10, 11, 100, 255, 256, 300]),
    spread=st.sampled_from([1e-3, 1.0, 10.0]),
)
def test_class_metrics_and_loss(seed, rows, classes, spread):
    rng = np.random.default_rng(seed)
    logit = (spread * rng.normal(size=(rows, classes))).astype(np.float32)
    truth = rng.integers(0, classes, rows)
    guess = logit.argmax(1)
    for kind, shape in (("multiclass", ()), ("dense_classification", (1, 1))):
        task = Task("t", kind, classes)
        found = measure(task, logit.reshape(rows, classes, *shape), truth.reshape(rows, *shape))
        present = np.unique(truth)
        recall = sk.recall_score(truth, guess, labels=present, average="macro", zero_division=0)
        assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, guess), abs=CLOSE)
        assert found["balanced_accuracy"] == pytest.approx(recall, abs=CLOSE)
        expected = -log_softmax(logit.astype(np.float64), axis=1)[np.arange(rows), truth].mean()
        assert found["loss"] == pytest.approx(expected, rel=CLOSE, abs=CLOSE)
        if task.dense:
            iou = sk.jaccard_score(truth, guess, labels=present, average="macro", zero_division=0)
            assert found["miou"] == pytest.approx(iou, abs=CLOSE)


def test_ten_thousand_classes_need_three_counts_each():
    task, rng = Task("t", "multiclass", 10_000), np.random.default_rng(0)
    truth = rng.integers(0, 10_000, 200)
    logit = rng.normal(size=(200, 10_000)).astype(np.float32)
    logit[np.arange(200), truth] += 3
    sums = MetricSums([task])
    sums.update({"t": torch.from_numpy(logit)}, {"t": torch.from_numpy(truth)})
    assert len(sums.sums["t"]) == 2 + 3 * 10_000
    assert sums.compute()["t"]["accuracy"] == pytest.approx(sk.accuracy_score(truth, logit.argmax(1)), abs=CLOSE)


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(2, 1000),
    channels=st.integers(1, 3),
    spread=st.sampled_from([1e-3, 1.0, 1e4]),
    shift=st.sampled_from([0.0, 5.0, -1e5]),
    loss=st.sampled_from(["mse", "l1", "smooth_l1"]),
)
def test_value_metrics_and_loss_in_raw_units(seed, rows, channels, spread, shift, loss):
    rng = np.random.default_rng(seed)
    task = Task("t", "regression", channels, loss=loss, offset=(shift,) * channels, scale=(spread,) * channels)
    truth, guess = rng.normal(size=(2, rows, channels)[: 2 + (channels > 1)]).astype(np.float32)
    found = measure(task, guess, truth)
    raw_truth, raw_guess = (shift + spread * values.astype(np.float64).ravel() for values in (truth, guess))
    assert found["rmse"] == pytest.approx(sk.root_mean_squared_error(raw_truth, raw_guess), rel=CLOSE)
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(raw_truth, raw_guess), rel=CLOSE)
    assert found["r2"] == pytest.approx(sk.r2_score(raw_truth, raw_guess), rel=1e-7 if shift else CLOSE)
    reference = {"mse": torch.nn.MSELoss, "l1": torch.nn.L1Loss, "smooth_l1": torch.nn.SmoothL1Loss}[loss]()
    expected = reference(torch.from_numpy(guess).double(), torch.from_numpy(truth).double())
    assert found["loss"] == pytest.approx(float(expected), rel=CLOSE)


@given(shift=st.sampled_from([10.0, 1e3, 1e5]), seed=st.integers(0, 2**32))
def test_r2_of_values_far_from_zero_keeps_its_digits(shift, seed):
    raw = (shift + np.random.default_rng(seed).normal(size=500)).astype(np.float32)
    guess = (raw + np.float32(0.5)).astype(np.float32)
    task = Task("t", "regression", offset=(float(raw.astype(np.float64).mean()),))
    net_truth, net_guess = ((v.astype(np.float64) - task.offset[0]) for v in (raw, guess))
    expected = sk.r2_score(raw.astype(np.float64), guess.astype(np.float64))
    assert measure(task, net_guess, net_truth)["r2"] == pytest.approx(expected, rel=CLOSE)


@given(data=st.data(), tasks=st.integers(2, 120))
def test_the_adjusted_rand_index(data, tasks):
    names = [f"task {n}" for n in range(tasks)]
    groups = st.lists(st.integers(0, data.draw(st.integers(0, 30))), min_size=tasks, max_size=tasks)
    one, other = data.draw(groups), data.draw(groups)
    found = Grouping.from_assignment(names, one).adjusted_rand_index(Grouping.from_assignment(names, other))
    assert found == pytest.approx(sk.adjusted_rand_score(one, other), abs=CLOSE)


@settings(max_examples=25)
@given(case=scored(400), blocks=st.integers(2, 60), metric=st.sampled_from(["auroc", "average_precision"]))
def test_resamples_have_the_metric_of_the_samples_in_them(case, blocks, metric):
    score, label = case
    task = Task("t", "binary", metric=metric)
    sums = BlockSums([task], len(score), blocks)
    outputs, targets = tensors(score, label)
    for start in range(0, len(score), 37):
        sums.update(cut(outputs, start, start + 37), cut(targets, start, start + 37))
    held = len(sums.blocks)
    counts = torch.from_numpy(np.random.default_rng(0).multinomial(held, [1 / held] * held, 5)).double()
    reference = {"auroc": sk.roc_auc_score, "average_precision": sk.average_precision_score}[metric]
    for error, count in zip(sums.resampled(task, counts), counts.int().tolist(), strict=True):
        pieces = [
            slice(*edge) for edge, times in zip(pairwise(sums.edges), count, strict=True) for _ in range(times)
        ]
        drawn, truth = (np.concatenate([values[piece] for piece in pieces]) for values in (score, label))
        if truth.all() or not truth.any():
            assert math.isnan(error) or metric == "average_precision"
        else:
            assert 1 - error == pytest.approx(reference(truth, drawn), abs=CLOSE)
    assert sums.metrics()["t"][metric] == pytest.approx(reference(label, score), abs=CLOSE)
