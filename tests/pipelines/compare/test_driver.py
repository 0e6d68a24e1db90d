"""`dmtg compare` on the planted problem: cells, methods and tables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmtg_core import Grouping
from dmtg_core.evaluation.trees import TREES
from pipelines.compare.cells import Cell, Kind
from pipelines.compare.driver import ComparisonResult, compare, methods_of
from pipelines.compare.methods import (
    BUDGETED,
    ETAP_FULL,
    FIXED,
    NAIVE,
    SELECTED,
    Comparison,
    first_cells,
    pair_affinity,
    results_of,
    second_cells,
)
from pipelines.compare.preparation import open_cells_folder
from pipelines.compare.signal import signal
from pipelines.compare.training import time_left
from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.data.sources import build_source
from pipelines.errors import UserError
from tests.dmtg_core.planted import planted_data

METHODS = ["single_task", "naive_longer", "wide", "wide_distilled", "random", "cs", "tag", "etap", "gradtag",
           "feature_overlap", "hoa", "exhaustive", "dmtg", "guided", "extra_trees",
           "gradient_boosting"]  # fmt: skip
TASKS = ("task_0", "task_1", "task_2", "task_3")
Finished = tuple[Config, ComparisonResult, list[str]]


def config_of(work: Path, **sections: Any) -> Config:
    """Four planted tasks in two groups, a few short epochs."""
    values: dict[str, Any] = {
        "name": "planted",
        "source": {"kind": "planted", "options": {"tasks": 4, "groups": 2, "features": 8, "rows": 200}},
        "data": {"shards": str(work / "shards")},
        "network": {"encoder": "mlp", "groups": 2, "options": {"widths": [8, 4]}},
        "train": {"epochs": 4, "batch_size": 50, "learning_rate": 0.01},
        "compare": {
            "methods": METHODS,
            "seeds": [1, 2],
            "random_draws": 2,
            "variants": {"narrow": {"wide": False, "share": 0.4, "average": 0}},
            "groupings": {"truth": [["task_0", "task_2"], ["task_1", "task_3"]]},
        },
        "signal": {"partitions": 3, "seeds": [1, 2]},
        "track": {"uri": f"sqlite:///{work / 'mlflow.db'}"},
        "run": {"root": str(work / "runs")},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return checked(Config, values)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished comparison of all methods, its configuration, and its log."""
    logged: list[str] = []
    config = config_of(tmp_path_factory.mktemp("compare"))
    return config, compare(config, logged.append), logged


def test_every_method_has_a_row_with_gain_costs_and_errors(compared: Finished) -> None:
    _, done, _ = compared
    rows = {row["method"]: row for row in done.found["rows"]}
    assert list(rows) == ["naive_mtl", *METHODS, "narrow", "truth"]
    assert rows["naive_mtl"]["gain"]["value"] == 0
    assert rows["naive_mtl"]["cost"] == 1
    for row in rows.values():
        assert math.isfinite(row["gain"]["value"])
        assert set(row["errors"]) == {"task_0", "task_1", "task_2", "task_3"}
        assert (row["flops"] > 0) == (row["method"] not in TREES)  # no operations are counted for trees
        assert row["total_error"]["value"] == pytest.approx(100 * sum(e["value"] for e in row["errors"].values()))
        assert row["base"] == row["method"]
        assert row["budget"] == (None if row["method"] in FIXED else 4)  # two groups
    assert rows["single_task"]["cost"] > 3
    assert rows["hoa"]["cost"] > rows["single_task"]["cost"]
    assert rows["guided"]["behind"]["value"] == 0
    assert rows["wide"]["flops"] == rows["wide_distilled"]["flops"] <= rows["random"]["flops"]
    assert (rows["naive_mtl"]["one_group"], rows["naive_mtl"]["stability"]) == (1, None)
    assert done.found["agreement"]["naive_mtl"] == dict.fromkeys(rows)  # one group is no grouping
    assert done.found["agreement"]["truth"]["truth"] == 1  # the same groups with each seed
    assert rows["guided"]["p_value"] is rows["dmtg"]["p_adjusted"] is None
    assert 1 >= rows["wide"]["p_adjusted"] >= rows["wide"]["p_value"] >= 0
    assert (done.found["budgets"], done.found["reference"]) == ([4], "guided")
    assert not any("runs of training" in sentence for sentence in done.found["verdicts"])


