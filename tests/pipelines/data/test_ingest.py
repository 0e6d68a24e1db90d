from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.config.ray_section import RaySection
from pipelines.config.sections import DataSection
from pipelines.data import shards
from pipelines.data.ingest import keeps_in_memory, load_splits, open_data
from pipelines.data.reader import Reader, _column
from pipelines.data.sources.base import Column
from pipelines.data.stream import StreamData, all_units, stretch
from pipelines.errors import UserError
from pipelines.execution.embedded import EmbeddedExecutor
from pipelines.execution.executor import Executor
from pipelines.execution.ray_executor import RayExecutor
from tests.pipelines.data.test_shards import manifest_of

CPU = torch.device("cpu")


@pytest.fixture
def reader(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """Shards of 40 samples in row groups of 16."""
    monkeypatch.setattr(shards, "GROUP_BYTES", 1)
    _, folder, manifest = manifest_of(tmp_path, images, rows_per_shard=40)
    return Reader(folder, manifest, manifest.description.tasks)


def row_key(inputs: torch.Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in inputs]


def expected(reader: Reader, split: str) -> list[bytes]:
    import pyarrow.parquet as pq

    return [
        value
        for shard in reader.manifest.shards[split]
        for value in pq.read_table((reader.folder / shard.file).path)["input"].to_pylist()
    ]


def test_tensor_column_is_read_in_place_also_from_slices_and_with_gaps() -> None:
    values = np.arange(24, dtype=np.uint16).reshape(4, 2, 3)
    column = Column("uint16", (2, 3))
    table = pa.chunked_array([pa.array([v.tobytes() for v in values], pa.binary())])
    read, there = _column(table, column)
    assert np.array_equal(read, values)
    assert there.all()
    assert np.array_equal(_column(table.slice(1, 2), column)[0], values[1:3])
    gaps = pa.chunked_array([pa.array([values[0].tobytes(), None, values[2].tobytes()], pa.binary())])
    read, there = _column(gaps, column)
    assert there.tolist() == [True, False, True]
    assert np.array_equal(read[2], values[2])
    with pytest.raises(UserError, match="bytes for 1 samples"):
        _column(pa.chunked_array([pa.array([b"abc"], pa.binary())]), column)


def test_only_the_columns_of_the_chosen_tasks_are_read(reader: Reader) -> None:
    one = Reader(reader.folder, reader.manifest, reader.tasks[:1])
    assert list(one.columns()) == ["input", "task.colour"]
    assert one.row_bytes() < reader.row_bytes()


def streamed(
    reader: Reader, shuffle_mib: float = 128, seed: int = 1, rank: int = 0, world_size: int = 1
) -> StreamData:
    data = DataSection(shards="x", shuffle_mib=shuffle_mib)
    return StreamData(reader, data, seed=seed, rank=rank, world_size=world_size, device=CPU)


def keys(batches) -> list[list[bytes]]:
    return [row_key(batch.inputs) for batch in batches]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shuffle_mib", [128, 0.01])  # one window, and many
def test_streaming_returns_every_sample_once_an_epoch(reader: Reader, world_size: int, shuffle_mib: float) -> None:
    workers = [streamed(reader, shuffle_mib, rank=r, world_size=world_size) for r in range(world_size)]
    for epoch in range(3):
        batches = [list(worker.train(epoch, 16)) for worker in workers]
        assert {len(b) for b in batches} == {workers[0].steps(16)}
        assert all(len(batch.inputs) for worker in batches for batch in worker)
        seen = [key for worker in batches for batch in worker for key in row_key(batch.inputs)]
        assert sorted(seen) == sorted(expected(reader, "train"))
        valued = [key for w in workers for batch in w.evaluate("val", 7) for key in row_key(batch.inputs)]
        assert valued == expected(reader, "val")


def test_streamed_order_changes_with_the_epoch_and_repeats_with_the_seed(reader: Reader) -> None:
    first = streamed(reader, 0.01)
    epochs = [keys(first.train(epoch, 16)) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    # read ahead over the ends of epochs or started again, the order is that of seed and epoch
    assert epochs[2] == keys(streamed(reader, 0.01).train(2, 16))
    assert epochs[0] != keys(streamed(reader, 0.01, seed=2).train(0, 16))


@pytest.mark.parametrize("shuffle_mib", [128, 0.01])
@pytest.mark.parametrize("rank", [0, 1])
def test_stream_resumes_in_the_middle_of_an_epoch(reader: Reader, rank: int, shuffle_mib: float) -> None:
    whole = keys(streamed(reader, shuffle_mib, rank=rank, world_size=2).train(1, 8))
    for start in range(len(whole) + 1):
        rest = streamed(reader, shuffle_mib, rank=rank, world_size=2).train(1, 8, start)
        assert keys(rest) == whole[start:]


def test_stream_resumed_in_the_middle_reads_no_earlier_window(reader: Reader, monkeypatch) -> None:
    read: list[tuple[str, int]] = []
    plain = Reader.read

    def counted(self, file: str, group: int):
        read.append((file, group))
        return plain(self, file, group)

    monkeypatch.setattr(Reader, "read", counted)
    data = streamed(reader, 0.01)
    list(data.train(0, 16, data.steps(16) - 1))
    assert len(read) < len(all_units(reader, "train"))


def test_interrupted_epoch_starts_again(reader: Reader) -> None:
    data = streamed(reader, 0.01)
    begun = data.train(0, 16)
    next(begun)
    begun.close()
    assert sorted(key for batch in keys(data.train(0, 16)) for key in batch) == sorted(expected(reader, "train"))


def test_stretches_cover_every_row_once(reader: Reader) -> None:
    units = all_units(reader, "train")
    rows = [(u.file, u.group, row) for u in units for row in range(u.start, u.stop)]
    shared = [
        (u.file, u.group, row)
        for start, stop in pairwise([0, 3, 3, 20, 32, len(rows)])
        for u in stretch(units, slice(start, stop))
        for row in range(u.start, u.stop)
    ]
    assert shared == rows
    assert len(rows) == reader.manifest.rows("train")


def test_streamed_targets_belong_to_their_inputs(reader: Reader) -> None:
    truth = {
        key: [batch.targets[t][i].item() for t in batch.targets]
        for batch in streamed(reader).evaluate("train", 64)
        for i, key in enumerate(row_key(batch.inputs))
    }
    for batch in streamed(reader, 0.01).train(2, 16):
        for i, key in enumerate(row_key(batch.inputs)):
            assert [batch.targets[t][i].item() for t in batch.targets] == truth[key]


def test_missing_or_truncated_shard_is_named(reader: Reader) -> None:
    file = reader.folder / reader.manifest.shards["train"][0].file
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a complete shard") as found:
        list(streamed(reader).train(0, 16))
    assert found.value.where == str(file)
    file.delete()
    with pytest.raises(UserError, match="a shard is missing"):
        list(streamed(reader).train(0, 16))


@pytest.fixture(params=["embedded", "in processes", pytest.param("Ray", marks=pytest.mark.ray)])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    section = RaySection(object_store_mib=128)
    if request.param == "Ray":
        request.getfixturevalue("ray_session")
        yield RayExecutor(section)
        return
    with EmbeddedExecutor(section, processes=int(request.param == "in processes")) as made:
        yield made


class TestHeld:
    def test_cache_follows_size_and_setting(self, executor: Executor, reader: Reader) -> None:
        def kept(**values: object) -> bool:
            return keeps_in_memory(reader, DataSection(shards="x", **values), executor)

        assert kept()
        assert not kept(cache_gib=1e-6)
        assert not kept(cache="stream")
        assert kept(cache="memory", cache_gib=1e-6)

    def test_data_that_does_not_fit_the_requested_memory_is_an_error(
        self, executor: Executor, reader: Reader, monkeypatch
    ) -> None:
        monkeypatch.setattr(Reader, "row_bytes", lambda _: 2**30)
        with pytest.raises(UserError, match="the memory for them") as found:
            keeps_in_memory(reader, DataSection(shards="x", cache="memory"), executor)
        assert "object_store_mib" in found.value.remedy
        assert not keeps_in_memory(reader, DataSection(shards="x"), executor)

    @pytest.mark.parametrize("cache", ["memory", "device"])
    @pytest.mark.parametrize("world_size", [1, 3])
    def test_cache_returns_every_sample_once_an_epoch(
        self, executor: Executor, reader: Reader, cache: str, world_size: int
    ) -> None:
        held, data = load_splits(reader, executor), DataSection(shards="x", cache=cache)
        workers = [
            open_data(reader, held, data, seed=1, rank=r, world_size=world_size, device=CPU)
            for r in range(world_size)
        ]
        batches = [list(worker.train(0, 16)) for worker in workers]
        seen = [key for worker in batches for batch in worker for key in row_key(batch.inputs)]
        assert sorted(seen) == sorted(expected(reader, "train"))
        valued = [key for w in workers for batch in w.evaluate("val", 7) for key in row_key(batch.inputs)]
        assert valued == expected(reader, "val")

    def test_cached_and_streamed_targets_are_equal(self, executor: Executor, reader: Reader) -> None:
        def truth(data) -> dict[bytes, list[float]]:
            return {
                key: [batch.targets[t][i].item() for t in batch.targets]
                for batch in data.evaluate("train", 64)
                for i, key in enumerate(row_key(batch.inputs))
            }

        held = load_splits(reader, executor)
        for cache in ("memory", "device"):
            section = DataSection(shards="x", cache=cache)
            assert truth(streamed(reader)) == truth(
                open_data(reader, held, section, seed=0, rank=0, world_size=1, device=CPU)
            )

    def test_shards_with_another_number_of_rows_are_an_error(self, executor: Executor, reader: Reader) -> None:
        held = {split: list(files) for split, files in reader.manifest.shards.items()}
        held["train"] = [replace(held["train"][0], rows=3), *held["train"][1:]]
        with pytest.raises(UserError, match="the manifest says"):
            load_splits(replace(reader, manifest=replace(reader.manifest, shards=held)), executor)


def test_fewer_samples_than_workers_is_an_error(reader: Reader) -> None:
    with pytest.raises(UserError, match="19 samples for 20 workers"):
        open_data(reader, None, DataSection(shards="x"), seed=0, rank=0, world_size=20, device=CPU)
