"""The whole ETAP in a comparison: its groups are trained first, and are its cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmtg_core.grouping import Grouping
from pipelines.compare.cells import LEAST_RUNS, Cell, Kind
from pipelines.compare.driver import compare
from pipelines.compare.methods import ETAP_FULL, Comparison, first_cells
from tests.pipelines.compare.test_driver import TASKS, config_of


def test_random_groups_are_different_and_more_of_them_begin_with_the_same(tmp_path: Path) -> None:
    comparison = Comparison(config_of(tmp_path), TASKS)
    few, many = comparison.random_sets(1, 3), comparison.random_sets(1, 9)
    assert many[:3] == few
    assert len(set(many)) == 9
    assert {len(group) for group in many} == {1, 2, 3}
    assert len(comparison.random_sets(1, 50)) == 14  # all groups of four tasks but the empty and the whole one
    assert comparison.random_sets(2, 9) != many
    assert all(tuple(sorted(group)) == group for group in many)


@pytest.mark.parametrize(("budget", "groups"), [(1.0, 2), (4.0, 2), (9.0, 4)])
def test_half_of_the_budget_trains_groups(tmp_path: Path, budget: float, groups: int) -> None:
    cells = first_cells(Comparison(config_of(tmp_path), TASKS), ETAP_FULL, budget, 1)
    assert [cell.kind for cell in cells] == [Kind.AFFINITIES] + [Kind.PAIR] * groups


def test_the_cost_of_its_groups_is_its_own_and_comes_from_its_budget(tmp_path: Path) -> None:
    compared = {"methods": ["etap", ETAP_FULL], "seeds": [1], "variants": {}, "groupings": {}, "budgets": [9]}
    config = config_of(tmp_path, compare=compared, track={"uri": "none"}, train={"epochs": 2})
    done = compare(config, lambda _: None)
    rows = {row["method"]: row for row in done.found["rows"]}
    held = {cell: (done.folder / "cells" / f"{cell.name}.json").read_json() for cell in first_cells(
        Comparison(config, TASKS), ETAP_FULL, 9.0, 1)}  # fmt: skip
    naive = held[Cell(Kind.AFFINITIES, 1)]
    groups = [result["cost"] for cell, result in held.items() if cell.kind == Kind.PAIR]
    before = naive["cost"] + naive["affinity_costs"]["etap"] + sum(groups)
    assert len(groups) == 4
    left = int(1000 * max(9 - before, LEAST_RUNS)) / 1000
    (groups_found,) = done.found["per_seed"][ETAP_FULL]["1"]["groupings"]
    grouping = Grouping.of(groups_found, TASKS)
    network = (done.folder / "cells" / f"{Cell.of(grouping, 1, budget=left).name}.json").read_json()
    assert rows[ETAP_FULL]["cost"] == pytest.approx(before + network["cost"])
    assert network["cost"] <= left + 1e-9
    assert rows[ETAP_FULL]["cost"] > sum(groups) + 1
    assert rows["etap"]["base"] == "etap"
