"""The texts of a run's report on groups, gain and cost, and the order of its plots."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dmtg_core import Grouping
from pipelines.cli.train import _print_summary, _selection
from pipelines.config.loading import load_config
from pipelines.report.figures import branches, curve, ordered
from pipelines.report.run import (
    capacity_text,
    cost_text,
    facts,
    gain_text,
    gate_records,
    gate_text,
    groups_text,
    plotted_gate,
    retrain_command,
    verdict,
)
from pipelines.runs.outcome import ONE_ENCODER, network_of, outcome, spent_text
from pipelines.runs.results import ALL, NAIVE
from pipelines.storage import locate
from pipelines.training.driver import Trained


def candidate(stage: str, score: float, final: float | None, branches: int = 2) -> dict[str, Any]:
    return {"stage": stage, "score": score, "final": final, "probabilities": [[1 / branches] * branches] * 3}


def result(chosen: str, gain: float | None = 4.0) -> dict[str, Any]:
    together = chosen in ("wide", "wide_1", "naive_mtl")
    groups = {"group_0": ["a", "b", "c"]} if together else {"group_0": ["a", "b"], "group_1": ["c"]}
    return {
        "chosen": chosen,
        "grouping": groups,
        "metrics": {"a": {}, "b": {}, "c": {}},
        "split": "test",
        "normalized_gain": gain,
        "baseline": {},
        "distilled": {},
        "inference": {"flops": 300, "parameters": 30},
        "groups_inference": {"flops": 310, "parameters": 31},
        "candidates": [
            candidate("guided", -1.0, None), candidate("start_0", -1.2, -1.3), candidate("wide", -1.1, -1.4, 1)
        ],
    }  # fmt: skip


OVER = "gain over one shared encoder (naive MTL) on test, in one run."
NONE = "No grouping helps here: one"


def test_the_verdict_names_the_result_and_its_gain() -> None:
    compared = {"baseline": {"a": {}}}
    assert verdict(result("start_0") | compared) == f"3 tasks in 2 groups: +4.0 % {OVER}"
    assert verdict(result("start_0", gain=None)) == "3 tasks in 2 groups."
    wide = f"{NONE} wide encoder, at the inference cost of all groups."
    assert verdict(result("wide") | compared) == verdict(result("wide_1") | compared) == f"{wide} +4.0 % {OVER}"
    assert verdict(result("wide", gain=None)) == wide
    naive = result("naive_mtl", gain=0.0) | compared | {"inference": {"flops": 100, "parameters": 10}}
    assert verdict(naive) == f"{NONE} encoder, 3.1 times cheaper at inference."


def test_a_gate_that_keeps_one_branch_is_one_encoder_too() -> None:
    found = result("start_0") | {"grouping": {"group_0": ["a", "b", "c"]}}
    cheap = found | {"inference": {"flops": 100, "parameters": 10}}
    assert (outcome(cheap), network_of(cheap)) == (f"{NONE} encoder, 3.1 times cheaper at inference.", ONE_ENCODER)
    unknown = found | {"groups_inference": None}  # a run of an earlier version
    assert outcome(unknown) == f"{NONE} encoder."
    single = found | {"candidates": [candidate("start_0", -1.0, -1.0, 1)]}
    assert outcome(single) == "One encoder for all tasks: no grouping was searched."


def test_the_outcome_names_the_groups_in_the_order_of_their_numbers() -> None:
    found = result("guided") | {"grouping": {"group_10": ["c"], "group_9": ["a", "b, c"]}}
    assert outcome(found) == '2 groups: a, "b, c" | c'
    many = outcome(found | {"grouping": {f"group_{k}": [f"task_{k}"] for k in range(50)}})
    assert many.startswith("50 groups: task_0 | task_1")
    assert len(many) < 120
    assert many.endswith("…")


def test_the_plotted_gate_is_the_gate_of_the_result_or_the_best_one() -> None:
    assert plotted_gate(result("start_0")) == "start_0"
    assert plotted_gate(result("guided")) == "guided"
    assert plotted_gate(result("wide")) == plotted_gate(result("naive_mtl")) == "start_0"
    found = result("groups_1")
    found["candidates"] += [
        candidate("groups_1", -1.5, -1.5)
    ]  # its groups are those of start_0, trained to the end
    assert plotted_gate(found) == "start_0"
    alone = result("start_0") | {"candidates": [candidate("start_0", 0.0, 0.0, branches=1)]}
    assert plotted_gate(alone) == ""


def test_the_terminal_has_the_groups_in_the_order_of_their_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [f"t{n}" for n in (1, 0, *range(2, 24))]
    found = result("start_0", gain=None) | {
        "grouping": {f"group_{k}": tasks[2 * k : 2 * k + 2] for k in range(12)}, "grouping_name": "g12",
        "metrics": {task: {"loss": 1.0} for task in tasks[::2] + tasks[1::2]}, "baseline": {}, "notes": [],
        "headline": dict.fromkeys(tasks, "loss"), "candidates": [],
    }  # fmt: skip
    _print_summary(load_config("planted"), Trained(locate("run"), "", found, [], False))
    rows = re.findall(r"(group_\d+) +(t\d+)", capsys.readouterr().out)
    assert rows == [(name, task) for name, held in found["grouping"].items() for task in held]


def test_the_terminal_lists_the_scores_and_where_the_budget_went() -> None:
    found = result("start_0") | {"training_cost": 12.75}
    scores = "start_0 (guided -1.0000 dropped, start_0 -1.3000, wide -1.4000"
    assert _selection(found) == f"chosen on validation: {scores}); spent 12.8 runs of naive MTL"
    found |= {"baseline_score": -0.9, "budget": 13.0, "costs": {
        "naive_mtl": 1.0, "guided": 1.5, "start_0": 6.25, "wide": 3.0, "distilled": 2.0,
    }}  # fmt: skip
    found["distilled"] = {"teachers": ["start_0", "wide"], "final": -1.5}
    parts = "start_0 6.2, dropped candidates 1.5, further networks 3.0, distillation 2.0, the baseline is 1.0 more"
    assert _selection(found) == (
        f"chosen on validation: {scores}, naive_mtl -0.9000); distilled from start_0, wide: -1.5000; "
        f"spent 12.8 of 13 runs of naive MTL ({parts})"
    )
    fixed = found | {"budget": None, "costs": {"start_0": 2.0}, "training_cost": 2.0}
    assert spent_text(fixed) == "2.0 runs of naive MTL"


def test_the_terminal_shows_a_gain_as_positive(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(1.0, 2.0) | {"grouping_name": "g2", "notes": [], "candidates": []}
    _print_summary(load_config("planted"), Trained(locate("run"), "", found, [], False))
    logged = capsys.readouterr().out
    assert logged.startswith("2 groups: a, b | c\n")
    assert "gain over naive MTL: +20.0 % (one run; other seeds vary)" in logged
    assert len(re.findall(r"\+50\.0 %", logged)) == 2
    assert "-50.0 %" in logged


def test_naive_mtl_as_the_result_has_no_gain_over_itself(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(2.0, 2.0, gain=0.0) | result("naive_mtl", gain=0.0) | {"grouping_name": "g1", "notes": []}
    scores = {task: {"rmse": 2.0} for task in "abc"}
    found |= {"metrics": scores, "baseline": scores, "inference": {"flops": 100, "parameters": 10}}
    _print_summary(load_config("planted"), Trained(locate("run"), "", found, [], False))
    logged = capsys.readouterr().out
    assert logged.startswith(f"{NONE} encoder, 3.1 times cheaper at inference.\n")
    assert "gain over naive MTL" not in logged
    shown = facts(found, {}, None)
    assert shown["groups"] == "a, b, c together."
    assert shown["gate"] == "One encoder has no gate."
    assert "gain" not in shown
    assert "capacity" not in shown


SURE = [[0.9, 0.1], [0.7, 0.3], [0.6, 0.4]]


def test_the_text_of_the_gate_names_the_tasks_on_which_it_has_not_converged() -> None:
    found = result("start_0")
    assert (
        gate_text(found, SURE) == "When the groups were fixed, the probability of a task's branch was 60% to 90%."
    )
    uncertain = gate_text(found, [[0.9, 0.1, 0.0], [0.4, 0.3, 0.3], [0.2, 0.45, 0.35]])
    assert uncertain.endswith("40% to 90%. It was below 50% for b, c.")
    assert "has no gate" in gate_text(result("wide"), None)
    assert gate_text(result(""), None) == ""


def test_the_text_of_the_groups() -> None:
    assert groups_text(result("start_0")) == "a, b together; c alone."
    assert groups_text(result("wide")) == "All tasks share one wide encoder."


def measured(value: float, base: float, gain: float = 20.0) -> dict[str, Any]:
    scores = {"rmse": value}
    return result("start_0", gain) | {
        "metrics": {"a": scores, "b": scores, "c": {"rmse": 3.0}},
        "baseline": {task: {"rmse": base} for task in "abc"},
        "headline": dict.fromkeys("abc", "rmse"),
        "inference": {"flops": 3_000_000, "parameters": 10},
        "training_cost": 5.25,
    }  # fmt: skip


def test_the_text_of_the_gain_has_its_interval_or_says_that_there_is_none() -> None:
    alone = gain_text(measured(1.0, 2.0), None)
    assert alone.startswith(
        "+20.0 % over naive MTL, the mean over tasks. 2 of 3 tasks are better. There is no confidence interval:"
    )
    ends = {"gain": {"value": 20.0, "low": 15.0, "high": 30.0}, "by_task": {}, "confidence": 0.95, "samples": 64}
    assert "95% confidence interval over the 64 samples: +15.0 % to +30.0 %." in gain_text(
        measured(1.0, 2.0), ends
    )
    undefined = ends | {"gain": {"value": None, "low": None, "high": None}}
    assert gain_text(measured(1.0, 2.0), undefined) == alone


def test_the_text_of_the_cost_is_relative_to_naive_mtl_if_both_were_measured() -> None:
    rows = [
        {"name": ALL, "flops": 30, "milliseconds": [6.0, 9.0]},
        {"name": NAIVE, "flops": 20, "milliseconds": [4.0, 5.0]},
    ]  # fmt: skip
    text = cost_text(measured(1.0, 2.0), {"rows": rows})
    assert text.startswith("Inference takes 1.5 times the operations and 1.5 times the time of naive MTL.")
    assert text.endswith("Training cost 5.2 runs of naive MTL.")
    assert cost_text(measured(1.0, 2.0), None).startswith("Inference takes 3 million operations a sample.")


def test_the_text_of_the_capacity_compares_the_result_with_the_wide_encoder() -> None:
    """The scores are mean logarithms: a difference of -0.1 is a mean that is lower by 9.5 %."""
    both = [candidate("start_0", -1.0, -1.5), candidate("wide", -1.1, -1.4, 1)]
    found = result("start_0") | {"candidates": both, "distilled": {}}
    assert capacity_text(found) == (
        "On validation, the gain is +9.5 % over one wide encoder with the same inference cost. It is that of the "
        "validation score, the mean logarithm of losses and errors."
    )
    found["distilled"] = {"kept": True}
    both[1] |= {"final": None}
    assert capacity_text(found).startswith("On validation, the gain before distillation is -10.5 % over one wide")
    assert "cost, which was dropped earlier." in capacity_text(found)
    assert capacity_text(result("wide")) == capacity_text(found | {"candidates": []}) == ""


def test_without_naive_mtl_there_is_no_gain() -> None:
    found = facts(measured(1.0, 2.0) | {"normalized_gain": None}, {}, SURE)
    assert list(found) == ["groups", "gate", "capacity", "cost"]


def test_branches_have_the_names_of_their_groups() -> None:
    gate = [[0.1, 0.2, 0.7, 0.0], [0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.6, 0.2], [0.2, 0.1, 0.0, 0.7]]
    assert branches(gate) == ["group_1", "", "group_0", "group_2"]
    groups = Grouping.from_assignment(list("abcd"), [2, 0, 2, 3]).to_dict()
    for task, row in zip("abcd", gate, strict=True):
        assert task in groups[branches(gate)[row.index(max(row))]]
    assert ordered(gate) == ([0, 2, 1, 3], [2, 0, 3, 1])  # lines of a group are adjacent, an empty branch is last


def test_a_line_joins_its_task_to_its_branch() -> None:
    x, y = curve(3.0, -0.5)
    assert (x[0], y[0], x[-1], y[-1]) == (0.0, 3.0, 1.0, -0.5)


def test_the_gate_of_an_older_run_is_plotted_only_if_it_had_one_start() -> None:
    found = result("") | {"candidates": []}
    records = [
        {"stage": "naive_mtl", "phase": "search", "probabilities": [[1.0]] * 3},
        {"stage": "start_0", "phase": "search", "probabilities": SURE},
        {"stage": "finetune", "phase": "finetune", "probabilities": SURE},
    ]
    assert [record["stage"] for record in gate_records(records, found)] == ["start_0"]
    several = [*records, records[1] | {"stage": "start_1"}]
    assert gate_records(several, found) == []


def test_the_command_in_the_report_trains_the_same_configuration_in_a_new_folder(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    run.mkdir()
    (run / "config.yaml").write_text("base: clothing\ntrain: {epochs: 3}\n")
    _, _, _, path, override = retrain_command(locate(str(run)))
    own, once_more = load_config(path), load_config(path, [override])
    assert once_more.digest() == own.digest()
    assert once_more.run_name() == "a run-again" != own.run_name()
