"""A comparison with a method, an encoder and an aggregator of another package."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmtg_core import addresses
from pipelines.compare.cells import Cell, Kind
from pipelines.compare.driver import compare
from pipelines.errors import UserError
from tests.dmtg_core import own
from tests.pipelines.compare import own_methods
from tests.pipelines.compare.test_driver import config_of

PAIRS, NOTHING = (f"{own_methods.__name__}:{name}" for name in ("pairs", "nothing"))
LAYERS, WEIGH = (f"{own.HERE}:{name}" for name in ("Layers", "weigh_first"))


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_allowed", {})
    monkeypatch.setattr(addresses, "_loaded", {})


def test_a_method_of_another_package_is_trained_in_the_processes_of_the_pool(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        network={"encoder": LAYERS, "options": {"width": 4}, "stem": 1},
        train={"aggregator": WEIGH, "epochs": 2},
        compare={"methods": [PAIRS], "seeds": [1], "variants": {}, "groupings": {}},
        track={"uri": "none"},
    )
    done = compare(config)
    rows = {row["method"]: row for row in done.found["rows"]}
    assert list(rows)[:2] == ["naive_mtl", PAIRS]
    assert rows[PAIRS]["budget"] == 4  # K + 2
    assert rows[PAIRS]["cost"] > 0
    assert {one["address"]: one["kind"] for one in done.found["code"]} == {
        LAYERS: "encoder", WEIGH: "aggregator", PAIRS: "method",
    }  # fmt: skip
    cell = (done.folder / "cells" / f"{PAIRS.replace(':', '.')}_4runs_seed1.json").read_json()
    assert cell["grouping"] == {"group_0": ["task_0", "task_1"], "group_1": ["task_2", "task_3"]}


def test_a_cell_of_another_package_has_a_name_of_a_file() -> None:
    assert Cell(Kind.OWN, 3, budget=4, label="a.b:c").name == "a.b.c_4runs_seed3"


def test_a_method_that_cannot_be_used_is_refused_before_training(tmp_path: Path) -> None:
    sections = {"seeds": [1], "variants": {}, "groupings": {}}
    config = config_of(tmp_path, compare={"methods": [f"{PAIRS}_of"], **sections}, track={"uri": "none"})
    with pytest.raises(UserError, match="no attribute 'pairs_of'") as found:
        compare(config)
    assert found.value.where == "compare.methods"
    assert not list((tmp_path / "runs").glob("*/cells/*"))
    with pytest.raises(UserError, match="expected one of naive_mtl, .*, or package.module:name, got 'wider'"):
        config_of(tmp_path, compare={"methods": ["wider"]})
    short = config_of(
        tmp_path, compare={"methods": [NOTHING], **sections}, train={"epochs": 1}, track={"uri": "none"}
    )
    with pytest.raises(UserError, match=r"must return dmtg_core\.search\.baselines\.Trained, got NoneType"):
        compare(short)
