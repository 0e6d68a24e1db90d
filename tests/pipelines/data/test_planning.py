"""Plans of shards are those of a list in memory, without the list."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from dmtg_core import InputSpec, Task
from pipelines.config.sections import DataSection, SourceSection
from pipelines.data import external_sort, planning
from pipelines.data.external_sort import TemporaryRecords, sort_records
from pipelines.data.planning import ShardPlan, make_plans, pickled, small_shards, unpickled
from pipelines.data.sources.base import Column, Description, Entry
from pipelines.data.sources.rows import Row
from pipelines.errors import UserError
from tests.paths import ROOT
from tests.pipelines.data.memory_plans import plans_in_memory

DESCRIPTION = Description(
    InputSpec("features", (4,)), (Task("t", "binary"),), {"input": Column("float32", (4,))}, {"kind": "ä"}
)
SOURCE = SourceSection(kind="table", root="there", options={"b": 1, "a": [PurePosixPath("x")]})
Planner = Callable[..., list[ShardPlan]]


def generated(count: int) -> Iterator[Entry]:
    """Samples with all kinds of values in their fields."""
    for i in range(count):
        row = Row(i, {"ü": f"{i}", "a": "ß"}, "row")
        fields = {"z": None, "row": row, "pair": (i, 0.1 * i), "of": {"b": np.int64(i), "a": [row]}, "nan": np.nan}
        yield Entry(f"sämple {i}", ("train", "train", "val", "test")[i % 4], fields if i % 3 else {})


@pytest.fixture(params=[(2**30, 64), (20_000, 64), (2_000, 3)], ids=["memory", "runs", "rounds of runs"])
def limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Memory and number of runs that are merged at a time."""
    monkeypatch.setattr(external_sort, "MEMORY", request.param[0])
    monkeypatch.setattr(external_sort, "WAYS", request.param[1])
    return request.param


@pytest.mark.usefixtures("limits")
class TestPlans:
    @pytest.mark.parametrize("rows", [1, 7, 100, None])
    def test_plans_are_those_of_a_list_in_memory(self, rows: int | None) -> None:
        data = DataSection(shards="x", rows_per_shard=rows)
        found = make_plans(generated(400), DESCRIPTION, SOURCE, data)
        expected = plans_in_memory(list(generated(400)), DESCRIPTION, SOURCE, data)
        assert [(p.file, p.split, p.digest) for p in found] == [(p.file, p.split, p.digest) for p in expected]
        for plan, other in zip(found, expected, strict=True):
            assert str(list(plan.entries)) == str(list(other.entries))  # NaN equals NaN as text
            assert len(plan.entries) == len(other.entries)

    @pytest.mark.parametrize("rows", [7, 100])
    def test_samples_of_a_block_are_neighbours(self, rows: int) -> None:
        entries = [replace(entry, block=f"block {i // 20}") for i, entry in enumerate(generated(400))]
        data = DataSection(shards="x", rows_per_shard=rows)
        found = make_plans(entries, DESCRIPTION, SOURCE, data)
        expected = plans_in_memory(entries, DESCRIPTION, SOURCE, data)
        assert [(p.file, p.split, p.digest) for p in found] == [(p.file, p.split, p.digest) for p in expected]
        for split in ("train", "val", "test"):
            blocks = [entry.block for plan in found if plan.split == split for entry in plan.entries]
            assert len(list(groupby(blocks))) == len(set(blocks)) == 20

    def test_repeated_ids_of_different_blocks_are_counted(self) -> None:
        names = [(f"{i}", f"{i % 7}") for i in range(60)] + [("3", "a"), ("3", "b"), ("8", "c"), ("9", "2")]
        entries = [Entry(name, "val" if i % 3 else "train", {}, block) for i, (name, block) in enumerate(names)]
        with pytest.raises(UserError, match="3 ids occur more than once: 3, 8, 9"):
            make_plans(entries, DESCRIPTION, SOURCE, DataSection(shards="x"))

    def test_a_plan_goes_to_another_machine_with_its_samples(self) -> None:
        plan = make_plans(generated(40), DESCRIPTION, SOURCE, DataSection(shards="x"))[0]
        sent = unpickled(pickled(plan))
        assert isinstance(sent.entries, tuple)
        assert [entry.id for entry in sent.entries] == [entry.id for entry in plan.entries]
        assert (plan.entries[3].id, plan.entries[-1].id) == (sent.entries[3].id, sent.entries[-1].id)
        assert [entry.id for entry in plan.entries[2:5]] == [entry.id for entry in sent.entries[2:5]]
        with pytest.raises(IndexError):
            plan.entries[20]

    def test_two_iterations_of_two_plans_do_not_disturb_each_other(self) -> None:
        data = DataSection(shards="x", rows_per_shard=50)
        first, second, *_ = make_plans(generated(400), DESCRIPTION, SOURCE, data)
        pairs = list(zip(first.entries, second.entries, first.entries, strict=True))
        assert [a.id for a, _, _ in pairs] == [c.id for _, _, c in pairs] == [entry.id for entry in first.entries]
        assert [b.id for _, b, _ in pairs] == [entry.id for entry in second.entries]

    def test_repeated_ids_are_counted_and_the_first_are_named(self) -> None:
        def entries() -> Iterator[Entry]:
            yield from generated(300)
            for i in (5, 5, 17, 120, 121, 3, 44):
                yield Entry(f"sämple {i}", "test")

        expected = (
            "6 ids occur more than once: sämple 120, sämple 121, sämple 17, sämple 3, sämple 44 and 1 more\n"
        )
        with pytest.raises(UserError, match=expected) as found:
            make_plans(entries(), DESCRIPTION, SOURCE, DataSection(shards="x"))
        assert found.value.where == "there"

    @pytest.mark.parametrize(
        ("splits", "message"),
        [
            (["train"], "splits hold train: 9, val: 0, test: 0 samples"),
            (["val", "test"], "splits hold train: 0, val: 5, test: 4 samples"),
            ([], "splits hold train: 0, val: 0, test: 0 samples"),
        ],
    )
    def test_splits_without_samples_are_refused(self, splits: Sequence[str], message: str) -> None:
        entries = [Entry(f"{i}", splits[i % len(splits)]) for i in range(9 * bool(splits))]
        with pytest.raises(UserError, match=message):
            make_plans(entries, DESCRIPTION, SOURCE, DataSection(shards="x"))


