from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.errors import UserError
from pipelines.ingest import Reader, StreamData, _column, fits_memory, load_splits, open_data
from pipelines.sources import Column
from tests.pipelines.conftest import make_config
from tests.pipelines.test_shards import manifest_of

CPU = torch.device("cpu")


@pytest.fixture
def reader(images: Path, tmp_path: Path) -> Reader:
    _, folder, manifest = manifest_of(tmp_path, images)
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


def test_cache_follows_size_and_setting(reader: Reader, images: Path, tmp_path: Path) -> None:
    def data(**values: object):
        return make_config(images, tmp_path, data=values).data

    assert fits_memory(reader, data())
    assert not fits_memory(reader, data(cache_gib=1e-6))
    assert not fits_memory(reader, data(cache="stream"))
    assert fits_memory(reader, data(cache="memory", cache_gib=1e-6))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
class TestWithRay:
    @pytest.mark.parametrize("memory", [True, False])
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_every_sample_comes_once_an_epoch(self, reader: Reader, memory: bool, world_size: int) -> None:
        held = load_splits(reader) if memory else None
        workers = [
            open_data(reader, held, seed=1, rank=r, world_size=world_size, device=CPU) for r in range(world_size)
        ]
        batches = [list(worker.train(0, 16)) for worker in workers]
        assert {len(b) for b in batches} == {workers[0].steps(16)}
        assert all(len(batch.inputs) for worker in batches for batch in worker)
        seen = [key for worker in batches for batch in worker for key in row_key(batch.inputs)]
        assert sorted(seen) == sorted(expected(reader, "train"))
        valued = [key for w in workers for batch in w.evaluate("val", 7) for key in row_key(batch.inputs)]
        assert sorted(valued) == sorted(expected(reader, "val"))

    def test_streamed_order_changes_with_the_epoch_and_repeats_with_the_seed(self, reader: Reader) -> None:
        def order(epoch: int) -> list[bytes]:
            data = StreamData(reader, seed=3, rank=0, world_size=1, device=CPU)
            return [key for batch in data.train(epoch, 16) for key in row_key(batch.inputs)]

        assert order(0) == order(0)
        assert order(0) != order(1)

    def test_streamed_targets_belong_to_their_inputs(self, reader: Reader) -> None:
        held = load_splits(reader)
        truth = {
            key: [batch.targets[t][i].item() for t in batch.targets]
            for batch in open_data(reader, held, seed=0, rank=0, world_size=1, device=CPU).evaluate("train", 64)
            for i, key in enumerate(row_key(batch.inputs))
        }
        for batch in StreamData(reader, seed=0, rank=0, world_size=1, device=CPU).train(2, 16):
            for i, key in enumerate(row_key(batch.inputs)):
                assert [batch.targets[t][i].item() for t in batch.targets] == truth[key]

    def test_fewer_samples_than_workers_is_an_error(self, reader: Reader) -> None:
        with pytest.raises(UserError, match="19 samples for 20 workers"):
            open_data(reader, None, seed=0, rank=0, world_size=20, device=CPU)
