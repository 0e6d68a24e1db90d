"""`TaskContext`: when checkpoints are written, the time that they count, and what happens to damaged ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.runs.events import DAMAGED, UNWRITTEN
from pipelines.storage import locate
from pipelines.training import context
from pipelines.training.context import TaskContext
from pipelines.training.failures import PermanentError


class Clock:
    """A clock that the test sets, in place of the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(context, "time", found)
    return found


def _opened(tmp_path: Path, events: list[tuple[str, str]], every_s: float = 60) -> TaskContext:
    (tmp_path / "scratch").mkdir(exist_ok=True)
    return TaskContext(
        locate(str(tmp_path / "run")), tmp_path / "scratch", lambda *event: events.append(event), every_s
    )


def _write(folder: Path) -> None:
    (folder / "weights").write_text("1")


def test_checkpoints_are_as_far_apart_as_asked_and_count_the_time_before(tmp_path: Path, clock: Clock) -> None:
    task = _opened(tmp_path, [])
    written = []
    for second in range(0, 200, 10):
        clock.now = second
        before = list(task.checkpoints.whole)
        assert task.checkpoint_due() == (second in (60, 120, 180))
        task.report({} if second % 20 else None, _write)
        if task.checkpoints.whole != before:
            written.append(second)
    assert written == [60, 120, 180]
    clock.now = 1000
    resumed = _opened(tmp_path, [])
    assert resumed.latest() is not None
    assert resumed.before == 180
    clock.now = 1070
    resumed.report(None, _write)
    again = _opened(tmp_path, [])
    assert again.latest() is not None
    assert again.before == 250


def test_a_slow_checkpoint_makes_the_next_one_later(tmp_path: Path, clock: Clock) -> None:
    def slowly(folder: Path) -> None:
        _write(folder)
        clock.now += 10

    task = _opened(tmp_path, [])
    clock.now = 60
    task.report(None, slowly)
    clock.now = 269
    assert not task.checkpoint_due()
    clock.now = 270  # 20 times 10 seconds after it was written
    assert task.checkpoint_due()


def test_without_a_time_each_epoch_has_a_checkpoint(tmp_path: Path) -> None:
    task = _opened(tmp_path, [], every_s=0)
    assert not task.checkpoint_due()
    for _ in range(3):
        task.report({}, _write)
    assert len(task.checkpoints.whole) == 2


def test_a_checkpoint_that_cannot_be_written_is_an_event(tmp_path: Path) -> None:
    events: list[tuple[str, str]] = []
    task = _opened(tmp_path, events, every_s=0)

    def full(_folder: Path) -> None:
        raise OSError("no space left on device")

    task.report({}, full)
    assert [kind for kind, _ in events] == [UNWRITTEN]
    assert "no space left on device" in events[0][1]
    assert not list((tmp_path / "scratch").iterdir())
    assert task.latest() is None


def test_a_damaged_checkpoint_is_skipped_and_none_but_damaged_ones_are_an_error(tmp_path: Path) -> None:
    events: list[tuple[str, str]] = []
    task = _opened(tmp_path, events, every_s=0)
    for _ in range(2):
        task.report({}, _write)
    first, second = sorted((tmp_path / "run").iterdir())
    (second / "weights").write_text("2")
    found = _opened(tmp_path, events, every_s=0).latest()
    assert found is not None
    assert found.name == first.name
    assert [kind for kind, _ in events] == [DAMAGED]
    (first / "weights").write_text("3")
    with pytest.raises(PermanentError, match="no checkpoint is whole") as caught:
        _opened(tmp_path, events, every_s=0).latest()
    assert caught.value.where == str(tmp_path / "run")