def test_exhaustive_takes_the_partition_with_the_best_validation_score(
    compared: Finished,
) -> None:
    config, done, _ = compared
    comparison = Comparison(config, TASKS)
    assert len(comparison.partitions()) == 8
    for seed in config.compare.seeds:
        files = [done.folder / "cells" / f"{Cell.of(one, seed).name}.json" for one in comparison.partitions()]
        scores = {
            str(Grouping.from_dict(f.read_json()["grouping"], comparison.tasks)): f.read_json()["score"]
            for f in files
        }
        (taken,) = done.found["per_seed"]["exhaustive"][str(seed)]["groupings"]
        assert str(Grouping.of(taken, comparison.tasks)) == min(scores, key=scores.__getitem__)


def test_the_same_command_trains_nothing_again_and_returns_the_same(
    compared: Finished,
) -> None:
    config, done, _ = compared
    logged: list[str] = []
    again = compare(config, logged.append)
    assert not [line for line in logged if "to train" in line]
    assert json.dumps(again.found) == json.dumps(json.loads((done.folder / "compare.json").read_text()))
    assert again.run_id == done.run_id


def test_a_deleted_cell_is_trained_again_to_the_same_result(
    compared: Finished,
) -> None:
    config, done, _ = compared
    lost = done.folder / "cells" / "guided_4runs_seed1.json"
    before = lost.read_json()
    lost.delete()
    logged: list[str] = []
    compare(config, logged.append)
    (line,) = [line for line in logged if "to train" in line]
    assert line.startswith("1 of ")
    after = lost.read_json()
    assert before.pop("seconds") > 0
    assert after.pop("seconds") > 0
    assert after == before


def test_the_page_needs_no_network_and_holds_table_and_verdicts(
    compared: Finished,
) -> None:
    _, done, _ = compared
    page = done.page.read_text()
    assert not re.search(r'<(script|link|img|iframe)|href="(?!#)http', page)
    for text in ("guided", "gradtag", "Tasks in one group", *done.found["verdicts"]):
        assert text in page.replace("&#39;", "'")
    assert page.count("<svg") == 3  # gains, tasks, which tasks go together


def test_mlflow_has_the_gain_and_the_files(compared: Finished) -> None:
    import mlflow

    config, done, _ = compared
    client = mlflow.MlflowClient(config.track.uri)
    run = client.get_run(done.run_id)
    assert run.info.status == "FINISHED"
    names = {file.path for file in client.list_artifacts(done.run_id)}
    assert {"compare.html", "compare.json", "config.yaml"} <= names
    for row in done.found["rows"]:
        assert run.data.metrics[f"gain/test/{row['method']}"] == pytest.approx(row["gain"]["value"])


def test_a_further_seed_trains_only_its_own_cells(compared: Finished) -> None:
    config, _, _ = compared
    section = config.compare.model_copy(update={"methods": ("wide", "random"), "seeds": (1, 3)})
    logged: list[str] = []
    found = compare(config.model_copy(update={"compare": section}), logged.append).found
    trained = [line.split()[1] for line in logged if "validation score" in line]
    assert trained
    assert all("_seed3" in name for name in trained)
    assert [row["method"] for row in found["rows"]] == ["naive_mtl", "wide", "random", "narrow", "truth"]


def test_the_time_left_is_that_of_the_same_methods_with_other_seeds() -> None:
    groups = [Cell.of(Grouping.of(names), seed) for seed, names in enumerate([[["a"], ["b"]], [["b"], ["a"]]], 1)]
    naive = [Cell(Kind.NAIVE, seed, budget=5) for seed in (1, 2, 3)]
    found = {naive[0]: {"seconds": 100.0}, groups[0]: {"seconds": 500.0}}
    both = list(found)
    left = [naive[1], naive[2], groups[1]]  # 700 s of work, of which two processes do 2 s in a second
    assert time_left(found, both, left, elapsed=300.0) == ", about 6 min left"
    assert time_left(found, both[:1], left, elapsed=100.0) == ", about 12 min left"  # one of an earlier call
    assert time_left(found, both, [], elapsed=300.0) == ""
    assert time_left(found, both, [*left, Cell(Kind.NAIVE, 2, budget=8)], elapsed=300.0) == ""  # never trained yet


