"""Shards of arrays for tests, and the training function of processes that train from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from dmtg_core import Arrays, GroupingNetwork, InputSpec, Task, TrainSettings, fit
from dmtg_core.training.checkpoint import save_network
from pipelines.config.sections import DataSection
from pipelines.data.manifest import Manifest, Shard
from pipelines.data.reader import Reader
from pipelines.data.shards import table_of
from pipelines.data.sources.base import INPUT, Column, Description
from pipelines.data.stream import StreamData
from pipelines.storage import locate
from tests.dmtg_core.parallel import ProcessContext, spec_for

NUMBER = Task("number", "regression")


def write_arrays(
    folder: Path, spec: InputSpec, tasks: Sequence[Task], splits: Mapping[str, Sequence[Arrays]], group_rows: int
) -> Reader:
    """One shard for each of the arrays of a split, as `write_shard` writes it for images."""
    first = splits["train"][0]
    columns = {INPUT: Column(str(first.inputs.dtype), first.inputs.shape[1:])}
    for name, values in first.labels.items():
        columns[f"task.{name}"] = Column(str(values.dtype), values.shape[1:])
    description = Description(spec, tuple(tasks), columns)
    shards: dict[str, list[Shard]] = {split: [] for split in splits}
    for split, parts in splits.items():
        for arrays in parts:
            file = f"{split}-{len(shards[split]):05d}.parquet"
            rows = [(f"{file}/{i}", _row(arrays, i)) for i in range(len(arrays))]
            plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
            pq.write_table(table_of(description, rows), folder / file, row_group_size=group_rows, **plain)
            shards[split].append(Shard(file, len(arrays), (folder / file).stat().st_size, ""))
    manifest = Manifest(description, shards, {}, group_rows=group_rows)
    return Reader(locate(str(folder)), manifest, tuple(tasks))


def _row(arrays: Arrays, i: int) -> dict[str, np.ndarray | None]:
    labels = {
        f"task.{name}": values[i] if name not in arrays.present or arrays.present[name][i] else None
        for name, values in arrays.labels.items()
    }
    return {INPUT: arrays.inputs[i], **labels}


def write_numbers(folder: Path, rows: Sequence[int], group_rows: int, width: int = 1) -> Reader:
    """Samples of each shard's `rows`; input, `width` times, and label of a sample are its number."""
    parts, first = [], 0
    for count in rows:
        numbers = np.arange(first, first + count, dtype=np.float32)
        parts.append(Arrays(np.repeat(numbers[:, None], width, axis=1), {NUMBER.name: numbers}, {}))
        first += count
    splits = {"train": parts, "val": parts}
    return write_arrays(folder, InputSpec("features", (width,)), [NUMBER], splits, group_rows)


def streamed(
    reader: Reader, shuffle_rows: float, *, seed: int = 1, rank: int = 0, world_size: int = 1
) -> StreamData:
    """The data of a worker that shuffles so many rows."""
    data = DataSection(shards="x", shuffle_mib=shuffle_rows * reader.row_bytes() / 2**20)
    return StreamData(reader, data, seed=seed, rank=rank, world_size=world_size, device=torch.device("cpu"))


class CheckpointContext(ProcessContext):
    """Stores the checkpoints of rank 0, and starts from a given one."""

    def __init__(self, folder: Path, begin: Path | None = None) -> None:
        super().__init__()
        self.folder, self.begin = folder, begin

    def report(self, record, save) -> None:
        """Write a checkpoint into its own folder."""
        if self.rank == 0:
            place = self.folder / f"checkpoint_{len(list(self.folder.iterdir())):06d}"
            place.mkdir()
            save(place)

    def latest(self) -> Path | None:
        """The checkpoint to start from."""
        return self.begin


def train_streamed(
    rank: int, workers: int, folder: Path, reader: Reader, settings: TrainSettings, rows: int, begin: Path
) -> None:
    """The function of a process: train from the start, then again from a checkpoint of another run."""
    for name, first in (("whole", None), ("rest", begin)):
        kept = folder / f"{name}_checkpoints"
        kept.mkdir(exist_ok=True)
        data = streamed(reader, rows, rank=rank, world_size=workers)
        state = fit(GroupingNetwork(spec_for("gumbel")), data, settings, CheckpointContext(kept, first))
        save_network(folder / f"{name}_{rank}", state.network)
