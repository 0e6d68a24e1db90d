"""The lease allows one job at a time, also after a kill, on all storage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.runs import lease
from pipelines.runs.lease import Lease
from pipelines.storage import locate
from tests.paths import ROOT
from tests.pipelines.s3_server import BUCKET

HOLDER = """
import sys, time
from pipelines.runs.lease import Lease
from pipelines.storage import locate
with Lease(locate(sys.argv[1]), float(sys.argv[2]), "test").held():
    print("held", flush=True)
    time.sleep(3600)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.05)  # local files are visible at once
    monkeypatch.setattr(lease, "POLL_S", 0.05)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "x" / "lease.json")
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/{tmp_path.name}/lease.json"


def test_the_second_job_is_refused_with_the_holder_and_acquires_a_released_lease(place: str) -> None:
    first, second = (Lease(locate(place), 60, "regroup of x") for _ in range(2))
    with first.held():
        first.check()
        with pytest.raises(UserError, match=f"another regroup of x is running: process {os.getpid()}") as found:
            second.acquire()
        assert "--wait" in found.value.remedy
    with second.held():
        second.check()
    assert not locate(place).exists()


def test_a_waiting_job_continues_when_the_other_ends(tmp_path: Path) -> None:
    place, logged, order = str(tmp_path / "lease.json"), [], []
    first, second = (Lease(locate(place), 60, "job") for _ in range(2))

    def wait() -> None:
        with second.held(wait_s=3600, log=logged.append):
            order.append("second")

    with first.held():
        thread = threading.Thread(target=wait)
        thread.start()
        while not logged:
            thread.join(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert "waiting for another job" in logged[0]


def test_one_of_many_concurrent_jobs_acquires_the_lease(tmp_path: Path) -> None:
    place, holders, start = locate(str(tmp_path / "lease.json")), [], threading.Barrier(8)

    def take() -> None:
        mine = Lease(place, 60, "job")
        start.wait()
        if mine.try_acquire() is None:
            holders.append(mine)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(holders) == 1


def test_the_lease_of_a_killed_process_is_acquired(tmp_path: Path) -> None:
    place = str(tmp_path / "lease.json")
    command = [sys.executable, "-c", HOLDER, place, "3600"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        held = Lease(locate(place), 3600, "test").try_acquire()
        assert held is not None
        assert held["pid"] == process.pid
        process.send_signal(signal.SIGKILL)
    with Lease(locate(place), 3600, "test").held() as mine:
        mine.check()


def test_the_lease_of_another_machine_expires_and_its_late_holder_is_refused(tmp_path: Path) -> None:
    file = locate(str(tmp_path / "lease.json"))
    late = Lease(file, 60, "job")
    assert late.try_acquire() is None
    elsewhere = file.read_json() | {"host": "another machine"}
    file.write_json(elsewhere)
    other = Lease(file, 60, "job")
    assert other.try_acquire() is not None
    file.write_json(elsewhere | {"renewed": elsewhere["renewed"] - 61})
    assert other.try_acquire() is None
    with pytest.raises(UserError, match="another job has taken over"):
        late.check()
    other.check()
