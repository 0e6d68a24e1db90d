"""A comparison with several budgets: its rows, what they cost, the front of each budget, and the page."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dmtg_core.grouping import Grouping
from dmtg_core.names import key_of
from pipelines.cli.experiments import _compare as shown_comparison
from pipelines.compare.budgets import budget_sentence, front, rows_within
from pipelines.compare.cells import LEAST_RUNS, Cell, Kind
from pipelines.compare.driver import ComparisonResult, _tracked, compare
from pipelines.compare.methods import FIXED, NAIVE, Comparison, results_of, rows_of, second_cells
from pipelines.compare.page import gain_against_cost
from pipelines.compare.results import summary
from pipelines.compare.significance import Mean, holm, mean_of, p_value
from pipelines.config.loading import Config
from pipelines.errors import UserError
from tests.dmtg_core.planted import planted_data
from tests.pipelines.compare.test_driver import TASKS, config_of

BUDGETS = [3, 4, 8]
METHODS = ["naive_longer", "wide", "wide_distilled", "random", "tag", "feature_overlap", "dmtg", "guided"]


def section(**changes: Any) -> dict[str, Any]:
    return {"methods": METHODS, "random_draws": 1, "variants": {}} | changes


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, ComparisonResult, list[str]]:
    """A comparison with one budget that is continued with three, its configuration, and the log of both."""
    work, logged = tmp_path_factory.mktemp("budgets"), list[str]()
    one = compare(config_of(work, compare=section(budgets=[4])), logged.append)
    logged.append("continued")
    config = config_of(work, compare=section(budgets=BUDGETS))
    done = compare(config, logged.append)
    assert done.folder.name == one.folder.name
    return config, done, logged


def test_mlflow_has_the_rows_of_a_comparison_that_was_extended(
    extended: tuple[Config, ComparisonResult, list[str]], tmp_path: Path
) -> None:
    import mlflow

    config, done, _ = extended
    client = mlflow.MlflowClient(config.track.uri)
    metrics = client.get_run(done.run_id).data.metrics
    sent = json.loads(Path(client.download_artifacts(done.run_id, "compare.json", str(tmp_path))).read_text())
    assert sent["rows"] == json.loads(json.dumps(done.found["rows"]))
    assert {"gain/test/wide 3", "gain/test/wide 4", "gain/test/wide 8"} <= metrics.keys()


def test_rows_have_the_name_of_their_budget_if_there_are_several(tmp_path: Path) -> None:
    variants = {"narrow": {"wide": False}, "gates": {"method": "dmtg"}}
    methods = [NAIVE, "wide", "dmtg", "narrow", "gates", "truth"]

    def rows(**changes: Any) -> dict[str, tuple[str, float]]:
        config = config_of(tmp_path, compare=section(variants=variants, **changes))
        return rows_of(Comparison(config, TASKS), methods)

    fixed = {name: (name, 0.0) for name in (NAIVE, "dmtg", "gates")}  # a published search has its own length
    spending = ("wide", "narrow", "truth")
    assert rows() == {name: fixed.get(name, (name, 4.0)) for name in methods}  # K + 2
    assert rows(budgets=[2.5]) == {name: fixed.get(name, (name, 2.5)) for name in methods}
    three = rows(budgets=[16, 4, 8.5, 4])
    assert three == fixed | {f"{name}@{b:g}": (name, b) for name in spending for b in (4, 8.5, 16)}
    assert [name for name in three if name.startswith("wide")] == ["wide@4", "wide@8.5", "wide@16"]


def test_the_budget_of_a_comparison_is_that_of_the_search(tmp_path: Path) -> None:
    for value, expected in ((None, 4), (6.5, 6.5), ("auto", 16)):
        config = config_of(tmp_path, compare=section(), search={"budget": value})
        assert Comparison(config, TASKS).budgets == (expected,)
    with pytest.raises(UserError, match=r"compare\.budgets"):
        config_of(tmp_path, compare=section(budgets=[0.5]))


def test_no_method_costs_more_than_its_budget(extended: tuple[Config, ComparisonResult, list[str]]) -> None:
    config, done, _ = extended
    rows = {row["method"]: row for row in done.found["rows"]}
    names = [f"{name}@{b}" for name in (*METHODS, "truth") if name not in FIXED for b in BUDGETS]
    assert sorted(rows) == sorted([NAIVE, "dmtg", *names])
    for name in names:
        row = rows[name]
        assert name == f"{row['base']}@{row['budget']:g}"
        for seed in config.compare.seeds:
            (spent,) = done.found["per_seed"][name][str(seed)]["cost"]
            limit = row["budget"]
            if row["base"] == "tag":  # what measuring has cost is part of it
                naive = (done.folder / "cells" / f"{Cell(Kind.AFFINITIES, seed).name}.json").read_json()
                limit = max(limit, naive["cost"] + naive["affinity_costs"]["tag"] + LEAST_RUNS)
                assert spent > naive["cost"] + naive["affinity_costs"]["tag"]
            assert 0 < spent <= limit + 1e-9
    assert rows["tag@3"]["cost"] > 3  # the one exception
    assert rows["wide@8"]["cost"] > rows["wide@3"]["cost"]


def test_a_further_budget_trains_only_its_own_cells(
    extended: tuple[Config, ComparisonResult, list[str]],
) -> None:
    _, _, logged = extended
    first, second = (
        {line.split()[1].rstrip(":") for line in part if "validation score" in line}
        for part in (logged[: logged.index("continued")], logged[logged.index("continued") :])
    )
    assert not first & second
    # "tag" trains its groups for what measuring leaves of 8 runs; with 3 and 4 runs that is `LEAST_RUNS`
    left = {name for name in second if not re.search("_[38]runs_seed", name)}
    assert all(re.fullmatch(r"grouping_.*_2\.\d+runs_seed\d", name) for name in left)
    kinds = {name.split("_3runs")[0] for name in second if "_3runs" in name}
    assert {"naive_mtl", "wide", "wide_distilled", "proposal", "guided"} < kinds


def test_each_budget_has_its_own_reference_and_family_of_tests(
    extended: tuple[Config, ComparisonResult, list[str]],
) -> None:
    config, done, _ = extended
    found, rows = done.found, {row["method"]: row for row in done.found["rows"]}
    assert found["reference"] == "guided@8"
    for budget in BUDGETS:
        mine = [row for row in rows.values() if row["budget"] == budget]
        for row in mine:
            gains = [
                [found["per_seed"][name][str(seed)]["gain"] for seed in config.compare.seeds]
                for name in (f"guided@{budget}", row["method"])
            ]
            difference = [a - b for a, b in zip(*gains, strict=True)]
            assert row["behind"]["value"] == pytest.approx(sum(difference) / 2)
        tested = [row for row in mine if row["base"] not in ("guided", "truth")]
        assert len(tested) == 6
        adjusted = holm([p_value(Mean(**row["behind"])) for row in tested])
        assert [row["p_adjusted"] for row in tested] == pytest.approx(adjusted)
        assert rows[f"guided@{budget}"]["p_adjusted"] is None
    assert rows[NAIVE]["behind"]["value"] == pytest.approx(rows["guided@8"]["gain"]["value"])


def test_each_budget_has_a_sentence_and_a_front_in_ascending_order(
    extended: tuple[Config, ComparisonResult, list[str]],
) -> None:
    _, done, _ = extended
    found = done.found
    assert [one["budget"] for one in found["fronts"]] == BUDGETS
    for sentence, one in zip(found["verdicts"], found["fronts"], strict=False):
        assert sentence.startswith(f"With {one['budget']:g} runs of training (")
        within = {row["base"]: row for row in rows_within(found["rows"], one["budget"])}
        best = max(within, key=lambda name: within[name]["gain"]["value"])
        assert one["methods"][0] == best
        assert set(one["methods"]) <= set(within)
    assert found["verdicts"][3] == "With 8 runs in detail:"


def test_the_page_has_one_picture_of_gain_against_cost_and_a_part_for_each_budget(
    extended: tuple[Config, ComparisonResult, list[str]],
) -> None:
    _, done, _ = extended
    page = done.page.read_text()
    assert page.count("<svg") == 3
    assert page.count("Gain over naive MTL against training cost") == 1
    assert "Gain over naive MTL of every method" not in page
    for budget in BUDGETS:
        assert f"budget of {budget} runs" in page
    # in each part of the table of methods; with the largest budget also in those of tasks and of agreements
    assert page.count('<th scope="row">wide</th>') == len(BUDGETS) + 1
    assert page.count('<th scope="col" class="n">wide</th>') == 2
    assert "against guided<" in page.lower()


def test_the_terminal_and_mlflow_have_the_figures_of_the_largest_budget(
    extended: tuple[Config, ComparisonResult, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    config, done, _ = extended
    result = shown_comparison(config)
    ours = next(row for row in done.found["rows"] if row["method"] == "guided@8")
    assert result["normalized_gain"] == pytest.approx(ours["gain"]["value"])
    assert result["fronts"] == done.found["fronts"]
    sent = _tracked(done.found)
    assert sent["normalized_gain"] == result["normalized_gain"]
    assert sent["metrics"]["guided 8"]["training_cost"] == ours["cost"]
    assert all(key_of(name) == name for name in sent["metrics"])  # names that MLflow takes as they are
    assert "With 8 runs in detail:" in "".join(capsys.readouterr())


def test_naive_mtl_is_the_result_of_a_search_that_is_no_better(tmp_path: Path) -> None:
    comparison = Comparison(config_of(tmp_path, compare=section()), ("a", "b"))
    naive, searched = (
        Cell(Kind.NAIVE, 1),
        Cell(Kind.SEARCH, 1, budget=4, options=(("method", "guided"),), label="guided"),
    )
    one, two = {"group_0": ["a", "b"]}, {"group_0": ["a"], "group_1": ["b"]}
    network: dict[str, Any] = {"metrics": {"val": {}}, "flops": 1, "parameters": 1, "cost": 1.0}
    guided = {"chosen": "guided", "distilled": {"kept": True}, "probabilities": [[0.9, 0.1], [0.2, 0.8]]}
    for score, varies, expected in ((-2.0, 0.4, two), (-2.0, 0.6, one), (-1.0, 0.0, one), (-0.5, 0.1, one)):
        # two parts: the standard error of the difference is `varies`
        parts = [score, score - varies, score + varies]
        found = {
            naive: network | {"score": -1.0, "grouping": one, "score_parts": [-1.0, -1.0, -1.0]},
            searched: network
            | guided
            | {"score": score, "grouping": two, "flops": 2, "cost": 3.5, "score_parts": parts},
        }
        (result,) = results_of(comparison, "guided", 4, 1, found)
        assert result["grouping"] == expected
        assert result["cost"] == 3.5  # the search has been paid; naive MTL is one run on top in `dmtg train`
        if expected is one:
            assert (result["score"], result["flops"], result["chosen"]) == (-1.0, 1, NAIVE)
            assert (result["distilled"], result["probabilities"]) == ({}, [[1.0], [1.0]])
        else:
            assert result == found[searched]


@pytest.mark.parametrize(("budget", "left"), [(4, 1.234), (2.8, LEAST_RUNS), (1, LEAST_RUNS)])
def test_groups_of_an_affinity_are_trained_for_what_measuring_leaves(
    tmp_path: Path, budget: float, left: float
) -> None:
    comparison = Comparison(config_of(tmp_path, compare=section()), ("a", "b", "c"))
    affinity = [[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]]
    measured = {"cost": 1.0, "affinities": {"tag": affinity}, "affinity_costs": {"tag": 1.7654}}
    found = {Cell(Kind.AFFINITIES, 1): measured}
    (cell,) = second_cells(comparison, "tag", budget, 1, found)
    assert cell == Cell.of(Grouping.of([["a", "b"], ["c"]]), 1, budget=left)
    found[cell] = {"cost": left}
    (result,) = results_of(comparison, "tag", budget, 1, found)
    assert result["cost"] == pytest.approx(2.7654 + left)


def test_the_front_is_the_highest_gain_and_those_that_are_not_significantly_lower() -> None:
    gains = {
        "low": [1.0, 2.0, 3.1],
        "best": [11.0, 12.0, 13.0],
        "near": [10.0, 13.0, 11.0],
        "lost": [math.nan] * 3,
    }
    # best - low: 10, 10, 9.9, p = 1e-5; best - near: 1, -1, 2, p = 0.53
    assert front(gains) == ["best", "near"]
    # the same difference of 4 ± 1 (p = 0.0202) is significant alone and not among three tests
    alone = {"best": [0.0, 0.0, 0.0], "a": [-3.0, -4.0, -5.0]}
    assert front(alone) == ["best"]
    assert front(alone | {"b": [-1.0, 1.0, -1.0], "c": [1.0, -1.0, -1.0]}) == ["best", "b", "c", "a"]
    assert front({"a": [1.0], "b": [2.0]}) == []


def test_methods_of_their_own_length_take_part_if_they_cost_no_more() -> None:
    rows = [
        {"method": name, "budget": budget, "cost": cost}
        for name, budget, cost in (("naive_mtl", None, 1.0), ("hoa", None, 9.0), ("a@4", 4, 3.9), ("a@8", 8, 7.8))
    ]
    assert [row["method"] for row in rows_within(rows, 4)] == ["naive_mtl", "a@4"]
    assert [row["method"] for row in rows_within(rows, 8, at_most=False)] == ["naive_mtl", "hoa", "a@8"]


def row(method: str, p: float | None, *behind: float) -> dict[str, Any]:
    gain = asdict(mean_of([9 - value for value in behind]))
    found = {"method": f"{method}@4", "base": method, "budget": 4, "cost": 3.46, "p_adjusted": p}
    return found | {"gain": gain, "behind": asdict(mean_of(behind))}


def test_the_sentence_of_a_budget_names_the_methods_that_are_better_and_worse() -> None:
    rows = [row("guided", None, -1, 0, 1), row("wide", 0.01, 3, 4, 5), row("random", 0.2, 0, 1, 2),
            row("truth", None, -9, -9, -9), row("tag", 0.04, -3, -4, -5)]  # fmt: skip
    # gains 10, 9, 8: half of the interval is 4.303 / √3
    assert budget_sentence(rows, "guided@4", ["tag"]) == (
        "With 4 runs of training (3.5 spent), the search gains +9.0 ± 2.5 %. It is better than wide; not "
        "significantly different from random; worse than tag. At the front: tag."
    )
    one_seed = [row("guided", None, 0), row("wide", None, 3)]
    assert budget_sentence(one_seed, "guided@4", []) == (
        "With 4 runs of training (3.5 spent), the search gains +9.0 %."
    )


def test_a_comparison_without_the_search_has_fronts_and_no_sentences(tmp_path: Path) -> None:
    config = config_of(tmp_path, compare=section(methods=["wide"], groupings={}, budgets=[2, 4]))
    tasks = planted_data(0, tasks=4, groups=2)[1]

    def result(error: float, cost: float) -> dict[str, Any]:
        metrics = {task.name: {"accuracy": 1 - error, "loss": error} for task in tasks}
        return {"metrics": {"val": metrics}, "grouping": {"group_0": list(TASKS)}, "score": 0.0, "cost": cost,
                "flops": 1, "parameters": 1}  # fmt: skip

    errors = {NAIVE: (0.4, 0.4), "wide@2": (0.38, 0.36), "wide@4": (0.2, 0.21)}
    results = {name: {seed: [result(e, 1.0)] for seed, e in zip((1, 2), both, strict=True)}
               for name, both in errors.items()}  # fmt: skip
    found = summary(Comparison(config, TASKS), tasks, [NAIVE, "wide"], results, [])
    assert (found["reference"], found["verdicts"]) == (NAIVE, [])
    rows = {one["method"]: one for one in found["rows"]}
    assert rows["wide@4"]["gain"]["value"] == pytest.approx((50 + 47.5) / 2)
    # the differences to naive MTL are tests of different budgets: each is the only one of its family
    assert rows["wide@2"]["p_adjusted"] == pytest.approx(rows["wide@2"]["p_value"])
    assert found["fronts"][1] == {"budget": 4, "methods": ["wide"]}


def test_the_picture_names_every_method_and_its_points() -> None:
    own_length = {"budget": None, "cost": 0.0}
    rows = [row("guided", None, 0, 1, 2), row("guided", None, -9, -8, -7) | {"budget": 8, "cost": 7.25},
            row("naive_mtl", None, 9, 9, 9) | own_length | {"cost": 1.0},
            row("extra_trees", None, 3, 4, 5) | own_length]  # fmt: skip
    drawn = gain_against_cost(rows, "guided")
    assert "guided +8.0 ± 2.5 % at 3.5, +17.0 ± 2.5 % at 7.2" in drawn
    for text in ("extra_trees (cost not counted)", "naive_mtl", "training cost in runs of naive MTL"):
        assert f">{text}</text>" in drawn
    ticks = re.findall(r"<text[^>]*>(\d+)</text>", drawn)
    assert {"1", "4", "8"} <= set(ticks)