def test_methods_with_the_same_grouping_share_its_cell() -> None:
    one = Grouping.of([["a", "b"], ["c"]])
    assert Cell.of(one, 1) == Cell.of(Grouping.of([["c"], ["b", "a"]], ["a", "b", "c"]), 1)
    cells = [Cell.of(one, 1), Cell.of(one, 2), Cell.of(one, 1, 7), Cell.of(one, 1, budget=7), Cell(Kind.NAIVE, 1)]
    assert len({cell.name for cell in cells}) == 5
    assert Cell.of(one, 1).kind == Kind.GROUPING


def test_only_selectors_collect_affinities_and_the_run_stays_the_same(
    compared: Finished,
) -> None:
    config, done, _ = compared
    comparison = Comparison(config, TASKS)
    kinds = {name: {cell.kind for cell in first_cells(comparison, name, 4, 1)} for name in {**FIXED, **BUDGETED}}
    assert {name for name, held in kinds.items() if Kind.AFFINITIES in held} == {*SELECTED, ETAP_FULL}
    naive, with_affinities = (
        (done.folder / "cells" / f"{Cell(kind, 1).name}.json").read_json()
        for kind in (Kind.NAIVE, Kind.AFFINITIES)
    )
    assert set(with_affinities["affinities"]) == set(SELECTED)
    assert with_affinities["metrics"] == naive["metrics"]


def test_variants_of_one_name_with_other_changes_are_different_cells(tmp_path: Path) -> None:
    names = set()
    for starts in (2, 3):
        comparison = Comparison(
            config_of(tmp_path, compare={"variants": {"mine": {"starts": starts}}}), ("a", "b")
        )
        names |= {cell.name for cell in first_cells(comparison, "mine", 4, 1)}
    assert len(names) == 2


def test_the_published_method_has_a_uniform_gate_even_if_the_guided_search_has_none(tmp_path: Path) -> None:
    for starts, expected in ((0, 1), (1, 1), (3, 3)):
        comparison = Comparison(config_of(tmp_path, search={"starts": starts}), ("a", "b"))
        (cell,) = first_cells(comparison, "dmtg", 0, 1)
        assert dict(cell.options) == {"method": "dmtg", "starts": expected}


def test_options_that_exclude_each_other_are_refused_before_data_is_read(tmp_path: Path) -> None:
    config = config_of(tmp_path, search={"method": "dmtg", "starts": 0})
    for command in (compare, signal):
        with pytest.raises(UserError, match="starts must be at least 1, got 0"):
            command(config)
    assert not list(tmp_path.iterdir())


def test_random_partitions_differ_by_seed_and_are_balanced(tmp_path: Path) -> None:
    comparison = Comparison(config_of(tmp_path, compare={"random_draws": 5}), tuple("abcdefg"))
    first, other = comparison.random_partitions(1), comparison.random_partitions(2)
    assert first == comparison.random_partitions(1) != other
    assert {tuple(sorted(len(group) for group in one.groups)) for one in (*first, *other)} == {(3, 4)}


def test_hoa_divides_the_loss_of_a_task_in_a_pair_by_its_loss_alone(tmp_path: Path) -> None:
    comparison = Comparison(config_of(tmp_path), ("a", "b"))
    losses: Mapping[tuple[str, ...], Mapping[str, float]] = {("a",): {"a": 2.0}, ("b",): {"b": 4.0},
                                                             ("a", "b"): {"a": 1.0, "b": 5.0}}  # fmt: skip
    found = {
        cell: {"metrics": {"val": {t: {"loss": v} for t, v in losses[cell.groups[0]].items()}}, "cost": 1.0}
        for cell in first_cells(comparison, "hoa", 0, 1)
    }
    affinity = pair_affinity(comparison, 1, found)
    assert affinity.tolist() == [[-1.0, -1.25], [-0.5, -1.0]]
    (cell,) = second_cells(comparison, "hoa", 0, 1, found)
    assert sorted(cell.groups) == [("a", "b")]  # -1.75 together, -2 apart
    found[cell] = {"cost": 2.0, "grouping": {}, "metrics": {}}
    (entry,) = results_of(comparison, "hoa", 0, 1, found)
    assert entry["cost"] == 2.0 + 3.0


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"network": {"encoder": "resnet18", "options": {}}}, "resnet18 .*has fixed widths"),
        ({"compare": {"methods": ["exhaustive"]}}, "7 tasks have too many partitions"),
        ({"compare": {"variants": {"mine": {"method": "dmtg", "starts": 0}}}}, "starts must be at least 1, got 0"),
        ({"compare": {"variants": {"tag": {}}}}, "there is more than one tag"),
        ({"compare": {"groupings": {"wide@8": [["task_0"]]}}}, "there is more than one wide@8"),
        ({"compare": {"variants": {"mine": {"strats": 2}}}}, "unknown key compare.variants.mine.strats"),
        ({"compare": {"variants": {"mine": {"group_epochs": 2}}}}, "does not depend on group_epochs"),
        ({"compare": {"variants": {"mine": {"budget": 2}}}}, "does not depend on budget"),
        ({"compare": {"groupings": {"mine": [["task_0"]]}}}, "groups must cover the tasks"),
    ],
)
def test_methods_that_cannot_run_are_refused(tmp_path: Path, sections: dict[str, Any], problem: str) -> None:
    tasks = planted_data(0, tasks=7, groups=2)[1]
    compared = {"methods": ["wide"], **sections.get("compare", {})}
    config = config_of(tmp_path, **{**sections, "compare": compared})
    with pytest.raises(UserError, match=problem):
        compare(config, lambda _: None) if "variants" in compared else methods_of(config, tasks, "features")


