"""Asynchronous successive halving of the embedded executor, against the scheduler of Ray Tune."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import ASHAScheduler

from pipelines.sweep.halving import WORST, Rungs


@given(
    seed=st.integers(0, 2**32 - 1), trials=st.integers(1, 120), grace=st.integers(1, 12), more=st.integers(0, 300),
    reduction=st.sampled_from([1.5, 2, 3, 4]), ties=st.booleans(),
)  # fmt: skip
def test_decisions_are_those_of_ray_tune(
    seed: int, trials: int, grace: int, more: int, reduction: float, ties: bool
) -> None:
    rng, last = np.random.default_rng(seed), grace + more
    ours = Rungs(grace, last, reduction)
    theirs = ASHAScheduler(
        time_attr="epoch", metric="score", mode="min", max_t=last, grace_period=grace, reduction_factor=reduction,
        stop_last_trials=False,
    )  # fmt: skip
    running = {f"trial{i}": 0 for i in range(trials)}
    for name in running:
        theirs.on_trial_add(None, SimpleNamespace(trial_id=name))
    for _ in range(600):
        if not running:
            break
        name = str(rng.choice(list(running)))
        running[name] += 1
        score = float(rng.integers(4)) if ties else float(rng.normal())
        score = WORST if rng.random() < 0.1 else score
        result = {"epoch": running[name], "score": score}
        decision = theirs.on_trial_result(None, SimpleNamespace(trial_id=name), result)
        assert ours.passes(name, running[name], score) == (decision == "CONTINUE"), (name, result)
        if decision != "CONTINUE" or running[name] >= last:
            del running[name]


def test_the_best_half_passes_the_first_rung() -> None:
    rungs = Rungs(2, 8, 2)
    assert [rungs.passes(f"t{i}", 1, float(i)) for i in range(3)] == [True] * 3
    assert [rungs.passes(f"t{i}", 2, float(i)) for i in range(3)] == [True, False, False]


def test_a_rung_is_decided_once_for_a_trial() -> None:
    rungs = Rungs(1, 100, 4)
    assert rungs.passes("a", 1, 1.0)
    assert not rungs.passes("b", 1, 2.0)
    assert rungs.passes("a", 2, 50.0)  # the next rung is at epoch 4


@pytest.mark.parametrize("reduction", [2, 3])
def test_rungs_are_at_powers_of_the_reduction_factor(reduction: int) -> None:
    at = [epoch for epoch, _ in Rungs(1, 81, reduction).rungs]
    assert at == sorted((reduction**k for k in range(len(at))), reverse=True)
    assert at[0] <= 81 < at[0] * reduction
