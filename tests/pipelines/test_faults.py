"""Workers, machines, storage and the command itself are lost: the run ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest

from pipelines import storage
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.manifest import read_manifest
from pipelines.notices import DAMAGED, HUNG, LOST, RESIZED, RESUMED, UNWRITTEN, on_board, start_board
from pipelines.sections import RaySection, checked
from pipelines.storage import locate
from pipelines.train import check_workers, run_workers, train
from pipelines.versions import list_models
from pipelines.worker import Job, read_jsonl
from tests.pipelines.conftest import make_config
from tests.pipelines.driver import ROOT, Driver, Undisturbed, disturbed, in_own_mounts, kill, same, workers
from tests.pipelines.s3_server import BUCKET, begin, end, free_port, serving, settings

pytestmark = pytest.mark.ray
CHECKPOINTS = 16  # of an undisturbed run: one in the middle of each of eight epochs, and one at its end
OFTEN = {"checkpoint_every": 2}


def test_numbers_of_workers_that_would_cut_other_epochs_are_refused(run: Undisturbed) -> None:
    manifest = read_manifest(locate(run[0].data.shards))

    def asked(workers: object) -> Config:
        return run[0].model_copy(update={"ray": checked(RaySection, {"workers": workers})})

    for fits in (1, 2, 8, [1, 5]):
        check_workers(asked(fits), manifest)
    for wrong, match in (
        ([1, 8], "has 4 batches for 1 workers and 3 for 8"),
        (17, "batch of 16 cannot be shared by 17"),
        ([2, 20], "has 19 samples for 20 workers|batch of 16"),
    ):
        with pytest.raises(UserError, match=match):
            check_workers(asked(wrong), manifest)


def test_a_worker_killed_in_the_middle_of_an_epoch_is_replaced(
    run: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    driver = disturbed(run, tmp_path, train=OFTEN)
    victims: list[int] = []

    def murder() -> None:
        while driver.newest() < 5:  # in the third epoch
            if done.wait(0.02):
                return
        victim = workers(psutil.Process().children(recursive=True))[-1]
        victims.append(victim.pid)
        kill([victim])

    done, said = threading.Event(), []
    murderer = threading.Thread(target=murder)
    murderer.start()
    try:
        config = type(run[0]).model_validate(driver.values)
        found = train(config, said.append)
    finally:
        done.set()
        murderer.join()
    assert victims
    same(found.result, run[1].result)
    assert len(driver.epochs()) == len(set(driver.epochs())) == 8
    assert driver.newest() <= CHECKPOINTS + 1
    told = driver.events(LOST)
    assert len(told) == 1
    assert "its process was lost" in told[0]["message"]
    assert f"note: {told[0]['message']}" in said
    assert told[0]["message"] in found.result["notes"]
    assert len(driver.events(RESUMED)) == 1


@pytest.mark.soak
@pytest.mark.parametrize(
    ("sent", "code", "damaged"),
    [
        (signal.SIGTERM, 143, True),
        (signal.SIGTERM, 143, False),
        (signal.SIGINT, 130, False),
        (signal.SIGKILL, -9, True),
    ],
)
def test_a_command_that_is_ended_goes_on_with_the_same_words(
    run: Undisturbed, tmp_path: Path, sent: signal.Signals, code: int, damaged: bool
) -> None:
    track = {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    driver = disturbed(run, tmp_path, train=OFTEN, track=track)
    process = driver.start()
    driver.wait_for(lambda: driver.newest() >= 5)
    family = driver.family()
    if sent == signal.SIGKILL:
        driver.lose()
    process.send_signal(sent)
    assert process.wait() == code, driver.log
    psutil.wait_procs(family)  # Ray's processes end with it
    tracked = mlflow.MlflowClient(track["uri"])
    run_id = json.loads((driver.folder / "tracking.json").read_text())["run_id"]
    if sent != signal.SIGKILL:
        what = "terminated" if sent == signal.SIGTERM else "interrupted"
        assert f"dmtg train stopped\nwhat: {what}\nwhere: {driver.folder}\nremedy: the same command" in driver.log
        assert driver.outcome()["status"] == "failed"
        assert tracked.get_run(run_id).info.status == "FAILED"
    expected = []
    if damaged:
        newest = driver.checkpoints()[-1]
        weights = next(newest.rglob("network.safetensors"))
        expected = [f"{newest.name} is passed over: missing or damaged: {weights.relative_to(newest)}"]
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)

    found = driver.finish()
    same(found, run[1].result)
    assert len(driver.epochs()) == len(set(driver.epochs())) == 8
    assert driver.newest() <= CHECKPOINTS + 1 + damaged
    passed = [told["message"] for told in driver.events(DAMAGED)]
    assert passed == expected
    assert set(passed) <= set(found["notes"])
    assert all(f"note: {message}" in driver.log for message in passed)
    assert tracked.get_run(run_id).info.status == "FINISHED"
    assert {model["version"] for model in list_models(run[0].track.model_copy(update=track))} == {1}


@pytest.mark.usefixtures("ray_session")
@pytest.mark.soak
def test_a_result_that_cannot_be_written_is_written_later_without_training_again(
    images: Path, tmp_path: Path
) -> None:
    config = make_config(
        images, tmp_path, train={"epochs": 2}, search={"baseline": False}, track={"uri": "none"},
        run={"name": "disturbed"},
    )  # fmt: skip
    driver = Driver(tmp_path, {})
    driver.folder.mkdir(parents=True)
    (driver.folder / "models").write_text("in the way of a folder")
    with pytest.raises(UserError, match="training is done, its result") as found:
        train(config)
    assert "models" in found.value.where
    assert "without training again" in found.value.remedy
    newest = driver.newest()
    assert newest == 2
    (driver.folder / "models").unlink()
    done = train(config)
    assert driver.newest() == newest
    assert driver.epochs() == [("start_0", 1), ("start_0", 2)]
    assert set(done.result["metrics"]) == {"colour", "bright", "level"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[tuple[str, ...], Path, Path]]:
    """A disk of a few MiB in a namespace: words to be there, and the disk as seen from here and from there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=6m none '{disk}' && echo ready && exec sleep infinity"
    with subprocess.Popen([*in_own_mounts(), "sh", "-c", mount], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        words = (
            "nsenter",
            f"--target={holder.pid}",
            "--user",
            "--mount",
            "--preserve-credentials",
            f"--wd={ROOT}",
        )
        yield words, Path(f"/proc/{holder.pid}/root{disk}"), disk
        holder.kill()


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


@pytest.mark.soak
def test_a_disk_that_is_full_costs_checkpoints_and_no_training(
    run: Undisturbed, tmp_path: Path, small_disk: tuple[tuple[str, ...], Path, Path]
) -> None:
    words, here, there = small_disk
    driver = disturbed(run, tmp_path, train=OFTEN, run={"root": str(there / "runs"), "name": "disturbed"})
    driver.before, driver.place = words, here
    driver.start()
    driver.wait_for(lambda: driver.newest() >= 4)
    filler = fill(here)
    driver.wait_for(lambda: "cannot be written" in driver.log)
    filler.unlink()
    assert driver.process is not None
    assert driver.process.wait() == 0, driver.log
    same(driver.outcome(), run[1].result)
    assert driver.epochs()[-1] == ("start_0", 4)
    assert len(driver.epochs()) == 8
    assert driver.newest() == CHECKPOINTS  # the numbers of those that were lost are not used again
    assert len(list((driver.folder / "checkpoints").iterdir())) == 2
    assert driver.events(RESUMED, LOST) == []
    first, last = (told["message"] for told in driver.events(UNWRITTEN))
    assert "No space left on device" in first
    assert "again" in last


@pytest.mark.soak
def test_no_room_for_temporary_files_costs_checkpoints_and_no_training(
    run: Undisturbed, tmp_path: Path, small_disk: tuple[tuple[str, ...], Path, Path]
) -> None:
    words, here, there = small_disk
    driver = disturbed(run, tmp_path, train=OFTEN)
    driver.before = words
    driver.start(TMPDIR=str(there), RAY_TMPDIR="/tmp")  # noqa: S108 - Ray's own files are not what is tested
    driver.wait_for(lambda: driver.newest() >= 4)
    filler = fill(here)
    driver.wait_for(lambda: "is lost, training goes on" in driver.log)
    filler.unlink()
    assert driver.process is not None
    assert driver.process.wait() == 0, driver.log
    same(driver.outcome(), run[1].result)
    assert driver.newest() == CHECKPOINTS
    assert driver.events(RESUMED, LOST) == []
    assert list(here.glob("dmtg-*")) == []


@pytest.mark.soak
def test_storage_that_is_away_for_half_a_minute_is_waited_for(
    run: Undisturbed, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    port, data = free_port(), tmp_path_factory.mktemp("s3-away")  # one of its own, which can be stopped
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings(port).items():
            patch.setenv(key, value)
        storage._s3.cache_clear()
        with serving(port, data):
            root = f"s3://{BUCKET}/away"
            driver = disturbed(run, tmp_path, train=OFTEN, run={"root": root, "name": "disturbed"})
            driver.start(**settings(port))
            driver.wait_for(lambda: driver.log.count(" score ") >= 3)
            end(port, data)
            time.sleep(30)  # as long as it is to be away
            begin(port, data)
            assert driver.process is not None
            assert driver.process.wait() == 0, driver.log
            same(driver.outcome(), run[1].result)
            assert "cannot be written" in driver.log
            assert "could be written again" in driver.log
            folder = locate(f"{root}/disturbed")
            told = read_jsonl(folder / "events.jsonl")
            assert {event["kind"] for event in told} == {UNWRITTEN}
            newest = sorted((folder / "checkpoints").folders())
            assert [name[:19] for name in newest][-1] == f"checkpoint_{CHECKPOINTS:08d}"
            assert len(newest) == 2
            assert len(read_jsonl(folder / "metrics.jsonl")) == 8
            with pytest.raises(UserError, match="NO_SUCH_BUCKET|no bucket"):  # at once, however patient
                locate("s3://no-such-bucket/x").patient(10_000).write_text("x")
    storage._s3.cache_clear()


@pytest.mark.soak
def test_a_worker_that_is_stopped_is_replaced(run: Undisturbed, tmp_path: Path) -> None:
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
    assert ["longer than ray.timeout_s" in told["message"] for told in driver.events(LOST)] == [True]
    assert not victim.is_running()


def test_a_worker_that_is_stopped_between_steps_is_replaced(run: Undisturbed, tmp_path: Path) -> None:
    config = run[0].model_copy(update={"ray": checked(RaySection, {"workers": 2, "timeout_s": 8})})
    board, again = start_board(), tmp_path / "again"

    def work(values: dict[str, Any]) -> None:
        import ray.train

        for _ in range(2):  # the second report waits until the first one was fetched: the start is over
            ray.train.report({})
        if ray.train.get_context().get_world_rank() == 0 and not again.exists():
            again.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        ray.train.report({})  # no collective of PyTorch, whose own limit would end the wait

    run_workers(Job(config, None, None, locate(str(tmp_path / "run")), board=board), lambda line: None, work)
    lost = [told["message"] for told in on_board(board) if told["kind"] == LOST]
    assert lost == ["workers were lost (worker 1: it waited for the others longer than ray.timeout_s)"]


def test_a_worker_killed_while_it_is_given_its_work_is_replaced(run: Undisturbed, tmp_path: Path) -> None:
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

    def given(tries: int, board: Any) -> None:
        config = run[0].model_copy(update={"ray": checked(RaySection, {"workers": 2, "max_failures": tries})})
        job = Job(config, None, None, locate(str(tmp_path / "run")), board=board)
        run_workers(job, lambda line: None, Work())

    with pytest.raises(
        UserError,
        match=r"(?s)allows no more tries: while they started: its process was lost.*run the same words again",
    ):
        given(0, start_board())
    again.unlink()
    board = start_board()
    given(1, board)  # in the room of those that were lost
    lost = [told["message"] for told in on_board(board) if told["kind"] == LOST]
    assert len(lost) == 1
    assert lost[0].startswith("workers were lost (while they started: its process was lost")


@pytest.mark.soak
@pytest.mark.parametrize("after_s", [0, 1, 3])
def test_a_worker_killed_while_it_starts_is_replaced(run: Undisturbed, tmp_path: Path, after_s: float) -> None:
    driver = disturbed(run, tmp_path, train=OFTEN)
    driver.start()
    driver.wait_for(lambda: workers(driver.family()))
    time.sleep(after_s)  # its process comes up, joins the process group, is given its work, begins
    kill(workers(driver.family())[-1:])
    assert driver.process is not None
    assert driver.process.wait() == 0, driver.log
    same(driver.outcome(), run[1].result)


@pytest.mark.soak
def test_workers_that_hang_are_replaced_and_where_they_stood_is_kept(run: Undisturbed, tmp_path: Path) -> None:
    stream = {"cache": "stream", "shards": str(tmp_path / "shards")}
    shutil.copytree(run[0].data.shards, stream["shards"])
    undisturbed = disturbed(run, tmp_path, data=stream, run={"root": str(tmp_path / "undisturbed"), "name": "s"})
    expected = train(type(run[0]).model_validate(undisturbed.values)).result
    driver = disturbed(run, tmp_path, data=stream, train=OFTEN, ray={"hung_after_s": 60})
    driver.start()
    driver.wait_for(lambda: driver.newest() >= 5)
    shard = tmp_path / "shards" / "train-00001.parquet"
    shard.rename(tmp_path / "whole")
    os.mkfifo(shard)  # to open it is to wait for ever
    driver.wait_for(lambda: driver.events(LOST))
    (tmp_path / "whole").rename(shard)
    assert driver.process is not None
    assert driver.process.wait() == 0, driver.log
    same(driver.outcome(), expected)
    assert driver.newest() <= CHECKPOINTS + 1
    told = driver.events(HUNG)
    assert told
    for found in told:
        assert found["message"] in driver.outcome()["notes"]
    stacks = "".join(file.read_text() for file in driver.folder.glob("hung_*.txt"))
    assert "in read" in stacks
    assert "ingest.py" in stacks


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster of one machine that has room for a worker of two CPUs and a data task."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "object_store_memory": 128 * 2**20})
    yield made
    made.shutdown()


VIT = {"encoder": "vit", "options": {"patch": 8, "width": 24, "layers": 2, "heads": 2}}  # without batch statistics


@pytest.mark.soak
def test_a_machine_that_is_lost_leaves_the_run_with_one_worker_less(
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
    assert ["with 1 worker (it was written by 2)" in told["message"] for told in driver.events(RESIZED)] == [True]


@pytest.mark.soak
def test_a_machine_that_comes_is_given_a_worker(run: Undisturbed, tmp_path: Path, cluster: Any) -> None:
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


@pytest.mark.soak
def test_a_job_that_is_stopped_ends_in_order(run: Undisturbed, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster
    from ray.job_submission import JobStatus, JobSubmissionClient

    ports = {"dashboard_port": free_port(), "dashboard_agent_listen_port": free_port()}
    head = {"num_cpus": 4, "object_store_memory": 128 * 2**20, "include_dashboard": True, **ports}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        track = {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}
        driver = disturbed(run, tmp_path, train=OFTEN, track=track)
        client = JobSubmissionClient(f"http://{made.head_node.address_info['webui_url']}")
        job = ""
        while not job:
            with contextlib.suppress(RuntimeError):  # its agent is still starting
                job = client.submit_job(entrypoint=f"cd {ROOT} && exec {' '.join(driver.command())}")
        while driver.newest() < 5:
            assert client.get_job_status(job) in (JobStatus.PENDING, JobStatus.RUNNING), client.get_job_logs(job)
            time.sleep(0.2)
        client.stop_job(job)
        while client.get_job_status(job) != JobStatus.STOPPED:
            time.sleep(0.2)
        assert "what: terminated" in client.get_job_logs(job)
        run_id = json.loads((driver.folder / "tracking.json").read_text())["run_id"]
        assert mlflow.MlflowClient(track["uri"]).get_run(run_id).info.status == "FAILED"
    finally:
        made.shutdown()
    same(driver.finish(), run[1].result)


SHORT = """
import ray
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from pipelines.faults import gave_up

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
    print(gave_up(WorkerGroupError("lost", {1: WorkerHealthCheckFailedError("it failed", error)}), "runs/x"))
"""


@pytest.mark.soak
def test_a_worker_that_is_killed_for_memory_has_a_message_that_says_what_to_lower() -> None:
    # Ray finds its machine short of memory whatever the machine has
    little = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    found = subprocess.run(
        [sys.executable, "-c", SHORT], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **little},
        check=True,
    )  # fmt: skip
    assert "worker 1: Ray ended it because its machine was running out of memory" in found.stdout
    assert "where: runs/x\nremedy: if it was memory" in found.stdout
    assert "train.batch_size" in found.stdout
