"""Streamed batches: the same for any number of workers, each sample once an epoch, within a bounded memory."""

import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dmtg_core import Batch, GroupingNetwork, fit
from dmtg_core.training.checkpoint import load_network
from dmtg_core.training.context import LocalContext
from pipelines.config.sections import DataSection
from pipelines.data.reader import Reader
from pipelines.data.stream import Division, StreamData
from pipelines.errors import UserError
from tests.dmtg_core import parallel, samples
from tests.pipelines.shard_files import streamed, train_streamed, write_arrays, write_numbers

Numbered = Callable[..., Reader]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Numbered:
    """Makes shards of numbered samples, once each."""
    made: dict[tuple, Reader] = {}

    def make(rows: tuple[int, ...], group_rows: int, width: int = 1) -> Reader:
        key = (rows, group_rows, width)
        if key not in made:
            made[key] = write_numbers(tmp_path_factory.mktemp("shards"), rows, group_rows, width)
        return made[key]

    return make


def drawn(batches: Iterator[Batch]) -> list[list[int]]:
    """Sample numbers of every batch; labels must belong to their inputs."""
    found = []
    for batch in batches:
        assert torch.equal(batch.inputs[:, 0], batch.targets["number"])
        found.append(batch.inputs[:, 0].int().tolist())
    return found


def crew(reader: Reader, shuffle_rows: float, world_size: int, **options) -> list[StreamData]:
    return [streamed(reader, shuffle_rows, rank=r, world_size=world_size, **options) for r in range(world_size)]


def together(workers: list[StreamData], epoch: int, batch_size: int, start: int = 0) -> list[list[int]]:
    """The samples of every global batch in order, of which each worker must have an equal share."""
    parts = [drawn(worker.train(epoch, batch_size, start)) for worker in workers]
    for shares in zip(*parts, strict=True):
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert all(shares)
    return [sorted(i for share in shares for i in share) for shares in zip(*parts, strict=True)]


@settings(max_examples=20)
@given(
    rows=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    group_rows=st.integers(3, 12),
    shuffle=st.integers(1, 100),
    batch_size=st.integers(1, 40),
    workers=st.integers(2, 4),
    epoch=st.integers(0, 2),
)
@example([40, 40, 40], 5, 40, 24, 3, 1)  # three workers of eight streams
@example([40, 40, 40], 5, 40, 24, 2, 1)
@example([7], 12, 100, 40, 4, 0)  # one row group, and fewer samples than a batch
@example([40, 1], 4, 4, 10, 5, 2)  # one stream for five workers
def test_global_batches_are_the_same_for_any_number_of_workers(
    numbered: Numbered, rows, group_rows, shuffle, batch_size, workers, epoch
):
    assume(workers <= min(batch_size, sum(rows)))
    reader = numbered(tuple(rows), group_rows)
    alone = together(crew(reader, shuffle, 1), epoch, batch_size)
    assert sorted(i for batch in alone for i in batch) == list(range(sum(rows)))
    assert together(crew(reader, shuffle, workers), epoch, batch_size) == alone


