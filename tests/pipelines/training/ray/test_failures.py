"""The command, its disk and its storage are lost: the run ends with the figures of an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import psutil
import pytest

from pipelines import stores
from pipelines.errors import UserError
from pipelines.registry.versions import list_models
from pipelines.runs.events import DAMAGED, LOST, RESUMED, UNWRITTEN
from pipelines.runs.files import read_jsonl
from pipelines.storage import locate
from tests.paths import ROOT
from tests.pipelines.driver import CHECKPOINTS, OFTEN, Undisturbed, disturbed, in_own_mounts, same
from tests.pipelines.s3_server import BUCKET, begin, end, free_port, serving, settings

pytestmark = pytest.mark.ray


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
def test_a_command_that_is_ended_resumes_with_the_same_command(
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
        message = f"dmtg train stopped\nwhat: {what}\nwhere: {driver.folder}\nremedy: run the same command again"
        assert message in driver.log
        assert driver.outcome()["status"] == "failed"
        assert tracked.get_run(run_id).info.status == "FAILED"
    expected = []
    if damaged:
        newest = driver.checkpoints()[-1]
        weights = next(newest.rglob("network.safetensors"))
        expected = [f"{newest.name} is skipped: missing or damaged: {weights.relative_to(newest)}"]
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)

    found = driver.finish()
    same(found, run[1].result)
    assert len(driver.epochs()) == len(set(driver.epochs())) == 8
    assert driver.newest() <= CHECKPOINTS + 1 + damaged
    skipped = [event["message"] for event in driver.events(DAMAGED)]
    assert skipped == expected
    assert set(skipped) <= set(found["notes"])
    assert all(f"note: {message}" in driver.log for message in skipped)
    assert tracked.get_run(run_id).info.status == "FINISHED"
    assert {model["version"] for model in list_models(run[0].track.model_copy(update=track))} == {1}


@pytest.mark.soak
def test_a_result_that_cannot_be_written_is_written_later_without_training_again(
    run: Undisturbed, tmp_path: Path
) -> None:
    driver = disturbed(run, tmp_path, train=OFTEN)
    process = driver.start()
    driver.wait_for(lambda: driver.newest() >= 1)
    in_the_way = driver.folder / "models"
    in_the_way.write_text("in the way of a folder")
    assert process.wait() == 1, driver.log
    assert "training is done, its result" in driver.log
    assert f"where: {in_the_way}" in driver.log
    assert "without training again" in driver.log
    newest = driver.newest()
    assert newest == CHECKPOINTS
    in_the_way.unlink()
    same(driver.finish(), run[1].result)
    assert driver.newest() == newest
    assert len(driver.epochs()) == 8


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[tuple[str, ...], Path, Path]]:
    """A disk of a few MiB in a namespace: arguments to enter it, and the disk as seen from here and from there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=6m none '{disk}' && echo ready && exec sleep infinity"
    with subprocess.Popen([*in_own_mounts(), "sh", "-c", mount], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        arguments = (
            "nsenter",
            f"--target={holder.pid}",
            "--user",
            "--mount",
            "--preserve-credentials",
            f"--wd={ROOT}",
        )
        yield arguments, Path(f"/proc/{holder.pid}/root{disk}"), disk
        holder.kill()


def fill(disk: Path) -> Path:
    """A file that takes all free disk space."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


@pytest.mark.soak
def test_a_full_disk_costs_checkpoints_and_no_training(
    run: Undisturbed, tmp_path: Path, small_disk: tuple[tuple[str, ...], Path, Path]
) -> None:
    arguments, here, there = small_disk
    driver = disturbed(run, tmp_path, train=OFTEN, run={"root": str(there / "runs"), "name": "disturbed"})
    driver.before, driver.place = arguments, here
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
    first, last = (event["message"] for event in driver.events(UNWRITTEN))
    assert "No space left on device" in first
    assert "again" in last


@pytest.mark.soak
def test_no_disk_space_for_temporary_files_costs_checkpoints_and_no_training(
    run: Undisturbed, tmp_path: Path, small_disk: tuple[tuple[str, ...], Path, Path]
) -> None:
    arguments, here, there = small_disk
    driver = disturbed(run, tmp_path, train=OFTEN)
    driver.before = arguments
    driver.start(TMPDIR=str(there), RAY_TMPDIR="/tmp")  # noqa: S108 - Ray's own files are not what is tested
    driver.wait_for(lambda: driver.newest() >= 4)
    filler = fill(here)
    driver.wait_for(lambda: "is lost, training continues" in driver.log)
    filler.unlink()
    assert driver.process is not None
    assert driver.process.wait() == 0, driver.log
    same(driver.outcome(), run[1].result)
    assert driver.newest() == CHECKPOINTS
    assert driver.events(RESUMED, LOST) == []
    assert list(here.glob("dmtg-*")) == []


@pytest.mark.soak
def test_storage_that_is_unreachable_for_half_a_minute_is_retried(
    run: Undisturbed, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    port, data = free_port(), tmp_path_factory.mktemp("s3-away")  # a separate server, which can be stopped
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings(port).items():
            patch.setenv(key, value)
        stores.filesystem.cache_clear()
        with serving(port, data):
            root = f"s3://{BUCKET}/away"
            driver = disturbed(run, tmp_path, train=OFTEN, run={"root": root, "name": "disturbed"})
            driver.start(**settings(port))
            driver.wait_for(lambda: driver.log.count(" score ") >= 3)
            end(port, data)
            time.sleep(30)  # as long as it is unreachable
            begin(port, data)
            assert driver.process is not None
            assert driver.process.wait() == 0, driver.log
            same(driver.outcome(), run[1].result)
            assert "cannot be written" in driver.log
            assert "could be written again" in driver.log
            folder = locate(f"{root}/disturbed")
            events = read_jsonl(folder / "events.jsonl")
            assert {event["kind"] for event in events} == {UNWRITTEN}
            newest = sorted((folder / "checkpoints").folders())
            assert [name[:19] for name in newest][-1] == f"checkpoint_{CHECKPOINTS:08d}"
            assert len(newest) == 2
            assert len(read_jsonl(folder / "metrics.jsonl")) == 8
            with pytest.raises(
                UserError, match="NO_SUCH_BUCKET|no bucket"
            ):  # at once, whatever the time for retries
                locate("s3://no-such-bucket/x").retrying(10_000).write_text("x")
    stores.filesystem.cache_clear()


@pytest.mark.soak
def test_a_job_that_is_stopped_marks_its_run_as_failed_and_resumes(
    run: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster
    from ray.job_submission import JobStatus, JobSubmissionClient

    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "600")  # after 3 s it would be killed
    ports = {"dashboard_port": free_port(), "dashboard_agent_listen_port": free_port()}
    head = {"num_cpus": 4, "object_store_memory": 128 * 2**20, "include_dashboard": True, **ports}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        track = {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}
        driver = disturbed(run, tmp_path, train=OFTEN, track=track)
        client = JobSubmissionClient(f"http://{cluster.head_node.address_info['webui_url']}")
        job = ""
        while not job:
            with contextlib.suppress(RuntimeError):  # its agent is still starting
                job = client.submit_job(entrypoint=f"cd {ROOT} && exec {' '.join(driver.command())} --local-ok")
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
        cluster.shutdown()
    same(driver.finish(), run[1].result)
