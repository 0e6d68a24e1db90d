"""The progress bar of a run: its number of epochs, also if stages or candidates stop early."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from dmtg_core import InputSpec, Task
from pipelines.config.loading import Config
from pipelines.training.progress import LiveDisplay, Plan, figures
from tests.pipelines.conftest import make_config

INPUT = InputSpec("image", (16, 16, 3), "uint8")
TASKS = tuple(Task(name, "binary") for name in "abc")
SEARCH = {"method": "guided", "affinity_share": 0.2, "affinity_limit": 0.5}


def config_of(tmp_path: Path, **search: Any) -> Config:
    return make_config(tmp_path, tmp_path, search=SEARCH | search, train={"epochs": 10})


def plan_of(config: Config) -> Plan:
    return Plan.of(config, config.network_spec(INPUT, TASKS))


def records(*stages: tuple[str, int]) -> list[dict[str, Any]]:
    """Stages with their epochs, in order; a repeated stage continues its count."""
    seen: dict[str, int] = {}
    found = []
    for stage, epochs in stages:
        for _ in range(epochs):
            seen[stage] = seen.get(stage, 0) + 1
            found.append({"stage": stage, "epoch": seen[stage]})
    return found


SEARCHED = (("naive_mtl", 10), ("affinity", 3), ("guided", 5), ("start_0", 5), ("wide", 5))


def test_at_the_start_the_most_possible_epochs_are_counted(tmp_path: Path) -> None:
    plan = plan_of(config_of(tmp_path))
    assert plan.total([]) == 10 + 5 + 3 * 10 + 10 + 10
    assert plan_of(config_of(tmp_path, baseline=False, distil_share=0)).total([]) == 5 + 3 * 10 + 10
    for never in ({"retrain": False}, {"wide": False, "starts": 2}):
        assert plan_of(config_of(tmp_path, **never)).total([]) == 10 + 5 + 3 * 10 + 10
    assert plan_of(config_of(tmp_path, method="dmtg", starts=3)).total([]) == 10 + 3 * 5 + 5


def test_epochs_of_stages_that_end_early_and_candidates_that_stop_are_not_counted(tmp_path: Path) -> None:
    plan = plan_of(config_of(tmp_path))
    assert plan.total(records(*SEARCHED[:2])) == 10 + 5 + 3 * 10 + 10 + 10
    assert plan.total(records(*SEARCHED)) == 10 + 3 + 3 * 10 + 10 + 10
    continued = records(*SEARCHED, ("wide", 5))  # the two before it stopped with the search
    assert plan.total(continued) == 10 + 3 + 3 * 5 + 5 + 10 + 10
    for last in ([("distilled", 10)], [("retrained", 10), ("distilled", 10)]):
        ended = records(*SEARCHED, ("guided", 5), ("wide", 5), *last)
        assert plan.total(ended) == len(ended)
    stopped = (*SEARCHED, ("guided", 2), ("wide", 3), ("retrained", 4))  # early stopping
    assert plan.total(records(*stopped)) == 10 + 3 + 15 + 2 + 3 + 10 + 10
    ended = records(*stopped, ("distilled", 10))
    assert plan.total(ended) == len(ended)
    retrained = records(*SEARCHED, ("guided", 5), ("wide", 5), ("retrained", 4))
    assert plan.total(retrained) == len(retrained) + 6 + 10
    assert plan.epochs_of(retrained[-1]) == 10


def test_the_bar_counts_epochs_and_steps_and_no_step_of_an_ended_epoch_twice(tmp_path: Path) -> None:
    plan, out = plan_of(config_of(tmp_path)), io.StringIO()
    live = LiveDisplay(plan, Console(file=out, force_terminal=True, width=120))
    done = [r | {"train_loss": {"a": 0.5}, "samples_per_second": 80.0} for r in records(("naive_mtl", 2))]
    live.show(done[:1], [], (8, 10))
    live.show(done[:1], [], (4, 10))
    (task,) = live.bar.tasks
    assert (task.completed, task.total) == (1.4, 65)
    live.show(done, [], (9, 10))
    assert task.completed == 2
    with live.bar:
        pass
    assert "epoch 3 of 65" in out.getvalue()
    assert "naive_mtl 2 of 10: loss 0.5, 80 samples/s" in out.getvalue()


def test_the_figures_have_entropy_and_groups_if_there_is_a_gate(tmp_path: Path) -> None:
    plan = plan_of(config_of(tmp_path))
    record = {"stage": "guided", "epoch": 2, "train_loss": {"a": 1.0, "b": 3.0}, "gate": {"entropy": 0.7},
              "samples_per_second": 12.0}  # fmt: skip
    gate = [{"stage": "guided", "epoch": 2, "probabilities": [[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]}]
    line = figures(plan, record, gate)
    assert line == "guided 2 of 10: loss 2, gate entropy 0.70, 2 groups so far, 12 samples/s"
