"""Shards to batches.

A data set that fits is read once by Ray Data into shared memory, from where every worker of a node takes its
batches without a copy of the whole (or copies it onto its GPU); its global batches are the same for any number of
workers. A larger one is streamed anew every epoch; see `pipelines.data.stream`.
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

STORE_SHARE = 0.7  # of Ray's shared memory that cached data may take


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
        return StreamData(reader, data, seed=seed, rank=rank, world_size=world_size, device=device)
    import ray

    chunks = {split: Chunks([reader.arrays(t) for t in ray.get(references)]) for split, references in held.items()}
    splits: Mapping[str, Samples] = chunks
    if data.cache == "device":
        splits = {split: DeviceArrays(held_here, device) for split, held_here in chunks.items()}
    return ArrayData(splits, reader.tasks, seed=seed, rank=rank, world_size=world_size, device=device)
