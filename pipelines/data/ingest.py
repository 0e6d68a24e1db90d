"""Ingest: shards to the batches of a worker.

A data set that fits into memory is read once: by Ray Data into Ray's shared memory, or by the embedded executor.
Every worker takes its batches from there without a copy of the data set, or copies the data set to its GPU. The
global batches are the same for any number of workers. A larger data set is streamed in every epoch; see
`pipelines.data.stream`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from dmtg_core.training.data import ArrayData, Chunks, Data, DeviceArrays, Samples
from pipelines.config.sections import DataSection
from pipelines.data.reader import Reader
from pipelines.data.stream import StreamData
from pipelines.errors import UserError
from pipelines.execution.executor import Executor, Held
from pipelines.execution.ray_executor import Reference

THREADS = 8  # shards that are read at the same time


def keeps_in_memory(reader: Reader, data: DataSection, executor: Executor) -> bool:
    """Whether the data set is read once and kept in memory, by `data.cache`, its size and the executor's memory.

    Raises:
        UserError: When `data.cache` requires it to be kept and it does not fit.
    """
    if data.cache == "stream":
        return False
    needed = reader.row_bytes() * sum(reader.manifest.rows(split) for split in reader.manifest.shards)
    available = executor.sample_memory()
    if data.cache == "auto":
        return needed <= min(data.cache_gib * 2**30, available)
    if needed > available:
        raise UserError(
            f"the samples need {needed / 2**20:.0f} MiB, the memory for them is {available / 2**20:.0f} MiB",
            where="data.cache",
            remedy="raise ray.object_store_mib, or set data.cache=stream",
        )
    return True


def load_splits(reader: Reader, executor: Executor) -> dict[str, list[Held]]:
    """Read every split into the memory of an executor: split → its tables, in order.

    Raises:
        UserError: When the number of rows in the shards differs from the manifest.
    """
    held = {}
    for split, shards in reader.manifest.shards.items():
        if not reader.manifest.rows(split):
            continue
        files = [shard.file for shard in shards if shard.rows]
        held[split], rows = (
            _read_here(reader, files, executor) if executor.embedded else _read_on_ray(reader, files)
        )
        if rows != reader.manifest.rows(split):
            raise UserError(
                f"the shards of {split} hold {rows} samples, the manifest says {reader.manifest.rows(split)}",
                where=str(reader.folder),
                remedy="run dmtg shard again",
            )
    return held


def _read_here(reader: Reader, files: Sequence[str], executor: Executor) -> tuple[list[Held], int]:
    """The tables of some shards, read by threads of this process, and the number of their rows."""
    with ThreadPoolExecutor(THREADS) as pool:
        held, rows = [], 0
        for table in pool.map(reader.table, files):
            held.append(executor.hold(table))
            rows += len(table)
    return held, rows


def _read_on_ray(reader: Reader, files: Sequence[str]) -> tuple[list[Held], int]:
    """The tables of some shards in Ray's shared memory, read by Ray Data, and the number of their rows."""
    dataset = reader.dataset(files).materialize()
    return [Reference(reference) for reference in dataset.to_arrow_refs()], dataset.count()


def open_data(
    reader: Reader,
    held: Mapping[str, Sequence[Held]] | None,
    data: DataSection,
    *,
    seed: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Data:
    """The data of a worker: from memory if `held` has tables, else streamed.

    Raises:
        UserError: When a split has fewer samples than workers.
    """
    few = [s for s in reader.manifest.shards if 0 < reader.manifest.rows(s) < world_size]
    if few:
        raise UserError(
            f"split {few[0]} has {reader.manifest.rows(few[0])} samples for {world_size} workers",
            where=str(reader.folder),
            remedy="lower ray.workers or add data",
        )
    if held is None:
        return StreamData(reader, data, seed=seed, rank=rank, world_size=world_size, device=device)
    chunks = {split: Chunks([reader.arrays(one.get()) for one in tables]) for split, tables in held.items()}
    splits: Mapping[str, Samples] = chunks
    if data.cache == "device":
        splits = {split: DeviceArrays(held_here, device) for split, held_here in chunks.items()}
    return ArrayData(
        splits, reader.tasks, seed=seed, rank=rank, world_size=world_size, device=device, sampler=data.sampler
    )
