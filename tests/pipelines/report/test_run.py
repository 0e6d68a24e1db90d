"""What a run's page says in words of what was tried, gained and spent, and in which order it draws."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dmtg_core import Grouping
from pipelines.cli.train import _summary
from pipelines.config.loading import load_config
from pipelines.report.figures import branches, curve, ordered
from pipelines.report.run import (
    again,
    certainty,
    costs,
    facts,
    gained,
    gate_records,
    shown_gate,
    together,
    verdict,
)
from pipelines.runs.results import ALL, NAIVE
from pipelines.storage import locate
from pipelines.training.driver import Trained


def candidate(stage: str, score: float, final: float | None, branches: int = 2) -> dict[str, Any]:
    return {"stage": stage, "score": score, "final": final, "probabilities": [[1 / branches] * branches] * 3}


def result(chosen: str, gain: float | None = 4.0) -> dict[str, Any]:
    groups = {"group_0": ["a", "b", "c"]} if chosen == "wide" else {"group_0": ["a", "b"], "group_1": ["c"]}
    return {
        "chosen": chosen,
        "grouping": groups,
        "metrics": {"a": {}, "b": {}, "c": {}},
        "split": "test",
        "normalized_gain": gain,
        "candidates": [
            candidate("guided", -1.0, None), candidate("start_0", -1.2, -1.3), candidate("wide", -1.1, -1.4, 1)
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("start_0", "3 tasks in 2 groups. Against one shared encoder"),
        ("wide", "No grouping of the 3 tasks was better than one wide encoder of the same cost. Against"),
    ],
)
def test_the_verdict_names_what_was_kept(chosen: str, logged: str) -> None:
    assert verdict(result(chosen)).startswith(logged)
    assert verdict(result(chosen, gain=None)) == logged.split(". ", maxsplit=1)[0] + "."


def test_the_gate_that_is_drawn_is_that_of_the_result_or_the_best_there_is() -> None:
    assert shown_gate(result("start_0")) == "start_0"
    assert shown_gate(result("guided")) == "guided"
    assert shown_gate(result("wide")) == "start_0"
    anew = candidate("retrained", -1.5, -1.5) | {"gate": "guided"}
    for chosen, drawn in (("retrained", "guided"), ("wide", "start_0")):
        found = result(chosen)
        assert shown_gate(found | {"candidates": [*found["candidates"], anew]}) == drawn
    alone = result("start_0") | {"candidates": [candidate("start_0", 0.0, 0.0, branches=1)]}
    assert shown_gate(alone) == ""


def test_the_terminal_has_the_groups_in_the_order_of_their_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [f"t{n}" for n in (1, 0, *range(2, 24))]
    found = result("start_0", gain=None) | {
        "grouping": {f"group_{k}": tasks[2 * k : 2 * k + 2] for k in range(12)}, "grouping_name": "g12",
        "metrics": {task: {"loss": 1.0} for task in tasks[::2] + tasks[1::2]}, "baseline": {}, "notes": [],
        "headline": dict.fromkeys(tasks, "loss"), "candidates": [],
    }  # fmt: skip
    _summary(load_config("planted"), Trained(locate("run"), "", found, [], False))
    rows = re.findall(r"(group_\d+) *\S (t\d+)", capsys.readouterr().err)
    assert rows == [(name, task) for name, held in found["grouping"].items() for task in held]


SURE = [[0.9, 0.1], [0.7, 0.3], [0.6, 0.4]]


def test_how_sure_the_gate_was_names_the_tasks_it_was_undecided_on() -> None:
    found = result("start_0")
    assert certainty(found, SURE) == "When the groups were fixed, the gate gave the tasks' branches 60% to 90%."
    open_ones = certainty(found, [[0.9, 0.1, 0.0], [0.4, 0.3, 0.3], [0.2, 0.45, 0.35]])
    assert open_ones.endswith("40% to 90%. It was undecided (under 50%) on b, c.")
    assert "has no gate" in certainty(result("wide"), None)
    assert certainty(result(""), None) == ""


def test_which_tasks_go_together_in_words() -> None:
    assert together(result("start_0")) == "a, b together; c alone."
    assert together(result("wide")) == "All tasks, in one wide encoder."


def measured(value: float, base: float, gain: float = 20.0) -> dict[str, Any]:
    scores = {"rmse": value}
    return result("start_0", gain) | {
        "metrics": {"a": scores, "b": scores, "c": {"rmse": 3.0}},
        "baseline": {task: {"rmse": base} for task in "abc"},
        "headline": dict.fromkeys("abc", "rmse"),
        "inference": {"flops": 3_000_000, "parameters": 10},
        "training_cost": 5.25,
    }  # fmt: skip


def test_a_gain_is_told_with_its_interval_or_that_there_is_none() -> None:
    alone = gained(measured(1.0, 2.0), None)
    assert alone.startswith("Mean error -20.0 % against naive MTL, lower on 2 of 3 tasks. No interval:")
    ends = {"gain": {"value": 20.0, "low": 15.0, "high": 30.0}, "by_task": {}, "confidence": 0.95, "samples": 64}
    assert "95% interval over the 64 samples: -30.0 % to -15.0 %." in gained(measured(1.0, 2.0), ends)
    undefined = ends | {"gain": {"value": None, "low": None, "high": None}}
    assert gained(measured(1.0, 2.0), undefined) == alone


def test_costs_are_told_beside_those_of_naive_mtl_where_they_were_measured() -> None:
    rows = [
        {"name": ALL, "flops": 30, "milliseconds": [6.0, 9.0]},
        {"name": NAIVE, "flops": 20, "milliseconds": [4.0, 5.0]},
    ]  # fmt: skip
    told = costs(measured(1.0, 2.0), {"rows": rows})
    assert told.startswith("An answer takes 1.5 times the operations of naive MTL, 1.5 times its time.")
    assert told.endswith("Training took 5.2 runs of naive MTL.")
    assert costs(measured(1.0, 2.0), None).startswith("An answer takes 3 M operations.")


def test_without_naive_mtl_nothing_was_gained() -> None:
    names = [name for name, _ in facts(measured(1.0, 2.0) | {"normalized_gain": None}, {}, SURE)]
    assert names == ["Which go together", "How sure", "What it costs"]


def test_branches_have_the_names_of_the_groups_that_they_become() -> None:
    gate = [[0.1, 0.2, 0.7, 0.0], [0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.6, 0.2], [0.2, 0.1, 0.0, 0.7]]
    assert branches(gate) == ["group_1", "", "group_0", "group_2"]
    groups = Grouping.from_assignment(list("abcd"), [2, 0, 2, 3]).to_dict()
    for task, row in zip("abcd", gate, strict=True):
        assert task in groups[branches(gate)[row.index(max(row))]]
    assert ordered(gate) == ([0, 2, 1, 3], [2, 0, 3, 1])  # lines of a group beside each other, an empty one last


def test_a_line_leads_from_its_task_to_its_branch() -> None:
    x, y = curve(3.0, -0.5)
    assert (x[0], y[0], x[-1], y[-1]) == (0.0, 3.0, 1.0, -0.5)


def test_an_older_run_shows_its_gate_only_where_it_had_one_start() -> None:
    found = result("") | {"candidates": []}
    records = [
        {"stage": "naive_mtl", "phase": "search", "probabilities": [[1.0]] * 3},
        {"stage": "start_0", "phase": "search", "probabilities": SURE},
        {"stage": "finetune", "phase": "finetune", "probabilities": SURE},
    ]
    assert [record["stage"] for record in gate_records(records, found)] == ["start_0"]
    several = [*records, records[1] | {"stage": "start_1"}]
    assert gate_records(several, found) == []


def test_the_command_of_the_page_trains_the_same_in_a_folder_of_its_own(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    run.mkdir()
    (run / "config.yaml").write_text("base: clothing\ntrain: {epochs: 3}\n")
    _, _, _, path, word = again(locate(str(run)))
    own, once_more = load_config(path), load_config(path, [word])
    assert once_more.digest() == own.digest()
    assert once_more.run_name() == "a run-again" != own.run_name()
