"""Ranking metrics of more scores than are stored individually are within their error bounds."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from dmtg_core import MetricSums, Task
from dmtg_core.training.ranking import BINS, Bins, Scores, joined_bins, ordered
from tests.dmtg_core.parallel import in_threads
from tests.dmtg_core.training.test_against_sklearn import scored


@given(case=scored(), bins=st.sampled_from([1, 2, 7, 50, 1000]))
def test_bins_have_at_most_their_share_and_metrics_are_within_their_bounds(case, bins):
    score, label = case
    exact = Bins.of(score, label)
    coarse = exact.coarser(bins)
    assert coarse.positive.sum() == label.sum()
    assert coarse.negative.sum() == (~label).sum()
    assert (coarse.start[1:] > coarse.end[:-1]).all()
    wide = coarse.end > coarse.start
    assert (coarse.positive[wide] <= label.sum() / bins).all()
    assert (coarse.negative[wide] <= (~label).sum() / bins).all()
    assert set(coarse.error_bounds()) == {"auroc", "average_precision"}
    bound = coarse.error_bounds()
    assert bound["auroc"] <= 1 / (2 * bins)
    assert abs(coarse.auroc() - exact.auroc()) <= bound["auroc"] + 1e-12
    assert abs(coarse.average_precision() - exact.average_precision()) <= bound["average_precision"] + 1e-12
    assert exact.error_bounds() == {"auroc": 0.0, "average_precision": 0.0}


@given(case=scored(), workers=st.integers(2, 5), bins=st.sampled_from([2, 20, 200]))
def test_joined_bins_of_workers_lose_no_label_and_are_within_their_bounds(case, workers, bins):
    score, label = case
    exact = Bins.of(score, label)
    parts = [Bins.of(score[i::workers], label[i::workers]) for i in range(workers)]
    assert np.array_equal(joined_bins(parts)[0].start, exact.start)
    assert joined_bins(parts)[0].auroc() == exact.auroc()
    coarse, place = joined_bins([part.coarser(bins) for part in parts])
    assert (coarse.positive.sum(), coarse.negative.sum()) == (label.sum(), (~label).sum())
    assert (coarse.start[1:] > coarse.end[:-1]).all()
    assert set(place.tolist()) == set(range(len(coarse)))
    assert abs(coarse.auroc() - exact.auroc()) <= coarse.error_bounds()["auroc"] + 1e-12
    error = abs(coarse.average_precision() - exact.average_precision())
    assert error <= coarse.error_bounds()["average_precision"] + 1e-12


@given(st.lists(st.floats(allow_nan=False, allow_subnormal=True), min_size=2, max_size=50))
def test_ordered_numbers_keep_order_and_ties(values):
    scores = np.array(values)
    key = ordered(scores)
    above = (scores[:, None] > scores).astype(int) - (scores[:, None] < scores)
    assert np.array_equal(above, (key[:, None] > key).astype(int) - (key[:, None] < key))


ROWS, KEPT = 400_000, 60_000


@pytest.mark.parametrize("workers", [1, 2])
def test_more_scores_than_are_stored_individually(workers, caplog):
    rng = np.random.default_rng(0)
    label = rng.random(ROWS) < 0.4
    score = (0.01 * (rng.normal(size=ROWS) + label) - 3).astype(np.float32)
    outputs, targets = torch.from_numpy(score), torch.from_numpy(label.astype(np.float32))

    def measured(context) -> tuple[dict, int, dict]:
        sums = MetricSums([Task("t", "binary")], exact=KEPT)
        for start in range(context.rank * 1000, ROWS, context.world_size * 1000):
            rows = slice(start, start + 1000)
            sums.update({"t": outputs[rows]}, {"t": targets[rows]})
            assert sums.scores["t"].held <= KEPT
        sums.reduce(context)
        bins = sums.scores["t"].bins()
        return sums.compute()["t"], len(bins), bins.error_bounds()

    with caplog.at_level(logging.INFO):
        (found, count, bound), *others = in_threads(workers, measured)
    assert [other[0] for other in others] == [found] * (workers - 1)
    assert count < ROWS / 2
    assert 0 < bound["auroc"] <= 1.5 / (2 * BINS)  # the bins of two workers hold twice the share of one
    assert abs(found["auroc"] - sk.roc_auc_score(label, score)) <= bound["auroc"]
    assert abs(found["average_precision"] - sk.average_precision_score(label, score)) <= bound["average_precision"]
    assert bound["average_precision"] < 1e-3
    assert "task t has 400000 scores, counted in bins: auroc to within" in caplog.text


def test_scores_of_no_sample():
    scores = Scores()
    assert scores.count == 0
    assert np.isnan(list(scores.metrics().values())).all()
    packed = scores.packed(coarse=False)
    assert Scores.joined([packed, packed]).count == 0
