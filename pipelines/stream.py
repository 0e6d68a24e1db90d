"""A data set too large for memory, read from its shards in every epoch.

The unit of reading is a row group, a few MiB, of samples that sharding has mixed. An epoch is a new order of all
row groups; each worker reads an equal stretch of it and mixes a window of row groups at a time. Threads of the
worker read the next window, also over the end of an epoch, while batches are made from this one. They read
straight from storage: raw tensors need no decoding that would be worth moving to other processes, and a copy
through Ray's object store costs more than the reading (`make bench ROWS=ingest` measures both).
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from dmtg_core.data import Arrays, Batch, Chunks, epoch_steps, gather, overlapped
from pipelines.config import DataSection
from pipelines.ingest import Reader

Which = tuple[str, bool]  # a split, and whether its samples are mixed


@dataclass(frozen=True)
class Unit:
    """Rows `start` to `stop` of a row group."""

    file: str
    group: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many rows they are."""
        return self.stop - self.start


@dataclass(frozen=True)
class Window:
    """Units that are mixed with each other, and the samples of them that are wanted, in order."""

    epoch: int
    units: tuple[Unit, ...]
    order: np.ndarray


class StreamData:
    """A worker's stretch of every epoch, read ahead; see `dmtg_core.data.Data`.

    Every sample comes once an epoch, and all workers take the same number of steps. With another number of workers
    the stretches and so the batches are others.
    """

    def __init__(
        self, reader: Reader, data: DataSection, *, seed: int, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.reader = reader
        self.window_rows = max(int(data.shuffle_mib * 2**20 / reader.row_bytes()), 1)
        self.seed, self.rank, self.world_size, self.device = seed, rank, world_size, device
        self.pool = ThreadPoolExecutor(data.read_threads, thread_name_prefix="shards")
        # what was being read ahead when an epoch ended, and the epoch that it will give next
        self.ahead: dict[Which, tuple[int, Iterator[tuple[Window, Chunks]]]] = {}

    def steps(self, batch_size: int) -> int:
        """See `epoch_steps`."""
        return epoch_steps(self.reader.manifest.rows("train"), batch_size, self.world_size)

    def train(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """See `Data.train`."""
        rows = _share(self.reader.manifest.rows("train"), self.rank, self.world_size)
        sizes = [len(part) for part in np.array_split(np.arange(rows.stop - rows.start), self.steps(batch_size))]
        return overlapped(self._batches(("train", True), epoch, sizes, start), self.device)

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        """See `Data.evaluate`."""
        rows = _share(self.reader.manifest.rows(split), self.rank, self.world_size)
        count = rows.stop - rows.start
        sizes = [min(batch_size, count - first) for first in range(0, count, batch_size)]
        which = (split, False)
        epoch = self.ahead[which][0] if which in self.ahead else 0  # every pass is alike; go on where one ended
        return overlapped(self._batches(which, epoch, sizes, 0), self.device)

    def _batches(self, which: Which, epoch: int, sizes: Sequence[int], start: int) -> Iterator[Batch]:
        """Batches of exactly `sizes` samples, from number `start` on."""
        windows = self._windows(which, epoch, sum(sizes[:start]))
        held: list[tuple[Chunks, np.ndarray]] = []
        for size in sizes[start:]:
            while sum(len(rows) for _, rows in held) < size:
                window, chunks = next(windows)
                held.append((chunks, window.order))
            taken, held = _cut(held, size)
            parts = [part for chunks, rows in taken for part in chunks.locate(rows)]
            yield gather(parts, self.reader.tasks, self.device)
        self.ahead[which] = (epoch + 1, windows)

    def _windows(self, which: Which, epoch: int, skip: int) -> Iterator[tuple[Window, Chunks]]:
        """The windows of this worker from some sample of an epoch on, and on through the epochs after it."""
        following = self.ahead.pop(which, None)
        if following is not None and following[0] == epoch and not skip:
            return following[1]
        return self._read(_after(self._plan(which, epoch), skip))

    def _read(self, plan: Iterator[Window]) -> Iterator[tuple[Window, Chunks]]:
        """Windows with their samples; while one is used, the next is read."""
        ahead: deque[tuple[Window, list[Future[Arrays]]]] = deque()
        for window in plan:
            ahead.append((window, [self.pool.submit(self._unit, unit) for unit in window.units]))
            if len(ahead) > 1:
                ready, units = ahead.popleft()
                yield ready, Chunks([unit.result() for unit in units])

    def _unit(self, unit: Unit) -> Arrays:
        arrays = self.reader.read(unit.file, unit.group)
        part = slice(unit.start, unit.stop)
        return Arrays(
            arrays.inputs[part],
            {name: values[part] for name, values in arrays.labels.items()},
            {name: values[part] for name, values in arrays.present.items()},
        )

    def _plan(self, which: Which, epoch: int) -> Iterator[Window]:
        """The windows of one epoch after the other, without end."""
        split, mixed = which
        units = all_units(self.reader, split)
        for now in itertools.count(epoch):
            order = np.random.default_rng([self.seed, now]).permutation(len(units)) if mixed else range(len(units))
            mine = stretch([units[i] for i in order], self.rank, self.world_size)
            for number, members in enumerate(_grouped(mine, self.window_rows)):
                rows = np.arange(sum(unit.rows for unit in members))
                if mixed:
                    # a generator of its own, so that a window does not depend on those before it
                    rows = np.random.default_rng([self.seed, now, self.rank, number]).permutation(rows)
                yield Window(now, members, rows)


def all_units(reader: Reader, split: str) -> list[Unit]:
    """Every row group of a split, in order."""
    size = reader.manifest.group_rows
    return [
        Unit(shard.file, start // size, 0, min(size, shard.rows - start))
        for shard in reader.manifest.shards[split]
        for start in range(0, shard.rows, size)
    ]


def stretch(units: Sequence[Unit], rank: int, world_size: int) -> list[Unit]:
    """This worker's part of the rows, which may begin and end inside a unit."""
    rows = _share(sum(unit.rows for unit in units), rank, world_size)
    found, first = [], 0
    for unit in units:
        start, stop = max(rows.start - first, 0), min(rows.stop - first, unit.rows)
        if start < stop:
            found.append(Unit(unit.file, unit.group, unit.start + start, unit.start + stop))
        first += unit.rows
    return found


def _share(rows: int, rank: int, world_size: int) -> slice:
    return slice(rows * rank // world_size, rows * (rank + 1) // world_size)


def _grouped(units: Sequence[Unit], rows: int) -> Iterator[tuple[Unit, ...]]:
    """Neighbours together until they hold `rows` rows."""
    count = max(math.ceil(sum(unit.rows for unit in units) / rows), 1)
    for part in np.array_split(np.arange(len(units)), min(count, len(units))):
        yield tuple(units[i] for i in part)


def _after(plan: Iterator[Window], skip: int) -> Iterator[Window]:
    """The plan without its first `skip` samples; windows that are skipped whole are not read."""
    for window in plan:
        if skip < len(window.order):
            yield Window(window.epoch, window.units, window.order[skip:])
            yield from plan
            return
        skip -= len(window.order)


def _cut(
    held: Sequence[tuple[Chunks, np.ndarray]], size: int
) -> tuple[list[tuple[Chunks, np.ndarray]], list[tuple[Chunks, np.ndarray]]]:
    """The first `size` samples of what is held, and the rest."""
    taken, rest = [], []
    for chunks, rows in held:
        if size:
            taken.append((chunks, rows[:size]))
        if size < len(rows):
            rest.append((chunks, rows[size:]))
        size = max(size - len(rows), 0)
    return taken, rest
