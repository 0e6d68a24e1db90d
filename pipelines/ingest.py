"""Shards to batches.

A data set that fits is read once by Ray Data into shared memory, from where every worker of a node takes its
batches without a copy of the whole (or copies it onto its GPU); its global batches are the same for any number of
workers. A larger one is streamed anew every epoch; see `pipelines.stream`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dmtg_core.tasks import Task
from dmtg_core.training.data import ArrayData, Arrays, Chunks, Data, DeviceArrays, Samples
from pipelines.config.sections import DataSection
from pipelines.errors import UserError
from pipelines.manifest import Manifest
from pipelines.sources import INPUT, Column
from pipelines.storage import Location

STORE_SHARE = 0.7  # of Ray's shared memory that cached data may take


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
            columns=list(self.columns()),
            override_num_blocks=len(files),
        )

    def read(self, file: str, group: int) -> Arrays:
        """One row group of a shard.

        Raises:
            UserError: When the file is missing, cannot be reached or is no shard of this data set.
        """
        place = self.folder / file
        try:
            with place.filesystem.open_input_file(place.path) as opened:
                shard = pq.ParquetFile(opened, pre_buffer=place.local is None)
                return self.arrays(shard.read_row_group(group, columns=list(self.columns())))
        except FileNotFoundError as error:
            raise UserError(
                "a shard is missing",
                where=str(place),
                remedy="run dmtg shard again: it makes only what is missing",
            ) from error
        except pa.ArrowInvalid as error:
            raise UserError(
                f"not a whole shard: {error}", where=str(place), remedy="delete it and run dmtg shard again"
            ) from error
        except OSError as error:
            raise place.unreachable(error) from error

    def arrays(self, table: pa.Table) -> Arrays:
        """The columns of a table as arrays; a tensor column that lies in one piece is not copied."""
        values = {name: _column(table[name], column) for name, column in self.columns().items()}
        labels, present = {}, {}
        for task in self.tasks:
            labels[task.name], there = values[f"task.{task.name}"]
            if f"mask.{task.name}" in values:
                mask = values[f"mask.{task.name}"][0].astype(bool)
                present[task.name] = mask & there.reshape(-1, *[1] * (mask.ndim - 1))
            elif not there.all():
                present[task.name] = there
        return Arrays(values[INPUT][0], labels, present)


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


def keeps_in_memory(reader: Reader, data: DataSection) -> bool:
    """Whether `data.cache`, the size of the data and Ray's shared memory say to read it once and keep it.

    Raises:
        UserError: When it is to be kept and does not fit.
    """
    import ray

    if data.cache == "stream":
        return False
    needed = reader.row_bytes() * sum(reader.manifest.rows(split) for split in reader.manifest.shards)
    stores = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]]
    room = STORE_SHARE * min(store for store in stores if store)
    if data.cache == "auto":
        return needed <= min(data.cache_gib * 2**30, room)
    if needed > room:
        raise UserError(
            f"the samples take {needed / 2**20:.0f} MiB, Ray's shared memory has room for {room / 2**20:.0f} MiB",
            where="data.cache",
            remedy="raise ray.object_store_mib, or set data.cache=stream",
        )
    return True


def load_splits(reader: Reader) -> dict[str, list[Any]]:
    """Read every split into Ray's shared memory: split → references to its tables, in their order.

    Raises:
        UserError: When the shards hold another number of rows than the manifest says.
    """
    held = {}
    for split, shards in reader.manifest.shards.items():
        if not reader.manifest.rows(split):
            continue
        dataset = reader.dataset([shard.file for shard in shards if shard.rows]).materialize()
        if dataset.count() != reader.manifest.rows(split):
            raise UserError(
                f"the shards of {split} hold {dataset.count()} samples, the manifest says "
                f"{reader.manifest.rows(split)}",
                where=str(reader.folder),
                remedy="run dmtg shard again",
            )
        held[split] = dataset.to_arrow_refs()
    return held


def open_data(
    reader: Reader,
    held: Mapping[str, list[Any]] | None,
    data: DataSection,
    *,
    seed: int,
    rank: int,
    world_size: int,
    device: torch.device,
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
        from pipelines.stream import StreamData

        return StreamData(reader, data, seed=seed, rank=rank, world_size=world_size, device=device)
    import ray

    chunks = {split: Chunks([reader.arrays(t) for t in ray.get(references)]) for split, references in held.items()}
    splits: Mapping[str, Samples] = chunks
    if data.cache == "device":
        splits = {split: DeviceArrays(held_here, device) for split, held_here in chunks.items()}
    return ArrayData(splits, reader.tasks, seed=seed, rank=rank, world_size=world_size, device=device)
