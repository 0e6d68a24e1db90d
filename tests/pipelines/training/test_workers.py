"""The number of workers of a run whose `ray.workers` is `auto`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipelines.execution.embedded import EmbeddedExecutor
from pipelines.training import workers
from pipelines.training.checks import Prepared, prepare
from pipelines.training.workers import open_workers, step_seconds, worthwhile_workers
from tests.pipelines.driver import Undisturbed

Seconds = dict[int, float]


@pytest.fixture
def data(run: Undisturbed) -> Prepared:
    return prepare(run[0], EmbeddedExecutor(run[0].ray), [].append)


def chosen(
    data: Prepared, monkeypatch: pytest.MonkeyPatch, seconds: Seconds, available: int = 8
) -> tuple[int, list[str]]:
    """The number of workers if a step takes some seconds at each size of a worker's batch."""
    monkeypatch.setattr(workers, "step_seconds", lambda network, size, device: seconds[size])
    monkeypatch.setattr(workers, "RATES", {"cpu": 1e-9, "cuda": 1e-9})  # every run is large
    logged: list[str] = []
    threads = torch.get_num_threads()
    found = worthwhile_workers(data.config, data, available, False, logged.append)
    assert torch.get_num_threads() == threads
    return found, logged


def test_a_small_run_has_one_worker_and_is_not_measured(data: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "step_seconds", lambda *_: pytest.fail("measured"))
    assert worthwhile_workers(data.config, data, 8, False, [].append) == 1


@pytest.mark.parametrize(
    ("seconds", "available", "expected"),
    [
        ({16: 100.0, 8: 60.0, 4: 40.0, 2: 39.0}, 8, 8),
        ({16: 100.0, 8: 60.0, 4: 40.0, 2: 41.0}, 8, 4),
        ({16: 100.0, 8: 90.0}, 2, 1),  # the exchange of gradients costs more
        ({16: 100.0, 8: 60.0}, 3, 2),
        ({16: 0.10, 8: 0.01}, 2, 1),  # what is saved does not pay for the start of Ray
    ],
)
def test_the_fastest_number_is_chosen(
    data: Prepared, monkeypatch: pytest.MonkeyPatch, seconds: Seconds, available: int, expected: int
) -> None:
    found, logged = chosen(data, monkeypatch, seconds, available)
    assert found == expected
    assert logged[-1].endswith(f"training with {expected}")


def test_a_number_that_cannot_share_the_data_is_left_out(data: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = data.manifest.shards
    few = replace(data.manifest, shards=shards | {"val": [replace(shards["val"][0], rows=3)]})
    small = replace(data, reader=replace(data.reader, manifest=few))
    assert chosen(small, monkeypatch, {16: 100.0, 8: 60.0, 4: 1.0})[0] == 2


def test_a_large_run_has_a_worker_for_each_gpu_of_other_machines(
    data: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "RATES", {"cpu": 1e-9, "cuda": 1e-9})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(workers, "step_seconds", lambda *_: pytest.fail("measured"))
    logged: list[str] = []
    assert worthwhile_workers(data.config, data, 5, True, logged.append) == 4
    assert logged == ["number of workers: 4, for the GPUs of the cluster"]


def test_a_configured_number_is_kept(data: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "worthwhile_workers", lambda *_: pytest.fail("measured"))
    section = data.config.ray.model_copy(update={"workers": 1})
    fixed = replace(data, config=data.config.model_copy(update={"ray": section}))
    with EmbeddedExecutor(section) as executor, open_workers(fixed, executor, [].append) as (config, same):
        assert (config, same) == (fixed.config, executor)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_step_is_measured_with_gradients_for_all_weights(data: Prepared, groups: int) -> None:
    from dmtg_core.network.grouping_network import GroupingNetwork

    spec = replace(data.config.network_spec(data.manifest.description.input, data.tasks), groups=groups)
    network = GroupingNetwork(spec)
    assert step_seconds(network, 4, torch.device("cpu")) > 0
    assert all(weight.grad is not None for weight in network.branches.parameters())
