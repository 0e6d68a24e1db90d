"""The exact selection of networks, against brute force and published tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmtg_core.grouping import Grouping
from dmtg_core.search.selection import MOST_TASKS, Candidate, best_partition, select
from tests.paths import SHARED

TABLES = SHARED / "data" / "selection_tables"
SETTINGS = ("results", "results_large", "results_small_data", "results_alt")
LARGE = {2: 0.3599, 4: 0.3173, 6: 0.3061, 10: 0.3017}  # half networks of budget → test loss, as printed


def read_table(file: Path) -> list[Candidate]:
    """Single-task networks of half size at cost 1, then every network of full size at cost 2."""
    halves, *full = [line.split("\t") for line in file.read_text().splitlines() if line.strip()]
    return [Candidate({str(n): float(value)}) for n, value in enumerate(halves)] + [
        Candidate({str(n): float(value) for n, value in enumerate(line) if value}, cost=2) for line in full
    ]


def least(candidates: Sequence[Candidate], budgets: Sequence[int]) -> list[float]:
    """The lowest sums of losses, by brute force over sets of at most as many candidates as tasks."""
    tasks = sorted({task for one in candidates for task in one.losses})
    losses = np.array([[one.losses.get(task, np.inf) for task in tasks] for one in candidates])
    costs = np.array([one.cost for one in candidates])
    found = [np.inf] * len(budgets)
    for count in range(1, min(len(tasks), len(candidates)) + 1):
        sets = np.array(list(itertools.combinations(range(len(candidates)), count)))
        sums, totals = losses[sets].min(axis=1).sum(axis=1), costs[sets].sum(axis=1)
        found = [
            min(held, sums[totals <= most].min(initial=np.inf)) for held, most in zip(found, budgets, strict=True)
        ]
    return [float(value) for value in found]


@pytest.mark.skipif(not TABLES.exists(), reason="the measured losses of Standley et al. (2020) are not here")
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_optima_of_measured_tables_are_found(setting: str) -> None:
    validation, test = (read_table(TABLES / f"{setting}{suffix}.txt") for suffix in ("", "_test"))
    assert len(validation) == len(test) == 36
    budgets = range(2, 11)
    for budget, best in zip(budgets, least(validation, budgets), strict=True):
        found = select(validation, budget)
        assert found.loss == pytest.approx(best)
        assert sum(validation[place].cost for place in found.chosen) <= budget
        total = sum(test[place].losses[task] for task, place in found.serves.items())
        if setting == "results_large" and budget in LARGE:
            assert total == pytest.approx(LARGE[budget], abs=5e-5)


losses = st.dictionaries(st.sampled_from("abcd"), st.floats(-2, 2), min_size=1)
tables = st.lists(st.builds(Candidate, losses, st.integers(1, 3)), min_size=1, max_size=7)


@given(tables, st.integers(1, 8))
def test_no_other_selection_is_better(candidates: list[Candidate], budget: int) -> None:
    (best,) = least(candidates, [budget])
    if best == np.inf:
        with pytest.raises(ValueError, match=f"total cost of {budget} serves all of"):
            select(candidates, budget)
        return
    found = select(candidates, budget)
    assert found.loss == pytest.approx(best)
    assert found.loss == pytest.approx(sum(candidates[at].losses[task] for task, at in found.serves.items()))
    assert set(found.chosen) == set(found.serves.values())
    assert sum(candidates[at].cost for at in found.chosen) <= budget


def test_tasks_stay_in_the_order_of_the_candidates() -> None:
    tasks = [f"task_{n}" for n in range(8, 12)]
    found = select([Candidate(dict.fromkeys(tasks[:3], 0.0), 1), Candidate({tasks[3]: 0.0}, 1)], 2)
    assert list(found.serves) == tasks


def test_at_most_k_groups_and_overlap() -> None:
    pair, triple = Candidate({"a": 1.0, "b": 3.0}), Candidate({"a": 2.0, "b": 2.0, "c": 1.0})
    assert select([pair, triple], 1).chosen == (1,)
    both = select([pair, triple], 2)
    assert (both.chosen, both.serves, both.loss) == ((0, 1), {"a": 0, "b": 1, "c": 1}, 4.0)


def test_of_equal_choices_the_cheaper_one_is_taken() -> None:
    candidates = [Candidate({"a": 1.0, "b": 1.0}, 2), Candidate({"a": 1.0}), Candidate({"b": 1.0}, 3)]
    assert select(candidates, budget=9).chosen == (0,)


@pytest.mark.parametrize(
    ("values", "cost", "what"),
    [({}, 1, "needs at least one task"), ({"a": float("nan")}, 1, "finite losses"), ({"a": 1.0}, 0, "at least 1")],
)
def test_an_invalid_candidate_is_refused(values: dict[str, float], cost: int, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Candidate(values, cost)


def test_too_many_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match=f"1 to {MOST_TASKS} tasks, got {MOST_TASKS + 1}"):
        select([Candidate({str(n): 0.0}) for n in range(MOST_TASKS + 1)], 3)


def summed(affinity: torch.Tensor, assignment: Sequence[int]) -> float:
    """The objective of `best_partition`, written out."""
    total = 0.0
    for j, group in enumerate(assignment):
        others = [i for i, other in enumerate(assignment) if other == group and i != j]
        total += float(affinity[others, j].mean()) if others else float(affinity[j, j])
    return total


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_the_exact_partition_is_the_best_of_all(tasks: int, groups: int, seed: int) -> None:
    groups = min(groups, tasks)
    affinity = torch.from_numpy(np.random.default_rng(seed).normal(size=(tasks, tasks)))
    found = best_partition(affinity, groups)
    every = itertools.product(range(groups), repeat=tasks)
    assert summed(affinity, found) == pytest.approx(max(summed(affinity, one) for one in every))
    assert found[0] == 0
    assert max(found) < groups


@pytest.mark.parametrize("seed", range(5))
def test_the_beam_is_close_to_the_exact_partition_and_never_better(seed: int) -> None:
    affinity = torch.from_numpy(np.random.default_rng(seed).normal(size=(10, 10)))
    exact, found = (summed(affinity, best_partition(affinity, 3, exact=e)) for e in (True, False))
    assert 0.9 * exact < found <= exact + 1e-9


def test_many_tasks_in_clear_groups_are_found_by_the_beam() -> None:
    truth = [n % 8 for n in range(100)]
    rng = np.random.default_rng(0)
    same = np.equal.outer(truth, truth)
    affinity = torch.from_numpy(same + 0.3 * rng.normal(size=same.shape))
    names = [str(n) for n in range(100)]
    found = Grouping.from_assignment(names, best_partition(affinity, 8))
    assert found.adjusted_rand_index(Grouping.from_assignment(names, truth)) > 0.95


@pytest.mark.parametrize(
    ("affinity", "groups", "problem"),
    [
        (torch.zeros(2, 3), 1, "square matrix"),
        (torch.full((2, 2), float("nan")), 1, "finite"),
        (torch.zeros(2, 2), 3, "2 tasks can form 1 to 2 groups, got 3"),
    ],
)
def test_a_partition_needs_a_square_affinity_and_groups_in_range(
    affinity: torch.Tensor, groups: int, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        best_partition(affinity, groups)
    with pytest.raises(ValueError, match="1 to 14 tasks, got 15"):
        best_partition(torch.zeros(15, 15), 2, exact=True)
