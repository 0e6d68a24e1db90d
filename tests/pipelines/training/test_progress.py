"""The progress bar of a run: by spent training with a budget, else by epochs, and never beyond its end."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dmtg_core import InputSpec, SearchOptions, Task, search
from pipelines.config.loading import Config
from pipelines.training.progress import LiveDisplay, Plan, figures
from tests.dmtg_core import samples
from tests.dmtg_core.searches import SETTINGS, SPEC, local
from tests.pipelines.conftest import make_config

INPUT = InputSpec("image", (16, 16, 3), "uint8")
TASKS = tuple(Task(name, "binary") for name in "abc")
Records = list[dict[str, Any]]


def config_of(tmp_path: Path, **search: Any) -> Config:
    return make_config(tmp_path, tmp_path, search={"method": "guided"} | search, train={"epochs": 10})


def plan_of(config: Config) -> Plan:
    return Plan.of(config, config.network_spec(INPUT, TASKS))


def records(*stages: tuple[str, int], each: float = 0.0) -> Records:
    """Stages with their epochs, in order; an epoch of the search costs `each` runs."""
    seen: dict[str, int] = {}
    spent, found = 0.0, []
    for stage, epochs in stages:
        for _ in range(epochs):
            seen[stage] = seen.get(stage, 0) + 1
            spent += each if stage != "naive_mtl" else 0.0
            found.append({"stage": stage, "epoch": seen[stage], "spent": spent,
                          "train_loss": {"a": 0.5}, "samples_per_second": 80.0})  # fmt: skip
    return found


def test_the_total_is_the_budget_and_the_baseline_in_runs_or_the_epochs_of_a_search_of_fixed_length(
    tmp_path: Path,
) -> None:
    assert plan_of(config_of(tmp_path)).total == 4 + 1  # K + 2 with K = 2
    assert plan_of(config_of(tmp_path, budget=7.5, baseline=False)).total == 7.5
    assert plan_of(config_of(tmp_path, budget="auto")).total == 4 * 4 + 1
    assert plan_of(config_of(tmp_path, method="dmtg", starts=3)).total == 10 + 3 * 5 + 5
    one = make_config(tmp_path, tmp_path, search={"method": "guided"}, train={"epochs": 10}, network={"groups": 1})
    assert plan_of(one).total == 10 + 10


def test_with_a_budget_the_bar_follows_what_was_spent(tmp_path: Path) -> None:
    plan = plan_of(config_of(tmp_path))
    found = records(("naive_mtl", 10), ("wide", 2), ("guided", 2), each=0.25)
    assert [plan.done(r) for r in found[:2]] == [0.1, 0.2]
    assert [plan.done(r) for r in found[9:]] == [1.0, 1.25, 1.5, 1.75, 2.0]
    stopped = records(("naive_mtl", 4), ("wide", 1), each=0.25)
    assert plan.done(stopped[-1]) == 1.25  # a baseline that stopped early counts as one run
    assert plan.text(1.25) == "1.2 of 5 runs of naive MTL"
    (dear,) = records(("wide", 1), each=9.0)
    assert plan.done(dear) == plan.total  # one epoch can cost more than the budget


def test_without_a_budget_stages_that_end_early_count_in_full(tmp_path: Path) -> None:
    plan = plan_of(config_of(tmp_path, method="dmtg", starts=2))
    found = records(("naive_mtl", 6), ("start_0", 5), ("start_1", 3), ("start_0", 5))
    done = [plan.done(record) for record in found]
    assert done == [*range(1, 7), *range(11, 16), *range(16, 19), *range(21, 26)]
    assert plan.total == 25
    assert [plan.text(value) for value in (0, 9, 24, 25)] == [
        "epoch 1 of 25", "epoch 10 of 25", "epoch 25 of 25", "epoch 25 of 25",
    ]  # fmt: skip


@pytest.mark.parametrize("options", [
    SearchOptions(), SearchOptions(budget=1), SearchOptions(budget=6, within=10.0),
    SearchOptions(method="dmtg", starts=2),
], ids=lambda options: f"{options.method}-{options.budget}")  # fmt: skip
def test_the_bar_of_a_search_neither_goes_back_nor_passes_its_end(options: SearchOptions) -> None:
    found: Records = []
    data = samples.data(SPEC.input, SPEC.tasks, missing=0.2)
    search(SPEC, data, SETTINGS, options, context=local(on_record=lambda record: found.append(dict(record))))
    fixed = options.method == "dmtg"
    plan = Plan(
        SETTINGS.epochs, True, None if fixed else asdict(options)["budget"] or SPEC.groups + 2,
        tuple(options.candidates(SPEC)) if fixed else (), SETTINGS.search_epochs,
    )  # fmt: skip
    live = LiveDisplay(plan, Console(file=io.StringIO(), force_terminal=True))
    (task,) = live.bar.tasks
    shown = []
    for count in range(1, len(found) + 1):
        live.show(found[:count], [], (2, 4))
        live.show(found[:count], [], (3, 4))
        shown.append(task.completed)
        assert task.completed >= plan.done(found[count - 1])
    assert shown == sorted(shown)
    assert shown[-1] <= plan.total
    live.end()
    assert task.completed == task.total == plan.total


def test_steps_of_an_ended_epoch_do_not_count_twice(tmp_path: Path) -> None:
    plan, out = plan_of(config_of(tmp_path, method="dmtg")), io.StringIO()
    live = LiveDisplay(plan, Console(file=out, force_terminal=True, width=120))
    done = records(("naive_mtl", 2))
    live.show(done[:1], [], (8, 10))
    live.show(done[:1], [], (4, 10))
    (task,) = live.bar.tasks
    assert (task.completed, task.total) == (1.4, 20)
    live.show(done, [], (9, 10))
    assert task.completed == 2
    with live.bar:
        pass
    assert "epoch 3 of 20" in out.getvalue()
    assert "naive_mtl epoch 2: loss 0.5, 80 samples/s" in out.getvalue()


def test_the_figures_have_entropy_and_groups_if_there_is_a_gate() -> None:
    record = {"stage": "guided", "epoch": 2, "train_loss": {"a": 1.0, "b": 3.0}, "gate": {"entropy": 0.7},
              "samples_per_second": 12.0}  # fmt: skip
    gate = [{"stage": "guided", "epoch": 2, "probabilities": [[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]}]
    assert figures(record, gate) == "guided epoch 2: loss 2, gate entropy 0.70, 2 groups so far, 12 samples/s"
