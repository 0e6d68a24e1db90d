"""Shards to batches, through Ray Data.

A data set that fits is read once into Ray's shared memory, from where every worker of a node takes its batches
without a copy of the whole; its global batches are the same for any number of workers. A larger one is streamed
anew every epoch: the shards in a new order, each worker its own stretch of it, mixed in a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch

from dmtg_core.data import ArrayData, Arrays, Batch, Data
from dmtg_core.tasks import Task
from pipelines.config import DataSection
from pipelines.errors import UserError
from pipelines.manifest import Manifest
from pipelines.sources import INPUT, Column
from pipelines.storage import Location

WINDOW = 2048  # samples that a streaming worker mixes


@dataclass(frozen=True)
class Reader:
    """Which columns of which shards to read, and how to make arrays of them. Safe to send to a worker."""

    folder: Location
    manifest: Manifest
    tasks: tuple[Task, ...]

    def columns(self) -> dict[str, Column]:
        """The columns of the chosen tasks alone."""
        names = {INPUT} | {f"{kind}.{task.name}" for task in self.tasks for kind in ("task", "mask")}
        return {name: column for name, column in self.manifest.description.columns.items() if name in names}

    def row_bytes(self) -> int:
        """Decoded size of one sample."""
        return sum(int(np.dtype(c.dtype).itemsize * math.prod(c.shape)) for c in self.columns().values())

    def dataset(self, files: Sequence[str]) -> Any:
        """The Ray Dataset of some shards, in their order."""
        import ray.data

        return ray.data.read_parquet(
            [(self.folder / file).path for file in files],
            filesystem=self.folder.filesystem,
            columns=["id", *self.columns()],
            override_num_blocks=len(files),
        )

    def arrays(self, tables: Sequence[pa.Table]) -> Arrays:
        """Tables of rows as arrays."""
        columns = self.columns()
        values = {name: [_column(table[name], column) for table in tables] for name, column in columns.items()}
        inputs = np.concatenate([value for value, _ in values[INPUT]])
        labels, present = {}, {}
        for task in self.tasks:
            parts = values[f"task.{task.name}"]
            labels[task.name] = np.concatenate([value for value, _ in parts])
            there = np.concatenate([there for _, there in parts])
            if f"mask.{task.name}" in values:
                mask = np.concatenate([value for value, _ in values[f"mask.{task.name}"]]).astype(bool)
                present[task.name] = mask & there.reshape(-1, *[1] * (mask.ndim - 1))
            elif not there.all():
                present[task.name] = there
        return Arrays(inputs, labels, present)


def _column(chunked: pa.ChunkedArray, column: Column) -> tuple[np.ndarray, np.ndarray]:
    """Values `(n, *shape)`, and where there is one; what is missing reads as zeros."""
    there = np.asarray(chunked.is_valid())
    dtype = np.dtype(column.dtype).newbyteorder("<")
    if column.shape == ():
        filled = chunked.fill_null(pa.scalar(0, chunked.type)) if chunked.null_count else chunked
        return filled.to_numpy().astype(column.dtype, copy=False), there
    size = dtype.itemsize * math.prod(column.shape)
    if chunked.null_count:
        chunked = chunked.fill_null(b"\0" * size)
    parts = [_tensor(chunk, dtype, size) for chunk in chunked.chunks]
    flat = np.concatenate(parts) if len(parts) != 1 else parts[0]
    return flat.reshape(-1, *column.shape), there


def _tensor(chunk: pa.Array, dtype: np.dtype[Any], size: int) -> np.ndarray:
    """The values of a binary column in one view of its buffer."""
    wide = pa.types.is_large_binary(chunk.type)
    offsets = np.frombuffer(chunk.buffers()[1], np.int64 if wide else np.int32)
    first, last = offsets[chunk.offset], offsets[chunk.offset + len(chunk)]
    if last - first != size * len(chunk):
        raise UserError(
            f"a tensor column holds {last - first} bytes for {len(chunk)} samples of {size}",
            where="shards",
            remedy="make the shards again with dmtg shard",
        )
    return np.frombuffer(chunk.buffers()[2], dtype, count=(last - first) // dtype.itemsize, offset=int(first))


def fits_memory(reader: Reader, data: DataSection) -> bool:
    """Whether `data.cache` and the size of the data say to keep it in memory."""
    if data.cache != "auto":
        return data.cache == "memory"
    rows = sum(reader.manifest.rows(split) for split in reader.manifest.shards)
    return rows * reader.row_bytes() <= data.cache_gib * 2**30


def load_splits(reader: Reader) -> dict[str, Any]:
    """Read every split into Ray's object store: split → reference to its `Arrays`.

    Raises:
        UserError: When the shards hold another number of rows than the manifest says.
    """
    import ray

    pack = ray.remote(num_cpus=1)(_pack)
    return {
        split: pack.remote(
            reader, reader.manifest.rows(split), *reader.dataset([s.file for s in shards]).to_arrow_refs()
        )
        for split, shards in reader.manifest.shards.items()
        if shards
    }


def _pack(reader: Reader, rows: int, *tables: pa.Table) -> Arrays:
    arrays = reader.arrays(tables)
    if len(arrays) != rows:
        raise UserError(
            f"the shards hold {len(arrays)} samples, the manifest says {rows}",
            where=str(reader.folder),
            remedy="run dmtg shard again",
        )
    return arrays


def open_data(
    reader: Reader, held: Mapping[str, Any] | None, *, seed: int, rank: int, world_size: int, device: torch.device
) -> Data:
    """A worker's view of the data: from shared memory when `held` has references, else streamed.

    Raises:
        UserError: When a split has fewer samples than there are workers.
    """
    few = [s for s in reader.manifest.shards if 0 < reader.manifest.rows(s) < world_size]
    if few:
        raise UserError(
            f"split {few[0]} has {reader.manifest.rows(few[0])} samples for {world_size} workers",
            where=str(reader.folder),
            remedy="lower ray.workers or add data",
        )
    if held is None:
        return StreamData(reader, seed=seed, rank=rank, world_size=world_size, device=device)
    import ray

    splits = {split: ray.get(reference) for split, reference in held.items()}
    return ArrayData(splits, reader.tasks, seed=seed, rank=rank, world_size=world_size, device=device)


class StreamData:
    """A data set read from its shards in every epoch; see `dmtg_core.data.Data`.

    Each worker reads an equal stretch of the epoch's shard order, so every sample comes once and all workers take
    the same number of steps.
    """

    def __init__(self, reader: Reader, *, seed: int, rank: int, world_size: int, device: torch.device) -> None:
        self.reader = reader
        self.seed, self.rank, self.world_size, self.device = seed, rank, world_size, device

    def steps(self, batch_size: int) -> int:
        """Global batches in an epoch."""
        rows = self.reader.manifest.rows("train")
        full, rest = divmod(rows, batch_size)
        return max(full + (rest >= 2 * self.world_size), 1)

    def train(self, epoch: int, batch_size: int) -> Iterator[Batch]:
        """See `Data.train`."""
        shards = self.reader.manifest.shards["train"]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(shards))
        mine, rows = self._stretch([shards[i].file for i in order], [shards[i].rows for i in order])
        sizes = [len(part) for part in np.array_split(np.arange(rows), self.steps(batch_size))]
        windows = self._mixed(mine, np.random.default_rng([self.seed, epoch, self.rank]))
        yield from self._cut(windows, sizes)

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        """See `Data.evaluate`."""
        shards = self.reader.manifest.shards[split]
        mine, rows = self._stretch([s.file for s in shards], [s.rows for s in shards])
        sizes = [min(batch_size, rows - start) for start in range(0, rows, batch_size)]
        yield from self._cut(self._tables(mine), sizes)

    def _stretch(self, files: Sequence[str], counts: Sequence[int]) -> tuple[list[tuple[str, int, int]], int]:
        """This worker's part of the rows: (file, first row, end row) in order, and how many rows they are."""
        ends = np.cumsum(counts)
        low, high = (int(ends[-1]) * (self.rank + i) // self.world_size for i in (0, 1))
        found = []
        for file, count, end in zip(files, counts, ends, strict=True):
            start, stop = max(low - (end - count), 0), min(high - (end - count), count)
            if start < stop:
                found.append((file, int(start), int(stop)))
        return found, high - low

    def _tables(self, stretch: Sequence[tuple[str, int, int]]) -> Iterator[pa.Table]:
        """The rows of a stretch, table after table."""
        skip, left = stretch[0][1], sum(stop - start for _, start, stop in stretch)
        dataset = self.reader.dataset([file for file, _, _ in stretch])
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
            part = table.slice(skip, left)
            skip = max(skip - table.num_rows, 0)
            left -= part.num_rows
            if part.num_rows:
                yield part

    def _mixed(self, stretch: Sequence[tuple[str, int, int]], rng: np.random.Generator) -> Iterator[pa.Table]:
        """The same rows, each window of them in random order."""
        held: list[pa.Table] = []
        for table in self._tables(stretch):
            held.append(table)
            if sum(part.num_rows for part in held) >= WINDOW:
                yield _shuffled(held, rng)
                held = []
        if held:
            yield _shuffled(held, rng)

    def _cut(self, tables: Iterator[pa.Table], sizes: Sequence[int]) -> Iterator[Batch]:
        """Batches of exactly `sizes` samples."""
        held: list[pa.Table] = []
        for size in sizes:
            while sum(table.num_rows for table in held) < size:
                held.append(next(tables))
            joined = pa.concat_tables(held)
            held = [joined.slice(size)]
            arrays = self.reader.arrays([joined.slice(0, size)])
            yield arrays.batch(self.reader.tasks, np.arange(size), self.device)


def _shuffled(tables: Sequence[pa.Table], rng: np.random.Generator) -> pa.Table:
    joined = pa.concat_tables(tables)
    return cast("pa.Table", joined.take(rng.permutation(joined.num_rows)))
