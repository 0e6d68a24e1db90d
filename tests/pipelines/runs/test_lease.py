"""The lease allows one job at a time, also after a kill, on all storage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.runs import lease
from pipelines.runs.lease import Lease, only_one
from pipelines.storage import Location, locate
from tests.paths import ROOT
from tests.pipelines.fake_stores import UNSEEN, use_memory
from tests.pipelines.s3_server import BUCKET

HOLDER = """
import sys, time
from pipelines.runs.lease import Lease
from pipelines.storage import Location, locate
with Lease(locate(sys.argv[1]), float(sys.argv[2]), "test").held():
    print("held", flush=True)
    time.sleep(3600)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.05)  # local files are visible at once
    monkeypatch.setattr(lease, "POLL_S", 0.05)


@pytest.fixture(params=["local", "s3", *UNSEEN])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "local":
        return str(tmp_path / "x" / "lease.json")
    if request.param in UNSEEN:
        use_memory(monkeypatch)
        return f"{UNSEEN[request.param]}/lease.json"
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


@pytest.mark.parametrize("place", ["hdfs"], indirect=True)
def test_a_lease_that_is_absent_while_it_is_replaced_is_held(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (Lease(locate(place), 60, "job") for _ in range(2))
    with first.held():
        read, absent = Location.read_bytes, [True]

        def read_bytes(self: Location) -> bytes:
            if absent and absent.pop():
                raise FileNotFoundError
            return read(self)

        monkeypatch.setattr(Location, "read_bytes", read_bytes)
        held = second.try_acquire()
        assert held is not None
        assert held["token"] == first.token
        absent.append(True)
        first.check()


@pytest.mark.parametrize("place", ["local", *UNSEEN], indirect=True)
def test_one_of_many_concurrent_jobs_acquires_the_lease(place: str) -> None:
    holders: list[Lease] = []
    start = threading.Barrier(8)

    def take() -> None:
        mine = Lease(locate(place), 60, "job")
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


def of_another_machine(file: Location, **changes: object) -> dict[str, object]:
    """Write a lease of another machine, and return it."""
    held = Lease(file, 60, "job")._content() | {"host": "another machine"} | changes
    file.write_json(held)
    return held


AGES = {"fresh": 0.0, "old": -3600.0, "future": 86400.0, "far future": 3.2e8}


@pytest.mark.parametrize("age", AGES)
def test_a_lease_that_is_not_renewed_is_left_behind_whatever_its_clock_says(tmp_path: Path, age: str) -> None:
    file = locate(str(tmp_path / "lease.json"))
    of_another_machine(file, renewed=time.time() + AGES[age])
    waiting = Lease(file, 0.3, "job")
    assert waiting.try_acquire() is not None
    waiting.acquire(wait_s=3600 if age == "fresh" else 0)
    waiting.check()


@pytest.mark.parametrize("age", AGES)
def test_a_lease_that_is_renewed_is_kept_whatever_its_clock_says(tmp_path: Path, age: str) -> None:
    file = locate(str(tmp_path / "lease.json"))
    held = of_another_machine(file, renewed=time.time() + AGES[age])
    waiting = Lease(file, 3600, "job")
    assert waiting.try_acquire() == held
    renewed = of_another_machine(file, token=held["token"], renewed=held["renewed"], count=2)
    with pytest.raises(UserError, match="another job is running: process"):
        waiting.acquire()
    assert file.read_json() == renewed


DAMAGED = [
    "", "{}", "null", "[]", '{"token": "a", "ho', '{"token": "a", "host": "o", "pid": 1, "renewed": NaN}',
    '{"token": "a", "host": "o", "pid": "x", "renewed": 1}', "\udcff",
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_lease_is_left_behind_after_the_timeout(tmp_path: Path, content: str) -> None:
    (tmp_path / "lease.json").write_bytes(content.encode("utf-8", errors="surrogateescape"))
    file, logged = locate(str(tmp_path / "lease.json")), []
    assert Lease(file, 3600, "job").try_acquire() is not None
    with Lease(file, 0.2, "job").held(log=logged.append) as mine:
        mine.check()
    assert "its lease is damaged" in logged[0]


def test_another_process_with_the_id_of_a_lost_one_does_not_hold_its_lease(tmp_path: Path) -> None:
    file = locate(str(tmp_path / "lease.json"))
    file.write_json(Lease(file, 3600, "job")._content() | {"pid": 1})  # it runs, and started earlier
    assert Lease(file, 3600, "job").try_acquire() is None


def test_the_late_holder_of_a_lease_that_was_left_behind_is_refused(tmp_path: Path) -> None:
    file = locate(str(tmp_path / "lease.json"))
    late = Lease(file, 60, "job")
    assert late.try_acquire() is None
    file.write_json(file.read_json() | {"host": "another machine"})
    other = Lease(file, 0.1, "job")
    other.acquire(wait_s=3600)
    with pytest.raises(UserError, match="another job has taken over"):
        late.check()
    other.check()


def test_a_second_job_in_a_folder_is_refused_on_this_machine_and_waits_for_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = locate(str(tmp_path))
    monkeypatch.setattr(lease, "LEASE_S", 0.2)
    with only_one(folder, "run", print), pytest.raises(UserError, match="another run is running"):
        only_one(folder, "run", print).__enter__()
    of_another_machine(folder / lease.FILE)
    with only_one(folder, "run", print) as mine:
        mine.check()
