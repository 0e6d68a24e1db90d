"""Ingest: shards to the batches of a worker.

Ray Data reads a data set that fits into shared memory once. Every worker of a node takes its batches from there
without a copy of the data set, or copies the data set to its GPU. The global batches are the same for any number
of workers. A larger data set is streamed in every epoch; see `pipelines.data.stream`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dmtg_core.training.data import ArrayData, Chunks, Data, DeviceArrays, Samples
from pipelines.config.sections import DataSection
from pipelines.data.reader import Reader
from pipelines.data.stream import StreamData
from pipelines.errors import UserError

STORE_SHARE = 0.7  # share of Ray's shared memory that cached data may use


def keeps_in_memory(reader: Reader, data: DataSection) -> bool:
    """Whether the data set is read once and kept in memory, by `data.cache`, its size and Ray's shared memory.

    Raises:
        UserError: When `data.cache` requires it to be kept and it does not fit.
    """
    import ray

    if data.cache == "stream":
        return False
    needed = reader.row_bytes() * sum(reader.manifest.rows(split) for split in reader.manifest.shards)
    stores = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]]
    available = STORE_SHARE * min(store for store in stores if store)
    if data.cache == "auto":
        return needed <= min(data.cache_gib * 2**30, available)
    if needed > available:
        raise UserError(
            f"the samples need {needed / 2**20:.0f} MiB, Ray's shared memory can hold {available / 2**20:.0f} MiB",
            where="data.cache",
            remedy="raise ray.object_store_mib, or set data.cache=stream",
        )
    return True


def load_splits(reader: Reader) -> dict[str, list[Any]]:
    """Read every split into Ray's shared memory: split → references to its tables, in order.

    Raises:
        UserError: When the number of rows in the shards differs from the manifest.
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
    """The data of a worker: from shared memory if `held` has references, else streamed.

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
    import ray

    chunks = {split: Chunks([reader.arrays(t) for t in ray.get(references)]) for split, references in held.items()}
    splits: Mapping[str, Samples] = chunks
    if data.cache == "device":
        splits = {split: DeviceArrays(held_here, device) for split, held_here in chunks.items()}
    return ArrayData(splits, reader.tasks, seed=seed, rank=rank, world_size=world_size, device=device)