def test_an_encoder_of_fixed_widths_is_compared_without_a_wide_one(tmp_path: Path) -> None:
    fixed = {"network": {"encoder": "resnet18", "options": {}}}
    values = config_of(tmp_path, **fixed).model_dump()
    del values["compare"]["methods"]
    chosen = methods_of(checked(Config, values), planted_data(0, tasks=4, groups=2)[1], "image")
    assert "guided" in chosen
    assert not {"wide", "wide_distilled"} & {*chosen}
    named = config_of(tmp_path, **fixed, compare={"methods": ["wide"], "variants": {}, "groupings": {}})
    with pytest.raises(UserError, match=r"resnet18 .*has fixed widths"):
        compare(named, lambda _: None)
    assert not list(tmp_path.iterdir()), "it is refused before anything is read or written"


def test_tables_are_compared_with_tree_ensembles(tmp_path: Path) -> None:
    tasks = planted_data(0, tasks=4, groups=2)[1]
    values = config_of(tmp_path).model_dump()
    del values["compare"]["methods"]
    default = checked(Config, values)
    assert {*TREES} <= {*methods_of(default, tasks, "features")}
    assert not {*TREES} & {*methods_of(default, tasks, "image")}
    chosen = config_of(tmp_path, compare={"methods": ["wide", "extra_trees"], "variants": {}, "groupings": {}})
    assert methods_of(chosen, tasks, "features")[:3] == [NAIVE, "wide", "extra_trees"]
    with pytest.raises(UserError, match="tree ensembles read tables, got image input"):
        methods_of(chosen, tasks, "image")


def test_one_group_or_one_task_has_nothing_to_compare(tmp_path: Path) -> None:
    for changes in (
        {"network": {"groups": 1}},
        {"data": {"tasks": ["task_0"], "shards": str(tmp_path / "shards")}},
    ):
        with pytest.raises(UserError, match="nothing to group"):
            compare(config_of(tmp_path, **changes), lambda _: None)


def test_a_folder_of_an_earlier_version_with_other_names_of_methods_resumes(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    _, folder = open_cells_folder(config, "compare")
    stored = config.model_dump(mode="json")
    stored["compare"]["methods"] = ["wide", "reading"]  # the name of feature_overlap in earlier versions
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    assert open_cells_folder(config, "compare")[1] == folder
    stored["train"]["epochs"] = 9
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(UserError, match="belongs to another configuration"):
        open_cells_folder(config, "compare")


def test_the_planted_source_is_the_planted_problem() -> None:
    source = build_source("planted", "", {"tasks": 3, "groups": 3, "features": 6, "rows": 100, "seed": 4})
    spec, tasks, data, _ = planted_data(4, tasks=3, groups=3, features=6, rows=100)
    described = source.describe()
    assert (described.input, described.tasks) == (spec, tasks)
    listed = list(source.entries())
    assert [sum(entry.split == split for entry in listed) for split in ("train", "val", "test")] == [50, 25, 25]
    found = source.read(listed[60])
    assert (found["input"] == data.splits["val"].inputs[10]).all()
    assert found["task.task_1"] == data.splits["val"].labels["task_1"][10]
    with pytest.raises(UserError, match="9 groups need at least 9 tasks"):
        build_source("planted", "", {"groups": 9, "tasks": 3}).describe()
