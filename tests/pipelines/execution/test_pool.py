"""The pool of processes: outcomes, lost processes, questions to the driver, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from pipelines.errors import UserError
from pipelines.execution.errors import LostProcessError
from pipelines.execution.pool import QUICK_EXIT, Pool, ask
from tests.paths import ROOT


def square(number: int) -> int:
    return number**2


def pid(_: int) -> int:
    return os.getpid()


def refuse(number: int) -> int:
    raise UserError(f"no {number}", where="here", remedy="try another")


class OwnError(Exception):
    def __init__(self, one: int, two: int) -> None:  # cannot be unpickled
        super().__init__(f"{one} and {two}")


def fail(number: int) -> int:
    raise OwnError(number, number)


def die_once(place: str) -> str:
    if not Path(place).exists():
        Path(place).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return place


def die(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def count(number: int) -> list[int]:
    return [ask((number, i)) for i in range(3)]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with closing(Pool(2, retries=1)) as made:
        yield made


def test_outcomes_of_many_items(pool: Pool) -> None:
    found = {done.index: done.value for done in pool.run(square, range(300))}
    assert found == {i: i**2 for i in range(300)}


def test_processes_are_kept_between_runs(pool: Pool) -> None:
    first, second = ({done.value for done in pool.run(pid, range(40))} for _ in range(2))
    assert len(first | second) <= 2
    assert os.getpid() not in first


def test_an_error_arrives_with_its_class_and_fields(pool: Pool) -> None:
    (done,) = pool.run(refuse, [7])
    assert isinstance(done.error, UserError)
    assert (done.error.what, done.error.where, done.error.remedy) == ("no 7", "here", "try another")


def test_an_error_that_cannot_be_sent_arrives_as_text(pool: Pool) -> None:
    (done,) = pool.run(fail, [7])
    assert str(done.error) == "OwnError: 7 and 7"


def test_the_task_of_a_lost_process_is_repeated(pool: Pool, tmp_path: Path) -> None:
    places = [str(tmp_path / name) for name in "ab"]
    assert sorted(done.value for done in pool.run(die_once, places)) == places


def test_only_the_task_that_loses_its_process_again_fails(pool: Pool) -> None:
    found = {done.index: done for done in pool.run(die, range(6))}
    assert isinstance(found[1].error, LostProcessError)
    assert "SIGKILL" in str(found[1].error)
    assert [found[i].value for i in (0, 2, 3, 4, 5)] == [0, 2, 3, 4, 5]


def test_a_task_asks_the_driver(pool: Pool) -> None:
    answers = {
        done.index: done.value for done in pool.run(count, [10, 20, 30], lambda index, asked: (index, asked))
    }
    assert answers == {i: [(i, (10 * (i + 1), n)) for n in range(3)] for i in range(3)}


def test_an_error_of_the_answer_is_not_a_lost_process() -> None:
    def answer(index: int, asked: object) -> None:
        raise OSError("the disk is full")

    with closing(Pool(1, retries=1)) as own, pytest.raises(OSError, match="the disk is full"):
        list(own.run(count, [1], answer))


def test_a_process_that_is_lost_between_runs_is_replaced(pool: Pool) -> None:
    (done,) = pool.run(pid, [0])
    for member in pool.members:
        member.process.kill()
        member.process.join()
    found = [one.value for one in pool.run(pid, range(4))]
    assert len(found) == 4
    assert done.value not in found


DRIVER = """
import os, time
from pipelines.execution.pool import Pool
from tests.pipelines.execution.test_pool import linger

if __name__ == "__main__":
    for done in Pool(2).run(linger, [{folder!r}] * 2):
        pass
"""


def linger(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(3600)


def test_processes_end_with_a_killed_driver(tmp_path: Path) -> None:
    script, folder = tmp_path / "driver.py", tmp_path / "pids"
    folder.mkdir()
    script.write_text(DRIVER.format(folder=str(folder)))
    with subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(ROOT)}) as driver:
        while len(list(folder.iterdir())) < 2:
            assert driver.poll() is None
            time.sleep(0.05)
        driver.kill()
    started = [int(file.name) for file in folder.iterdir()]
    while any(psutil.pid_exists(one) for one in started):
        time.sleep(0.05)


def variable(name: str) -> str | None:
    return os.environ.get(name)


def test_processes_have_the_environment_of_their_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("first", "second"):  # the second pool forks from the server that the first one has started
        monkeypatch.setenv("AWS_ENDPOINT_URL", value)
        with closing(Pool(1)) as pool:
            assert [done.value for done in pool.run(variable, ["AWS_ENDPOINT_URL"])] == [value]
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with closing(Pool(1)) as pool:
        assert [done.value for done in pool.run(variable, ["AWS_ENDPOINT_URL"])] == [None]


def test_the_server_of_forks_ends_without_tearing_modules_down() -> None:
    slow = "class Slow:\n    def __del__(self): print('torn down')\nheld = Slow()\n"
    for imports, shown in (("", "torn down\n"), (f"import {QUICK_EXIT}\n", "")):
        done = subprocess.run(
            [sys.executable, "-c", imports + slow], capture_output=True, text=True, check=True, cwd=ROOT
        )
        assert done.stdout == shown