@pytest.mark.usefixtures("limits")
def test_records_of_any_length_are_sorted() -> None:
    rng = np.random.default_rng(0)
    records = [rng.bytes(int(length)) for length in rng.integers(0, 300, 500)]
    records += [b"", b"", rng.bytes(3 * external_sort.BLOCK), rng.bytes(external_sort.BLOCK - 4)]
    assert list(sort_records(iter(records))) == sorted(records)


def peak(plan: Planner, count: int) -> int:
    """The largest number of bytes that Python objects needed while `count` samples were planned."""
    tracemalloc.start()
    plan((Entry(f"{i}", "val" if i % 4 else "train", {"i": i}) for i in range(count)),
         DESCRIPTION, SOURCE, DataSection(shards="x", rows_per_shard=500))  # fmt: skip
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def test_memory_does_not_grow_with_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MEMORY", 2**17), ("BLOCK", 2**12), ("WAYS", 4)):
        monkeypatch.setattr(external_sort, name, value)
    few, many = 1_500, 6_000
    assert peak(make_plans, many) < 1.3 * peak(make_plans, few)
    assert peak(plans_in_memory, many) > 2 * peak(plans_in_memory, few)


KILLED = """
import os, signal
from pipelines.data import external_sort
external_sort.MEMORY = 2**14
def records():
    for i in range(10_000):
        yield b"%d" % i
        if i == 9_000 and os.environ["DIE"] == "reading":
            os.kill(os.getpid(), signal.SIGKILL)
for record in external_sort.sort_records(records()):
    if record == b"5":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["reading", "merging"])
def test_a_killed_process_leaves_no_temporary_files(tmp_path: Path, moment: str) -> None:
    values = {**os.environ, "TMPDIR": str(tmp_path), "DIE": moment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED], env=values, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(prefix: str) -> tuple[int, str]:
        (tmp_path / "file").touch()
        return os.open("/dev/full", os.O_RDWR), str(tmp_path / "file")

    monkeypatch.setattr(external_sort, "MEMORY", 2**14)
    monkeypatch.setattr(tempfile, "mkstemp", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(UserError, match="cannot write temporary files: No space left on device") as found:
        make_plans(generated(400), DESCRIPTION, SOURCE, DataSection(shards="x"))
    assert found.value.where == str(tmp_path)
    assert "TMPDIR" in found.value.remedy
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="cannot write temporary files: No such file") as found:
        TemporaryRecords()


def test_shards_that_are_too_small_are_refused_or_noted_before_one_is_written(monkeypatch) -> None:
    one = DataSection(shards="x", rows_per_shard=1)
    monkeypatch.setattr(planning, "MOST_SHARDS", 100)
    with pytest.raises(UserError, match="rows_per_shard=1 makes 400 shards of 400 samples") as found:
        make_plans(generated(400), DESCRIPTION, SOURCE, one)
    assert found.value.where == "data.rows_per_shard"
    few = make_plans(generated(100), DESCRIPTION, SOURCE, one)
    assert "raise data.rows_per_shard" in small_shards(few, DESCRIPTION.row_bytes)
    assert not small_shards(few[:99], DESCRIPTION.row_bytes)
    assert not small_shards(few, 2**20)
