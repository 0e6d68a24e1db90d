"""Workers and their machines are lost: the run resumes and ends with the figures of an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.config.loading import Config
from pipelines.config.ray_section import RaySection
from pipelines.config.validation import checked
from pipelines.data.manifest import read_manifest
from pipelines.errors import UserError
from pipelines.runs.events import HUNG, LOST, RESIZED, RESUMED
from pipelines.storage import locate
from pipelines.training.checks import check_workers
from pipelines.training.driver import train
from pipelines.training.ray.events import start_event_log
from pipelines.training.ray.trainer import run_workers
from pipelines.training.worker import Job
from tests.paths import ROOT
from tests.pipelines.conftest import VIT
from tests.pipelines.driver import CHECKPOINTS, OFTEN, Undisturbed, disturbed, kill, same, workers

pytestmark = pytest.mark.ray


def test_numbers_of_workers_with_different_epoch_lengths_are_refused(run: Undisturbed) -> None:
    manifest = read_manifest(locate(run[0].data.shards))

    def with_workers(workers: object) -> Config:
        return run[0].model_copy(update={"ray": checked(RaySection, {"workers": workers})})

    for fits in (1, 2, 8, [1, 5]):
        check_workers(with_workers(fits), manifest)
    for wrong, match in (
        ([1, 8], "has 4 batches for 1 workers and 3 for 8"),
        (17, "batch of 16 cannot be shared by 17"),
        ([2, 20], "has 19 samples for 20 workers|batch of 16"),
    ):
        with pytest.raises(UserError, match=match):
            check_workers(with_workers(wrong), manifest)


def test_a_worker_killed_in_the_middle_of_an_epoch_is_replaced(
    run: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    driver = disturbed(run, tmp_path, train=OFTEN)
    victims: list[int] = []

    def kill_one() -> None:
        while driver.newest() < 5:  # in the third epoch
            if done.wait(0.02):
                return
        victim = workers(psutil.Process().children(recursive=True))[-1]
        victims.append(victim.pid)
        kill([victim])

    done, logged = threading.Event(), []
    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        config = type(run[0]).model_validate(driver.values)
        found = train(config, logged.append)
    finally:
        done.set()
        killer.join()
    assert victims
    assert any("training on Ray with 2 workers" in line for line in logged)
    same(found.result, run[1].result)  # that of the embedded executor
    assert len(driver.epochs()) == len(set(driver.epochs())) == 8
    assert driver.newest() <= CHECKPOINTS + 1
    lost = driver.events(LOST)
    assert len(lost) == 1
    assert "its process was lost" in lost[0]["message"]
    assert f"note: {lost[0]['message']}" in logged
    assert lost[0]["message"] in found.result["notes"]
    assert len(driver.events(RESUMED)) == 1


@pytest.mark.soak
def test_a_suspended_worker_is_replaced(run: Undisturbed, tmp_path: Path) -> None:
    driver = disturbed(run, tmp_path, train=OFTEN, ray={"timeout_s": 20})
    driver.start()
    driver.wait_for(lambda: driver.newest() >= 5)
    victim = workers(driver.family())[-1]
    victim.send_signal(signal.SIGSTOP)
    driver.wait_for(lambda: driver.events(RESUMED))
    assert driver.process is not None
    assert driver.process.wait() == 0, driver.log
    same(driver.outcome(), run[1].result)
    assert driver.newest() <= CHECKPOINTS + 1
    assert ["longer than ray.timeout_s" in event["message"] for event in driver.events(LOST)] == [True]
    assert not victim.is_running()


def lost_events(
    run: Undisturbed, folder: Path, work: Callable[[dict[str, Any]], None], **ray: object
) -> list[str]:
    """The messages of a job of two workers about those that were lost."""
    config = run[0].model_copy(update={"ray": checked(RaySection, {"workers": 2, **ray})})
    event_log = start_event_log()
    run_workers(Job(config, None, None, locate(str(folder / "run")), event_log=event_log), lambda line: None, work)
    return [event["message"] for event in event_log.after(0) if event["kind"] == LOST]


@pytest.mark.soak
def test_a_worker_suspended_between_steps_is_replaced(run: Undisturbed, tmp_path: Path) -> None:
    again = tmp_path / "again"

    def work(values: dict[str, Any]) -> None:
        import ray.train

        for _ in range(2):  # the second report waits until the first one has been fetched: the start is over
            ray.train.report({})
        if ray.train.get_context().get_world_rank() == 0 and not again.exists():
            again.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
            threading.Event().wait()  # this thread can run on for a moment, and must not join the others
        ray.train.report({})  # no collective of PyTorch: its own limit would end the wait

    lost = lost_events(run, tmp_path, work, timeout_s=8)
    assert lost == ["workers were lost (worker 1: it waited for the other workers longer than ray.timeout_s)"]


@pytest.mark.soak
def test_a_worker_killed_while_it_receives_the_training_function_is_replaced(
    run: Undisturbed, tmp_path: Path
) -> None:
    again = tmp_path / "again"

    class Work:
        def __init__(self) -> None:
            self.driver = os.getpid()

        def __setstate__(self, state: dict[str, Any]) -> None:
            with contextlib.suppress(FileExistsError):  # it is not the first one
                again.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
            self.__dict__ = state

        def __call__(self, values: dict[str, Any]) -> None:
            import ray.train

            assert os.getpid() != self.driver
            ray.train.report({})

    with pytest.raises(
        UserError,
        match=r"(?s)allows no more retries: while they started: its process was lost.*run the same command again",
    ):
        lost_events(run, tmp_path, Work(), max_failures=0)
    again.unlink()
    lost = lost_events(run, tmp_path, Work(), max_failures=1)  # with the resources of those that were lost
    assert len(lost) == 1
    assert lost[0].startswith("workers were lost (while they started: its process was lost")


@pytest.mark.soak
@pytest.mark.parametrize("after_s", [0, 1, 3])
def test_a_worker_killed_while_it_starts_is_replaced(run: Undisturbed, tmp_path: Path, after_s: float) -> None:
    driver = disturbed(run, tmp_path, train=OFTEN)
    driver.start()
    driver.wait_for(lambda: workers(driver.family()))
    time.sleep(after_s)  # its process starts, joins the process group, receives the training function, begins
    kill(workers(driver.family())[-1:])
    assert driver.process is not None
    assert driver.process.wait() == 0, driver.log
    same(driver.outcome(), run[1].result)


@pytest.mark.soak
def test_hanging_workers_are_replaced_and_their_stacks_are_kept(run: Undisturbed, tmp_path: Path) -> None:
    stream = {"cache": "stream", "shards": str(tmp_path / "shards")}
    shutil.copytree(run[0].data.shards, stream["shards"])
    undisturbed = disturbed(run, tmp_path, data=stream, run={"root": str(tmp_path / "undisturbed"), "name": "s"})
    expected = train(type(run[0]).model_validate(undisturbed.values)).result
    driver = disturbed(run, tmp_path, data=stream, train=OFTEN, ray={"hung_after_s": 60})
    driver.start()
    driver.wait_for(lambda: driver.newest() >= 5)
    (shard,) = (tmp_path / "shards").glob("train-00001-*.parquet")
    shard.rename(tmp_path / "whole")
    os.mkfifo(shard)  # to open it is to wait for ever
    driver.wait_for(lambda: driver.events(LOST))
    (tmp_path / "whole").rename(shard)
    assert driver.process is not None
    assert driver.process.wait() == 0, driver.log
    same(driver.outcome(), expected)
    assert driver.newest() <= CHECKPOINTS + 1
    hung = driver.events(HUNG)
    assert hung
    for event in hung:
        assert event["message"] in driver.outcome()["notes"]
    stacks = "".join(file.read_text() for file in driver.folder.glob("hung_*.txt"))
    assert "in read" in stacks
    assert "stream.py" in stacks


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster of one machine with CPUs for a worker of two CPUs and a data task."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "object_store_memory": 128 * 2**20})
    yield cluster
    cluster.shutdown()


@pytest.mark.soak
def test_a_lost_machine_leaves_the_run_with_one_worker_less(
    run: Undisturbed, tmp_path: Path, cluster: Any
) -> None:
    config = run[0].model_validate(
        disturbed(run, tmp_path, network=VIT, run={"root": str(tmp_path / "undisturbed"), "name": "vit"}).values
    )
    undisturbed = train(config).result
    second = cluster.add_node(num_cpus=2, object_store_memory=128 * 2**20)
    place = {"address": cluster.address, "workers": [1, 2], "cpus_per_worker": 2, "resize_every_s": 5}
    driver = disturbed(run, tmp_path, network=VIT, train=OFTEN, ray=place)
    driver.start()
    driver.wait_for(lambda: driver.newest() >= 5)
    raylet = psutil.Process(second.all_processes["raylet"][0].process.pid)
    assert len(workers(raylet.children(recursive=True))) == 1
    kill([raylet, *raylet.children(recursive=True)])
    assert driver.process is not None
    assert driver.process.wait() == 0, driver.log
    same(driver.outcome(), undisturbed)
    assert driver.newest() <= CHECKPOINTS + 1
    assert len(driver.events(LOST)) >= 1
    assert ["with 1 worker (it was written by 2)" in event["message"] for event in driver.events(RESIZED)] == [
        True
    ]


@pytest.mark.soak
def test_a_new_machine_gets_a_worker(run: Undisturbed, tmp_path: Path, cluster: Any) -> None:
    place = {"address": cluster.address, "workers": [1, 2], "cpus_per_worker": 2, "resize_every_s": 5}
    driver = disturbed(run, tmp_path, network=VIT, train={"epochs": 100, **OFTEN}, ray=place)
    driver.start()
    driver.wait_for(lambda: driver.newest() >= 2)
    cluster.add_node(num_cpus=2, object_store_memory=128 * 2**20)
    driver.wait_for(lambda: driver.events(RESIZED))
    assert "with 2 workers (it was written by 1)" in driver.events(RESIZED)[0]["message"]
    resumed = driver.newest()
    driver.wait_for(lambda: driver.newest() > resumed)
    assert driver.events(LOST) == []
    driver.lose()


SHORT = """
import ray
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from pipelines.training.ray.failures import training_failed

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)

@ray.remote
class Worker:
    def train(self):
        held = bytes(200 * 2**20)
        while held:
            pass

try:
    ray.get(Worker.remote().train.remote())
except ray.exceptions.RayError as error:
    failure = WorkerHealthCheckFailedError("it failed", error)
    print(training_failed(WorkerGroupError("lost", {1: failure}), "runs/x"))
"""


@pytest.mark.soak
def test_the_error_of_a_worker_killed_for_memory_names_what_to_lower() -> None:
    # Ray considers any machine short of memory
    little = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    found = subprocess.run(
        [sys.executable, "-c", SHORT], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **little},
        check=True,
    )  # fmt: skip
    assert "worker 1: Ray ended it because its machine was running out of memory" in found.stdout
    assert "where: runs/x\nremedy: if it was memory" in found.stdout
    assert "train.batch_size" in found.stdout