@settings(max_examples=10)
@given(
    group_rows=st.integers(3, 12),
    shuffle=st.integers(1, 100),
    batch_size=st.integers(4, 30),
    workers=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    share=st.floats(0, 1),
)
def test_run_resumes_with_another_number_of_workers(
    numbered: Numbered, group_rows, shuffle, batch_size, workers, share
):
    reader = numbered((33, 20, 17), group_rows)
    epochs = [together(crew(reader, shuffle, workers[0]), epoch, batch_size) for epoch in (1, 2)]
    start = round(share * len(epochs[0]))
    others = crew(reader, shuffle, workers[1])
    assert together(others, 1, batch_size, start) == epochs[0][start:]
    assert together(others, 2, batch_size) == epochs[1]
    assert together(crew(reader, shuffle, workers[2]), 2, batch_size) == epochs[1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_batch_draws_from_all_row_groups_that_are_shuffled_together(numbered: Numbered, world_size: int):
    reader = numbered((80,) * 8, 10)
    for batch in together(crew(reader, 80, world_size), 0, 32):
        groups = Counter(i // 10 for i in batch)
        assert len(groups) >= 8  # two of a stream where one window follows another
        assert max(groups.values()) <= 8  # four of a stream, or two streams share a row group where they meet


def test_the_order_depends_on_seed_and_epoch(numbered: Numbered):
    reader = numbered((30, 30), 5)
    orders = {
        str(together(crew(reader, 20, 2, seed=seed), epoch, 12)) for seed in (1, 2, 3) for epoch in (0, 1, 2)
    }
    assert len(orders) == 9


def test_no_two_windows_have_the_same_order(numbered: Numbered):
    (worker,) = crew(numbered((64,), 8), 16, 1)
    orders = []
    for epoch in range(3):
        whole = [i for batch in drawn(worker.train(epoch, 16)) for i in batch]
        by_group = {g: tuple(i % 8 for i in whole if i // 8 == g) for g in range(8)}
        orders += by_group.values()
    assert len(set(orders)) >= 20  # of 24; two of 8! may be alike


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts how often each row group is read."""
    read: Counter = Counter()
    plain = Reader.read

    def counting(self, file: str, group: int):
        read[file, group] += 1
        return plain(self, file, group)

    monkeypatch.setattr(Reader, "read", counting)
    return read


@given(size=st.integers(1, 300), streams=st.integers(1, 40), workers=st.integers(1, 12))
@example(24, 8, 2)
@example(25, 8, 4)
@example(26, 12, 6)
def test_every_sample_of_a_batch_has_exactly_one_worker(size: int, streams: int, workers: int):
    assume(max(streams, workers) <= size)
    divisions = [Division(streams, rank, workers) for rank in range(workers)]
    parts = np.diff(divisions[0].ends(np.array([size])))
    portions = np.array([division.portions(size) for division in divisions])  # (workers, streams, 3)
    assert portions.min() >= 0
    assert (portions.sum(axis=2) == parts).all()
    assert (portions[:, :, 1].sum(axis=0) == parts).all()
    assert portions[:, :, 1].sum(axis=1).tolist() == [
        len(x) for x in np.split(np.arange(size), cuts(size, workers))
    ]
    own = [stream for division in divisions for stream in division.own(np.array([size]))]
    if streams % workers == 0:
        assert own == list(range(streams))
    assert len(own) <= streams + workers - 1  # only streams at a boundary of two workers are shared


def cuts(size: int, workers: int) -> list[int]:
    return [size * rank // workers for rank in range(1, workers)]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_worker_reads_only_its_own_streams(numbered: Numbered, monkeypatch, world_size: int):
    reader = numbered((80,) * 4, 5)  # 64 row groups in 8 streams
    read = counted(monkeypatch)
    for worker in crew(reader, 40, world_size):
        before = read.total()
        list(worker.train(0, 32))
        worker.pool.shutdown()
        # an epoch of its streams and no more than another ahead; a stream can begin and end within a row group
        assert 64 / world_size <= read.total() - before <= 2 * (64 + 8) / world_size


def test_samples_read_ahead_beyond_an_epoch_are_used(numbered: Numbered, monkeypatch):
    reader = numbered((80,) * 4, 5)
    read = counted(monkeypatch)
    (worker,) = crew(reader, 40, 1)
    for epoch in range(4):
        list(worker.train(epoch, 32))
        list(worker.evaluate("val", 32))
    worker.pool.shutdown()
    # and what was read ahead last: a row group of each of the 8 streams, and a window of 8
    assert read.total() == 4 * (64 + 64) + 8 + 8


def test_small_data_set_is_read_ahead_by_at_most_an_epoch(numbered: Numbered, monkeypatch):
    read = counted(monkeypatch)
    (worker,) = crew(numbered((20,), 5), 10_000, 1)
    list(worker.train(0, 20))
    worker.pool.shutdown()
    assert read.total() == 4 + 4


def allocated() -> int:
    """Bytes that Arrow holds, once what earlier tests still read ahead is freed."""
    while True:
        gc.collect()
        found = pa.total_allocated_bytes()
        time.sleep(0.1)
        if pa.total_allocated_bytes() == found:
            return found


@pytest.mark.parametrize("group_rows", [4, 16, 64])  # 32 streams, 8, and 2
@pytest.mark.parametrize("world_size", [1, 3])
def test_memory_is_bounded_by_the_shuffle_size(numbered: Numbered, group_rows: int, world_size: int):
    reader = numbered((512, 512, 512), group_rows, 1024)
    mixed, group = 128 * reader.row_bytes(), group_rows * reader.row_bytes()
    for worker in crew(reader, 128, world_size):
        before, most = allocated(), 0
        for epoch in range(2):
            for _ in worker.train(epoch, 48):
                most = max(most, pa.total_allocated_bytes() - before)
        # what is about to be used up, what is used and what is read ahead, with a few bytes for offsets;
        # for a moment the pages of a row group, from which a thread decodes it
        decoded = min(DataSection.model_fields["read_threads"].default, worker.streams) * group
        assert mixed < most <= 3.1 * mixed + decoded
        worker.pool.shutdown()
        del worker


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shuffle_rows", [4, 20, 1000])
def test_evaluation_sees_every_sample_on_one_worker(numbered: Numbered, world_size: int, shuffle_rows: int):
    workers = crew(numbered((33, 20, 17), 6), shuffle_rows, world_size)
    for _ in range(2):
        seen = [drawn(worker.evaluate("val", 8)) for worker in workers]
        assert [i for batches in seen for batch in batches for i in batch] == list(range(70))
        assert all(0 < len(batch) <= 8 for batches in seen for batch in batches)
        list(zip(*(worker.train(0, 8) for worker in workers), strict=True))


def test_warning_for_too_few_streams_names_the_setting(numbered: Numbered, caplog: pytest.LogCaptureFixture):
    reader = numbered((80,) * 4, 5)
    crew(reader, 20, 4)
    assert not caplog.text
    crew(reader, 20, 5)
    (logged,) = caplog.messages
    assert "5 workers share 4 streams" in logged


def test_a_batch_too_small_for_the_workers_is_refused(numbered: Numbered):
    with pytest.raises(UserError, match="a batch of 2 cannot be shared by 3 workers"):
        crew(numbered((33, 20, 17), 6), 20, 3)[0].train(0, 2)


SETTINGS = replace(parallel.SETTINGS, epochs=2, checkpoint_every=2)
SHUFFLE_ROWS = 20  # five streams, which neither of two workers can have for itself


def test_one_and_two_workers_have_the_same_weights_also_after_a_resume(
    two_processes: parallel.Group, tmp_path: Path
):
    spec = parallel.spec_for("gumbel")
    train, val = (samples.arrays(spec.input, spec.tasks, 61, seed=i, missing=0.3) for i in range(2))
    reader = write_arrays(tmp_path, spec.input, spec.tasks, {"train": [train], "val": [val]}, group_rows=4)
    expected = fit(
        GroupingNetwork(spec),
        streamed(reader, SHUFFLE_ROWS),
        SETTINGS,
        LocalContext(tmp_path / "one", device="cpu", keep=100),
    )
    assert len({record["heads"] for record in expected.history}) >= 2
    middle = within_an_epoch(tmp_path / "one")
    two_processes(train_streamed, tmp_path, reader, SETTINGS, SHUFFLE_ROWS, middle)
    begun_by_two = LocalContext(tmp_path / "two", device="cpu")
    begun_by_two.latest = lambda: within_an_epoch(tmp_path / "whole_checkpoints")
    alone_again = fit(GroupingNetwork(spec), streamed(reader, SHUFFLE_ROWS), SETTINGS, begun_by_two)
    found = [load_network(tmp_path / f"{name}_{rank}") for name in ("whole", "rest") for rank in range(2)]
    for network in (*found, alone_again.network):
        for name, value in samples.snapshot(network).items():
            torch.testing.assert_close(value, expected.network.state_dict()[name], atol=1e-5, rtol=1e-5, msg=name)


def within_an_epoch(folder: Path) -> Path:
    """A checkpoint of the middle of the second epoch."""
    (found,) = [
        place for place in sorted(folder.glob("checkpoint_*"))
        if (loop := json.loads((place / "loop.json").read_text()))["partial"] and loop["epoch"] == 1
    ]  # fmt: skip
    return found
