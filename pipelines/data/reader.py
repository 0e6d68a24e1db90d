"""Reader of shards: Parquet files to arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmtg_core.tasks import Task
from dmtg_core.training.data import Arrays
from pipelines.data.manifest import Manifest
from pipelines.data.sources.base import INPUT, Column
from pipelines.errors import UserError
from pipelines.storage import Location


@dataclass(frozen=True)
class Labels:
    """Labels of samples, and whether each of them exists, by task; see `Arrays`."""

    labels: dict[str, np.ndarray]
    present: dict[str, np.ndarray]


@dataclass(frozen=True)
class Reader:
    """Reads the columns of the chosen tasks from shards as arrays. It is safe to send to a worker.

    Args:
        folder: Folder of the shards.
        manifest: Manifest of the shards.
        tasks: The chosen tasks.
        outputs: Whether the inputs are outputs of a frozen stem; see `pipelines.data.stem_outputs`.
    """

    folder: Location
    manifest: Manifest
    tasks: tuple[Task, ...]
    outputs: bool = False

    def columns(self) -> dict[str, Column]:
        """The input column and the columns of the chosen tasks."""
        names = {INPUT} | {f"{kind}.{task.name}" for task in self.tasks for kind in ("task", "mask")}
        return {name: column for name, column in self.manifest.description.columns.items() if name in names}

    def row_bytes(self) -> int:
        """Decoded size of one sample."""
        return sum(int(np.dtype(c.dtype).itemsize * math.prod(c.shape)) for c in self.columns().values())

    def dataset(self, files: Sequence[str]) -> Any:
        """The Ray Dataset of some shards, in order."""
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
            UserError: When the file is missing, unreachable or not a shard.
        """
        return self.arrays(
            self._parquet(file, lambda shard, columns: shard.read_row_group(group, columns=columns))
        )

    def table(self, file: str) -> pa.Table:
        """The columns of a shard.

        Raises:
            UserError: As `read`.
        """
        return self._parquet(file, lambda shard, columns: shard.read(columns=columns))

    def _parquet(self, file: str, read: Callable[[pq.ParquetFile, list[str]], pa.Table]) -> pa.Table:
        """The result of a function that reads some columns of a shard."""
        place = self.folder / file
        try:
            with place.filesystem.open_input_file(place.path) as opened:
                return read(pq.ParquetFile(opened, pre_buffer=place.local is None), list(self.columns()))
        except FileNotFoundError as error:
            raise UserError(
                "a shard is missing",
                where=str(place),
                remedy="run dmtg shard again: it creates only missing shards",
            ) from error
        except pa.ArrowInvalid as error:
            raise UserError(
                f"not a complete shard: {error}", where=str(place), remedy="delete it and run dmtg shard again"
            ) from error
        except OSError as error:
            raise place.unreachable(error) from error

    def labels(self, file: str) -> Labels:
        """The labels of a shard, without its inputs.

        Raises:
            UserError: As `read`.
        """
        names = [name for name in self.columns() if name != INPUT]
        return self._labels(self._parquet(file, lambda shard, _columns: shard.read(columns=names)))

    def arrays(self, table: pa.Table) -> Arrays:
        """The columns of a table as arrays. A tensor column with one chunk is not copied."""
        inputs, held = _column(table[INPUT], self.columns()[INPUT])[0], self._labels(table)
        return Arrays(inputs, held.labels, held.present, self.outputs)

    def _labels(self, table: pa.Table) -> Labels:
        columns = {name: column for name, column in self.columns().items() if name != INPUT}
        values = {name: _column(table[name], column) for name, column in columns.items()}
        labels, present = {}, {}
        for task in self.tasks:
            labels[task.name], there = values[f"task.{task.name}"]
            if f"mask.{task.name}" in values:
                mask = values[f"mask.{task.name}"][0].astype(bool)
                present[task.name] = mask & there.reshape(-1, *[1] * (mask.ndim - 1))
            elif not there.all():
                present[task.name] = there
        return Labels(labels, present)


def _column(chunked: pa.ChunkedArray, column: Column) -> tuple[np.ndarray, np.ndarray]:
    """Values `(n, *shape)`, and whether each is present; missing values are zeros."""
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
    """The values of a binary column, as one view of its buffer."""
    wide = pa.types.is_large_binary(chunk.type)
    offsets = np.frombuffer(chunk.buffers()[1], np.int64 if wide else np.int32)
    first, last = offsets[chunk.offset], offsets[chunk.offset + len(chunk)]
    if last - first != size * len(chunk):
        raise UserError(
            f"a tensor column holds {last - first} bytes for {len(chunk)} samples of {size}",
            where="shards",
            remedy="create the shards again with dmtg shard",
        )
    return np.frombuffer(chunk.buffers()[2], dtype, count=(last - first) // dtype.itemsize, offset=int(first))
