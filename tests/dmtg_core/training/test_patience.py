"""Early stopping: `TrainSettings.patience`."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmtg_core import GroupingNetwork, TrainSettings, fit, training_flops
from dmtg_core.network.cost import history_flops, naive_flops
from dmtg_core.search.baselines import hard_network, together, train_hard
from dmtg_core.search.options import SearchOptions
from dmtg_core.search.search import search
from dmtg_core.training.checkpoint import load_network
from dmtg_core.training.settings import has_stopped
from tests.dmtg_core import parallel, samples
from tests.dmtg_core.interrupted import Interrupted, interrupt_at, without_times
from tests.dmtg_core.samples import assert_same_tensors, mlp_spec, snapshot
from tests.dmtg_core.training.test_step import local

# the learning rate is so high that the validation score soon gets no better
SETTINGS = TrainSettings(epochs=12, search_share=0.25, batch_size=8, learning_rate=0.1, patience=2)


def records(scores: list[float], soft: int = 0) -> list[dict[str, Any]]:
    """A history of one task, which has two heads in the first `soft` epochs."""
    return [
        {"val_score": score, "heads": 2 if epoch < soft else 1, "val": {"t": {}}}
        for epoch, score in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("scores", "soft", "patience", "share", "expected"),
    [
        ([], 0, 1, 0.5, False),
        ([3.0, 2.0, 2.5], 0, 2, 0.5, False),
        ([3.0, 2.0, 2.5, 2.1], 0, 2, 0.5, True),
        ([3.0, 2.0, 2.5, 1.9], 0, 2, 0.5, False),
        ([3.0, 2.0, 2.0, 2.0], 0, 2, 0.5, True),  # equal is not better
        ([1.0, 2.0, 3.0, 2.5], 2, 2, 0.5, True),  # epochs with several heads count, with the likeliest ones
        ([3.0, 2.0, 2.5, 2.1], 0, 0, 0.5, False),
        ([2.0, math.inf, math.inf], 0, 2, 0.5, True),
    ],
)
def test_training_stops_after_epochs_without_a_better_score(
    scores: list[float], soft: int, patience: int, share: float, expected: bool
) -> None:
    settings = TrainSettings(epochs=10, search_share=share, patience=patience)
    assert has_stopped(records(scores, soft), settings) is expected


def best_epoch(history: list[dict[str, Any]]) -> int:
    """Number of the best epoch with one head for each task."""
    tasks = len(history[0]["val"])
    return int(min((r["val_score"], r["epoch"]) for r in history if r["heads"] == tasks)[1])


def test_a_run_ends_patience_epochs_after_its_best() -> None:
    spec = mlp_spec(stem=1)
    data = samples.data(spec.input, spec.tasks, 32, missing=0.2)
    whole = fit(GroupingNetwork(spec), data, replace(SETTINGS, patience=0), local())
    early = fit(GroupingNetwork(spec), data, SETTINGS, local())
    assert len(whole.history) == 12
    assert SETTINGS.search_epochs + 2 <= early.epoch == best_epoch(early.history) + 2 < 12
    for mine, other in zip(without_times(early.history), without_times(whole.history), strict=False):
        assert {**mine, "warnings": []} == {**other, "warnings": []}
    assert early.best_score == min(r["val_score"] for r in early.history[best_epoch(early.history) - 1 :])


def test_a_resumed_run_ends_in_the_same_epoch(tmp_path: Path) -> None:
    spec = mlp_spec(stem=1)
    data = samples.data(spec.input, spec.tasks, 32, missing=0.2)
    expected = fit(GroupingNetwork(spec), data, SETTINGS, local())
    for epoch in (1, expected.epoch - 1, expected.epoch):
        folder = tmp_path / str(epoch)
        with pytest.raises(Interrupted):
            fit(GroupingNetwork(spec), data, SETTINGS, local(folder, on_record=interrupt_at(epoch)))
        resumed = fit(GroupingNetwork(spec), data, SETTINGS, local(folder))
        assert without_times(resumed.history) == without_times(expected.history)
        assert_same_tensors(snapshot(resumed.network), snapshot(expected.network))
    again = fit(GroupingNetwork(spec), data, SETTINGS, local(folder, on_record=lambda _: pytest.fail("trained")))
    assert_same_tensors(snapshot(again.network), snapshot(expected.network))


PARALLEL = replace(parallel.SETTINGS, epochs=12, search_share=0.25, learning_rate=0.2, patience=2)


def train(rank: int, workers: int, folder: Path) -> None:
    """The function of one process."""
    spec = parallel.spec_for("gumbel")
    data = samples.data(
        spec.input, spec.tasks, parallel.ROWS, missing=parallel.MISSING, rank=rank, world_size=workers
    )
    state = fit(GroupingNetwork(spec), data, PARALLEL, parallel.ProcessContext())
    parallel.save_network(folder / f"rank_{rank}", state.network)
    (folder / f"rank_{rank}" / "history.json").write_text(json.dumps(state.history))


def test_two_workers_end_in_the_epoch_of_one(two_processes: parallel.Group, tmp_path: Path) -> None:
    spec = parallel.spec_for("gumbel")
    data = samples.data(spec.input, spec.tasks, parallel.ROWS, missing=parallel.MISSING)
    single = fit(GroupingNetwork(spec), data, PARALLEL, local())
    assert single.epoch < 12
    two_processes(train, tmp_path)
    histories = [json.loads((tmp_path / f"rank_{rank}" / "history.json").read_text()) for rank in range(2)]
    assert [r["val_score"] for r in histories[0]] == [r["val_score"] for r in histories[1]]
    assert [len(history) for history in histories] == [single.epoch] * 2
    assert_same_tensors(*(snapshot(load_network(tmp_path / f"rank_{rank}")) for rank in range(2)))


def test_costs_count_the_epochs_that_were_trained() -> None:
    spec = mlp_spec()
    data = samples.data(spec.input, spec.tasks, 32, missing=0.2)
    epochs: list[int] = []
    naive = train_hard(
        hard_network(spec, together(spec)), data, SETTINGS, context=local(),
        on_epoch=lambda state: epochs.append(state.epoch),
    )  # fmt: skip
    assert epochs[-1] < 12
    assert naive.cost == pytest.approx(epochs[-1] / 12)

    shown: list[dict[str, Any]] = []
    options = SearchOptions(method="dmtg")
    found = search(spec, data, SETTINGS, options, context=local(on_record=shown.append))
    history = [record for record in shown if record["stage"] == "start_0"]
    assert SETTINGS.search_epochs < len(history) < 12
    assert found.cost == pytest.approx(history_flops(spec, history) / (12 * naive_flops(spec)))
    assert found.cost < len(history) * training_flops(GroupingNetwork(spec)) / (12 * naive_flops(spec))


def test_the_distillation_stops_too() -> None:
    spec = mlp_spec()
    data = samples.data(spec.input, spec.tasks, 32, missing=0.2)
    shown: list[dict[str, Any]] = []
    options = SearchOptions(budget=40, within=10.0)
    search(spec, data, SETTINGS, options, context=local(on_record=shown.append))
    stages = {stage: [r for r in shown if r["stage"] == stage] for stage in {r["stage"] for r in shown}}
    assert {"naive_mtl", "distilled"} <= stages.keys()
    for stage in ("naive_mtl", "distilled"):
        count = len(stages[stage])
        assert [has_stopped(stages[stage][:n], SETTINGS) for n in range(1, count)] == [False] * (count - 1)
        assert has_stopped(stages[stage], SETTINGS)
        assert count < 12
