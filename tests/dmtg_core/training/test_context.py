"""`LocalContext`: checkpoints are complete, and only the last ones are kept."""

import pytest
import torch

from dmtg_core import LocalContext
from dmtg_core.training.checkpoint import SEAL
from dmtg_core.training.context import newest_whole


def writer(text: str):
    """A save function."""
    return lambda folder: (folder / "content").write_text(text)


def local(folder, **options) -> LocalContext:
    """A context on the CPU."""
    return LocalContext(folder, device="cpu", **options)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_last_checkpoints_are_kept(tmp_path, keep):
    context = local(tmp_path / "run", keep=keep)
    for n in range(5):
        context.report({"epoch": n}, writer(str(n)))
    kept = sorted((tmp_path / "run").iterdir())
    assert [(folder / "content").read_text() for folder in kept] == [str(n) for n in range(5 - keep, 5)]
    assert context.latest() == kept[-1]


def test_two_checkpoints_are_kept_by_default(tmp_path):
    context = local(tmp_path)
    for n in range(4):
        context.report({}, writer(str(n)))
    assert len(list(tmp_path.iterdir())) == 2


def test_numbers_continue_after_those_of_another_context(tmp_path):
    local(tmp_path).report({}, writer("first"))
    context = local(tmp_path)
    context.report({}, writer("second"))
    assert (context.latest() / "content").read_text() == "second"
    assert [(f / "content").read_text() for f in sorted(tmp_path.iterdir())] == ["first", "second"]


def test_numbers_with_more_digits_are_the_newest(tmp_path):
    context = local(tmp_path, keep=3)
    context.report({}, writer("before"))
    (tmp_path / "checkpoint_000000").rename(tmp_path / "checkpoint_999998")
    for n in range(3):
        context.report({}, writer(str(n)))
    names = {place.name for place in tmp_path.iterdir()}
    assert names == {"checkpoint_999999", "checkpoint_1000000", "checkpoint_1000001"}
    assert (local(tmp_path).latest() / "content").read_text() == "2"


def test_a_failed_write_leaves_the_last_complete_checkpoint(tmp_path):
    context = local(tmp_path)
    context.report({}, writer("whole"))

    def fail(folder):
        (folder / "content").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        context.report({}, fail)
    assert (local(tmp_path).latest() / "content").read_text() == "whole"
    context.report({}, writer("next"))
    assert (context.latest() / "content").read_text() == "next"
    assert not (tmp_path / ".part").exists()


def test_files_of_a_killed_writer_are_ignored_and_removed(tmp_path):
    (tmp_path / ".part").mkdir()
    (tmp_path / ".part" / "old").write_text("stale")
    context = local(tmp_path)
    assert context.latest() is None
    context.report({}, writer("new"))
    assert sorted(f.name for f in context.latest().iterdir()) == ["content", SEAL]
    assert not (tmp_path / ".part").exists()


def test_without_a_folder_nothing_is_written_and_records_are_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    context = local(None, on_record=seen.append)
    context.report({"epoch": 1}, lambda folder: pytest.fail("nothing to write to"))
    assert seen == [{"epoch": 1}]
    assert context.latest() is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_holds_no_checkpoint(tmp_path):
    assert local(tmp_path / "absent").latest() is None
    assert not (tmp_path / "absent").exists()


def test_one_process_sums_to_itself():
    context = local(None)
    value = torch.arange(3.0)
    assert torch.equal(context.sum(value), value)
    assert (context.rank, context.world_size) == (0, 1)


def test_skipped_damaged_checkpoints_are_reported(tmp_path, caplog):
    context = local(tmp_path, keep=3)
    for n in range(3):
        context.report({}, writer(str(n)))
    oldest, *damaged = sorted(tmp_path.iterdir())
    for folder in damaged:
        (folder / "content").write_text("changed")
    damages = []
    assert newest_whole(reversed([oldest, *damaged]), damages.append) == oldest
    assert damages == [f"{folder}: missing or damaged: content" for folder in reversed(damaged)]
    assert caplog.text == ""
    assert context.latest() == oldest
    assert "skipped a damaged checkpoint" in caplog.text
