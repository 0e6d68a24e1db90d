"""`dmtg compare --dry-run`: the networks, the runs and the time of a comparison before it starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dmtg_core.search.options import BASELINE
from pipelines.compare.cells import Cell, Kind
from pipelines.compare.driver import compare, dry_run
from pipelines.compare.estimate import NETWORKS, Speeds, lines_of
from pipelines.compare.job import CELLS
from pipelines.compare.results import NOT_SEARCHED
from pipelines.config.loading import Config
from pipelines.storage import locate
from tests.pipelines.compare.test_driver import METHODS, config_of

SPEEDS = Speeds(
    costs=dict.fromkeys(NETWORKS.values(), 0.5) | {BASELINE: 0.25},
    seconds=dict.fromkeys(NETWORKS.values(), 10.0) | {BASELINE: 3.0},
    searches={Cell(Kind.SEARCH, 0, budget=4.0): (4.0, 90.0)},
    left_out={},
    epochs=4,
    device="CPU",
)


def _config(work: Path, **compare: Any) -> Config:
    section = {"methods": METHODS, "seeds": [1], "random_draws": 2, **compare}
    return config_of(work, compare=section, track={"uri": ""})


def test_the_estimate_is_an_upper_limit_and_nothing_is_left_after_the_comparison(tmp_path: Path) -> None:
    config = _config(tmp_path)
    before = dry_run(config)
    assert (before["finished"], before["at_once"]) == (0, 2)
    assert before["seconds"] > 0
    folder = compare(config).folder
    done = [(folder / CELLS / name).read_json() for name in (folder / CELLS).files()]
    assert len(done) <= before["cells"]
    spent = sum(result["cost"] for result in done)
    assert spent <= before["runs"] < 3 * spent
    after = dry_run(config)
    assert after["cells"] == after["finished"] == len(done)
    assert (after["runs"], after["seconds"]) == (0, 0)
    more = dry_run(_config(tmp_path, seeds=[1, 2]))
    assert more["finished"] == len(done)
    # random groups can be those of another method
    assert more["cells"] - len(done) == pytest.approx(before["cells"], abs=2)
    assert more["runs"] == pytest.approx(before["runs"], rel=0.1)


def test_a_dry_run_trains_nothing_and_writes_no_results(tmp_path: Path) -> None:
    config = _config(tmp_path, methods=["guided"], variants={}, groupings={})
    found = dry_run(config)
    assert (found["cells"], found["runs"]) == (2, 1 + 4)  # naive MTL, and a search with K + 2 runs
    assert found["text"] == lines_of(found)
    folders = locate(config.run.root).folders()
    assert all(not (locate(config.run.root) / name / "config.yaml").exists() for name in folders)


@pytest.mark.parametrize(
    ("cell", "most"),
    [
        (Cell(Kind.NAIVE, 1), (1.0, 12.0)),
        (Cell(Kind.NAIVE, 1, budget=4.0), (4.0, 48.0)),
        (Cell(Kind.WIDE, 1, budget=4.0), (4.0, 80.0)),
        (Cell(Kind.GROUPING, 1), (2.0, 40.0)),
        (Cell(Kind.GROUPING, 1, epochs=2), (1.0, 20.0)),
        (Cell(Kind.SEARCH, 7, budget=4.0), (4.0, 90.0)),
        (Cell(Kind.TREE_ENSEMBLES, 1, label="extra_trees"), (0.0, 0.0)),
    ],
)
def test_the_most_that_a_cell_needs(cell: Cell, most: tuple[float, float]) -> None:
    assert SPEEDS.most(cell) == most


def test_every_kind_that_trains_one_network_has_a_speed() -> None:
    assert {*NETWORKS} == {*Kind} - {Kind.SEARCH, Kind.TREE_ENSEMBLES}


def test_the_lines_name_what_is_finished() -> None:
    values = {
        "cells": 9,
        "finished": 0,
        "runs": 27.0,
        "seconds": 7200.0,
        "at_once": 2,
        "device": "CPU",
        "left_out": {},
    }
    first, second = lines_of(values)
    assert first == "estimate: 9 networks and searches; at most 27 runs of naive MTL"
    assert second == "at most 2.0 h with 2 at a time, each on CPU"
    first, second = lines_of(values | {"finished": 3, "at_once": 0})
    assert first == "estimate: 9 networks and searches, 3 of them finished; at most 27 runs of naive MTL"
    assert second == "at most 2.0 h with 1 at a time, each on CPU"
    *_, last = lines_of(values | {"left_out": {"4": ["guided", "start_0"]}})
    assert last == "a search with 4 runs leaves out guided, start_0; raise compare.budgets or train.epochs"


def test_a_training_of_its_own_length_has_the_epochs_of_a_run() -> None:
    assert dataclasses.replace(SPEEDS, epochs=8).most(Cell(Kind.NAIVE, 1)) == (2.0, 24.0)


def test_a_budget_for_one_encoder_alone_searches_no_groups_and_says_so(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, compare={"methods": ["guided"], "seeds": [1], "budgets": [3], "variants": {}, "groupings": {}},
        train={"epochs": 1}, track={"uri": ""},
    )  # fmt: skip
    found = dry_run(config)
    assert found["left_out"] == {"3": ["guided", "start_0"]}
    assert compare(config).found["verdicts"][-1] == NOT_SEARCHED
