"""One job at a time, also when the one before was killed, and whatever the storage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.nightly import lease
from pipelines.nightly.lease import Lease
from pipelines.storage import locate
from tests.paths import ROOT
from tests.pipelines.s3_server import BUCKET

HOLDER = """
import sys, time
from pipelines.nightly.lease import Lease
from pipelines.storage import locate
with Lease(locate(sys.argv[1]), float(sys.argv[2]), "test").held():
    print("held", flush=True)
    time.sleep(3600)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.05)  # what is local can be seen at once
    monkeypatch.setattr(lease, "POLL_S", 0.05)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "x" / "lease.json")
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/{tmp_path.name}/lease.json"


def test_the_second_is_told_who_has_it_and_gets_it_when_it_is_given_back(place: str) -> None:
    first, second = (Lease(locate(place), 60, "regroup of x") for _ in range(2))
    with first.held():
        first.check()
        with pytest.raises(UserError, match=f"another regroup of x is running: process {os.getpid()}") as found:
            second.take_or_refuse()
        assert "--wait" in found.value.remedy
    with second.held():
        second.check()
    assert not locate(place).exists()


def test_one_that_waits_goes_on_when_the_other_ends(tmp_path: Path) -> None:
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


def test_of_many_at_once_one_has_it(tmp_path: Path) -> None:
    place, taken, start = locate(str(tmp_path / "lease.json")), [], threading.Barrier(8)

    def take() -> None:
        mine = Lease(place, 60, "job")
        start.wait()
        if mine.take() is None:
            taken.append(mine)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1


def test_a_lease_that_a_killed_process_left_is_taken_over(tmp_path: Path) -> None:
    place = str(tmp_path / "lease.json")
    words = [sys.executable, "-c", HOLDER, place, "3600"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        held = Lease(locate(place), 3600, "test").take()
        assert held is not None
        assert held["pid"] == process.pid
        process.send_signal(signal.SIGKILL)
    with Lease(locate(place), 3600, "test").held() as mine:
        mine.check()


def test_silence_counts_where_the_process_cannot_be_asked_and_the_late_holder_finds_out(tmp_path: Path) -> None:
    file = locate(str(tmp_path / "lease.json"))
    late = Lease(file, 60, "job")
    assert late.take() is None
    elsewhere = file.read_json() | {"host": "another machine"}
    file.write_json(elsewhere)
    other = Lease(file, 60, "job")
    assert other.take() is not None
    file.write_json(elsewhere | {"renewed": elsewhere["renewed"] - 61})
    assert other.take() is None
    with pytest.raises(UserError, match="another job has taken over"):
        late.check()
    other.check()
