"""A machine is drained, as before a spot machine is taken away: the run goes on elsewhere, without a step lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.runs.events import DRAINED, LOST, RESUMED
from pipelines.training.driver import train
from tests.pipelines.conftest import VIT
from tests.pipelines.driver import Undisturbed, disturbed, same, workers

pytestmark = [pytest.mark.ray, pytest.mark.soak]
STORE = 128 * 2**20
NOTICE_S = 600  # the machine stays for so long: a run that waited for its end would not end before
EPOCHS = 8
OWN = {"network": VIT, "train": {"checkpoint_every": 0, "epochs": EPOCHS}}


@pytest.fixture(scope="module")
def expected(run: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of the embedded executor."""
    driver = disturbed(run, tmp_path_factory.mktemp("undisturbed"), **OWN)
    return train(type(run[0]).model_validate(driver.values)).result


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster whose head has a CPU for a data task, and none for workers."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")  # its processes inherit it
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE})
    yield cluster
    cluster.shutdown()


def drain(cluster: Any, node: str) -> None:
    """Announce to a cluster that a node is about to be taken away."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + NOTICE_S) * 1000)
    accepted, why = GcsClient(address=cluster.address).drain_node(node, reason, "spot", deadline)
    assert accepted, why


def training_workers(node: Any) -> list[psutil.Process]:
    """The training workers on a node."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return workers(raylet.children(recursive=True))


def trained(file: Path) -> list[tuple[int, str, int]]:
    """Worker, node and number of each step that has begun."""
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return [(int(worker), node, int(step)) for worker, node, step in lines]


COUNTING = """
import sys
import time
from pipelines.cli.app import main
from pipelines.training.ray import trainer

file, sys.argv[1:] = sys.argv[1], sys.argv[2:]

def counted(values):
    import ray
    from dmtg_core.training import loop

    train_step, node = loop.train_step, ray.get_runtime_context().get_node_id()
    rank = ray.train.get_context().get_world_rank()

    def slow(*given, step, **named):
        if values["job"].estimate.exists():  # the estimate before the start trains some steps of its own
            with open(file, "a") as out:
                out.write(f"{rank} {node} {step}\\n")
        time.sleep(0.1)
        return train_step(*given, step=step, **named)

    loop.train_step = slow
    return trainer.work_on_ray(values)

trainer.run_workers.__defaults__ = (counted,)
main()
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_drained_machine_costs_the_run_no_step(
    run: Undisturbed, expected: dict[str, Any], tmp_path: Path, cluster: Any, rank: int
) -> None:
    steps = tmp_path / "steps"
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=STORE) for _ in range(2)]
    place = {"address": cluster.address, "workers": 2, "cpus_per_worker": 2, "data_cpus": 1, "max_failures": 0}
    driver = disturbed(run, tmp_path, **OWN, ray=place)
    command = driver.command()
    at = command.index("-m")
    driver.start_command([*command[:at], "-c", COUNTING, str(steps), *command[at + 2 :]])
    driver.wait_for(lambda: driver.newest() >= 2)
    held = {worker: node for worker, node, _ in trained(steps)}
    assert set(held.values()) == {node.node_id for node in nodes}
    spare = cluster.add_node(num_cpus=2, object_store_memory=STORE)
    drain(cluster, held[rank])
    driver.wait_for(lambda: training_workers(spare))
    assert driver.process is not None
    assert driver.process.wait() == 0, driver.log
    same(driver.outcome(), expected)
    # four batches an epoch, on two workers, in two stages
    assert Counter(step for _, _, step in trained(steps)) == dict.fromkeys(range(4 * EPOCHS), 4)
    assert [f"the machine of worker {rank} is" in one["message"] for one in driver.events(DRAINED)] == [True]
    assert driver.events(LOST) == []
    assert len(driver.events(RESUMED)) == 1
