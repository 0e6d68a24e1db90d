"""Streaming: batches of a data set that is too large for memory, read from its shards in every epoch.

The unit of reading is a row group: a few MiB of samples that sharding has shuffled. Every epoch has a new order of
all row groups, which is divided into as many streams as row groups fit into `data.shuffle_mib`. Each stream
shuffles one window of row groups at a time, and every global batch takes a part of each stream. The batches are
therefore the same for any number of workers: the samples of a batch are divided among the workers in the order of
the streams, and a worker reads the streams of its share. Threads of the worker read the next windows, also beyond
the end of an epoch, while the current windows are used. They read directly from storage: raw tensors need no
decoding that is worth moving to other processes, and a copy through Ray's object store takes longer than reading
(`make bench ROWS=ingest` measures both).

With `data.sampler=balanced` each worker first reads the labels of the training split. From them it knows how often
each sample occurs in an epoch. A row group then has that many rows, in the same order for all workers, and is
shuffled and divided as before.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from dmtg_core.sampling import repeats, sample_weights, sampled_tasks
from dmtg_core.training.data import Arrays, Batch, Chunks, gather, overlapped
from pipelines.config.sections import DataSection
from pipelines.data.reader import Reader
from pipelines.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unit:
    """Rows `start` to `stop` of a row group, or of `drawn`, its rows that a sampler has drawn, in order."""

    file: str
    group: int
    start: int
    stop: int
    drawn: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start

    def part(self, group: Arrays) -> Arrays:
        """The rows of the row group that are needed, each once."""
        if self.drawn is None:
            return group.part(slice(self.start, self.stop))
        return group.part(np.unique(self.drawn[self.start : self.stop]))

    def order(self) -> tuple[np.ndarray, int]:
        """The place of each row in `part`, and the number of rows of `part`."""
        if self.drawn is None:
            return np.arange(self.rows), self.rows
        found, places = np.unique(self.drawn[self.start : self.stop], return_inverse=True)
        return places, len(found)


@dataclass(frozen=True)
class Window:
    """Units that are shuffled together, and the wanted samples of them, in order."""

    units: tuple[Unit, ...]
    order: np.ndarray


@dataclass(frozen=True)
class Division:
    """Division of the samples of a batch among streams and workers, both in order.

    The boundaries of streams and workers are rounded in the same way. If the number of streams is a multiple of
    the number of workers, no worker reads a stream of another.

    Args:
        streams: Number of streams, at most the number of samples of a batch.
        rank, world_size: Rank of the worker, and number of workers.
    """

    streams: int
    rank: int
    world_size: int

    def ends(self, sizes: np.ndarray) -> np.ndarray:
        """Cumulative number of samples of the streams, `(streams + 1,)`, over batches of `sizes`."""
        values, counts = np.unique(sizes, return_counts=True)
        ends: np.ndarray = counts @ (values[:, None] * np.arange(self.streams + 1) // self.streams)
        return ends

    def portions(self, size: int) -> np.ndarray:
        """Samples of each stream in a batch, `(streams, 3)`: before, of and after this worker."""
        ends = size * np.arange(self.streams + 1) // self.streams
        share = _share(size, self.rank, self.world_size)
        cuts = [ends[:-1], *(np.clip(at, ends[:-1], ends[1:]) for at in (share.start, share.stop)), ends[1:]]
        return np.diff(cuts, axis=0).T

    def own(self, sizes: np.ndarray) -> list[int]:
        """The streams that this worker needs for batches of `sizes`."""
        return [int(i) for i in np.flatnonzero(sum(self.portions(size)[:, 1] for size in np.unique(sizes)))]


@dataclass(frozen=True)
class Layout:
    """Layout of the batches of one pass through a split.

    Args:
        split: Name of the split.
        shuffled: Whether every epoch has a new order.
        first: First row in that order.
        sizes: Number of samples of each batch.
        division: Division of the samples among streams and workers.
    """

    split: str
    shuffled: bool
    first: int
    sizes: np.ndarray
    division: Division


class Stream:
    """The samples of one stream in order, read ahead.

    Args:
        plan: Endless series of windows of the stream.
        read: Starts to read a unit.
        ahead: Number of samples that are read while those before them are used.
    """

    def __init__(self, plan: Iterator[Window], read: Callable[[Unit], Future[Arrays]], ahead: int) -> None:
        self.plan, self.read, self.ahead = plan, read, ahead
        self.coming: deque[tuple[Window, list[Future[Arrays]]]] = deque()
        self.held: list[tuple[Chunks, np.ndarray]] = []
        self._read_on()

    def take(self, before: int, count: int, after: int) -> list[tuple[Arrays, np.ndarray]]:
        """The next `count` samples, between those of other workers: arrays, and the rows to take of each."""
        self._next(before)
        taken = self._next(count)
        self._next(after)
        return [part for chunks, rows in taken for part in chunks.locate(rows)]

    def _next(self, count: int) -> list[tuple[Chunks, np.ndarray]]:
        while sum(len(rows) for _, rows in self.held) < count:
            window, units = self.coming.popleft()
            self._read_on()
            self.held.append((Chunks([unit.result() for unit in units]), window.order))
        taken, self.held = _cut(self.held, count)
        return taken

    def _read_on(self) -> None:
        while sum(len(window.order) for window, _ in self.coming) < self.ahead:
            window = next(self.plan)
            self.coming.append((window, [self.read(unit) for unit in window.units]))


class StreamData:
    """The share of a worker in the global batches, read ahead; see `dmtg_core.training.data.Data`.

    Every epoch has every sample once, or as often as `data.sampler` says. The global batches depend only on the
    seed, the epoch, the configuration and the shards, not on the number of workers.
    """

    def __init__(
        self, reader: Reader, data: DataSection, *, seed: int, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.reader = reader
        self.window_rows = max(int(data.shuffle_mib * 2**20 / reader.row_bytes()), 1)
        group_mib = reader.manifest.group_rows * reader.manifest.description.row_bytes / 2**20
        self.streams = max(int(data.shuffle_mib / group_mib), 1)
        self.seed, self.rank, self.world_size, self.device = seed, rank, world_size, device
        self.pool = ThreadPoolExecutor(data.read_threads, thread_name_prefix="shards")
        self.units = {split: all_units(reader, split) for split in reader.manifest.shards}
        self.sampler = data.sampler
        self.drawn: dict[int, list[Unit]] = {}  # epoch → its units; streams read on into the next epoch
        # split and batch size → the next epoch, and its streams, which are already read ahead
        self.ahead: dict[tuple[str, int], tuple[int, list[Stream]]] = {}
        if rank == 0 and self.streams < world_size <= len(self.units["train"]):
            logger.warning(
                "%d workers share %d streams, so samples are read more than once; with data.shuffle_mib=%d "
                "each worker reads its own streams",
                world_size, self.streams, math.ceil(world_size * group_mib),
            )  # fmt: skip

    def steps(self, batch_size: int) -> int:
        """Number of global batches of an epoch: the number of full batches, for any number of workers.

        The remaining samples are distributed over these batches, because a smaller batch could be too small for
        the workers.

        Raises:
            UserError: When a batch has fewer samples than workers.
        """
        if batch_size < self.world_size:
            raise UserError(
                f"a batch of {batch_size} cannot be shared by {self.world_size} workers",
                where="train.batch_size",
                remedy="raise it, or lower ray.workers",
            )
        return max(self.reader.manifest.rows("train") // batch_size, 1)

    def train(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """See `Data.train`."""
        steps = self.steps(batch_size)
        sizes = np.diff(np.arange(steps + 1) * self.reader.manifest.rows("train") // steps)
        streams = min(self.streams, len(self.units["train"]), int(sizes.min()))
        layout = Layout("train", True, 0, sizes, Division(streams, self.rank, self.world_size))
        return overlapped(self._batches(layout, (layout.split, batch_size), epoch, start), self.device)

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        """See `Data.evaluate`."""
        rows = _share(self.reader.manifest.rows(split), self.rank, self.world_size)
        count = rows.stop - rows.start
        sizes = np.array([min(batch_size, count - first) for first in range(0, count, batch_size)], int)
        layout, key = Layout(split, False, rows.start, sizes, Division(1, 0, 1)), (split, 0)
        epoch = self.ahead[key][0] if key in self.ahead else 0  # all passes are equal: use what is read ahead
        return overlapped(self._batches(layout, key, epoch, 0), self.device)

    def _batches(self, layout: Layout, key: tuple[str, int], epoch: int, start: int) -> Iterator[Batch]:
        """The part of this worker in the batches of one epoch, from batch `start`."""
        if not len(layout.sizes):
            return
        own = layout.division.own(layout.sizes)
        streams = self._streams(layout, key, epoch, start, own)
        portions = {
            size: layout.division.portions(size)[own].tolist() for size in np.unique(layout.sizes).tolist()
        }
        for size in layout.sizes[start:].tolist():
            taken = zip(streams, portions[size], strict=True)
            # not kept in a variable, which would hold used windows in memory while the batch is trained on
            yield gather([p for stream, cut in taken for p in stream.take(*cut)], self.reader.tasks, self.device)
        self.ahead[key] = (epoch + 1, streams)

    def _streams(
        self, layout: Layout, key: tuple[str, int], epoch: int, start: int, own: Sequence[int]
    ) -> list[Stream]:
        """The streams with the numbers `own`, from batch `start` of an epoch and through all later epochs."""
        prepared = self.ahead.pop(key, None)
        if prepared is not None and prepared[0] == epoch and not start:
            return prepared[1]
        ends = layout.first + layout.division.ends(layout.sizes)
        skipped = np.diff(layout.division.ends(layout.sizes[:start]))
        window = max(self.window_rows // layout.division.streams, 1)
        # a worker reads the same amount ahead for any number of streams, but not more than an epoch
        ahead = max(self.window_rows // len(own) - window // 2, 1)
        return [
            Stream(
                _after(self._plan(layout, epoch, i, slice(ends[i], ends[i + 1]), window), skipped[i]),
                lambda unit: self.pool.submit(self._unit, unit),
                min(ahead, int(ends[i + 1] - ends[i])),
            )
            for i in own
        ]

    def _unit(self, unit: Unit) -> Arrays:
        return unit.part(self.reader.read(unit.file, unit.group))

    @cached_property
    def weights(self) -> np.ndarray:
        """Weights of the training samples in the order of the shards."""
        reader = replace(self.reader, tasks=tuple(sampled_tasks(self.reader.tasks)))
        files = [shard.file for shard in reader.manifest.shards["train"] if shard.rows]
        return sample_weights(reader.tasks, list(self.pool.map(reader.labels, files)))

    def train_units(self, epoch: int) -> list[Unit]:
        """The training units of an epoch, with the rows that the sampler has drawn."""
        units = self.units["train"]
        if self.sampler == "uniform":
            return units
        if epoch not in self.drawn:
            counts = np.split(repeats(self.weights, [self.seed, epoch]), np.cumsum([u.rows for u in units])[:-1])
            drawn = [np.repeat(np.arange(len(held)), held) for held in counts]
            last = {number: held for number, held in self.drawn.items() if number >= epoch - 1}
            self.drawn = last | {
                epoch: [replace(u, stop=len(d), drawn=d) for u, d in zip(units, drawn, strict=True)]
            }
        return self.drawn[epoch]

    def _plan(self, layout: Layout, epoch: int, stream: int, rows: slice, window: int) -> Iterator[Window]:
        """The windows of a stream: an endless series over the epochs."""
        for now in itertools.count(epoch):
            units = self.train_units(now) if layout.shuffled else self.units[layout.split]
            order = np.arange(len(units))
            if layout.shuffled:
                order = np.random.default_rng([self.seed, now]).permutation(order)
            for number, members in enumerate(_grouped(stretch([units[i] for i in order], rows), window)):
                orders = [unit.order() for unit in members]
                firsts = np.cumsum([0, *(held for _, held in orders)])
                wanted = np.concatenate([rows + at for (rows, _), at in zip(orders, firsts[:-1], strict=True)])
                if layout.shuffled:
                    # every window has its own generator, so that it does not depend on earlier windows; numbers
                    # start at 1, because trailing zeros of a seed change nothing
                    wanted = np.random.default_rng([self.seed, now, stream, number + 1]).permutation(wanted)
                yield Window(members, wanted)


def all_units(reader: Reader, split: str) -> list[Unit]:
    """Every row group of a split, in order."""
    size = reader.manifest.group_rows
    return [
        Unit(shard.file, start // size, 0, min(size, shard.rows - start))
        for shard in reader.manifest.shards[split]
        for start in range(0, shard.rows, size)
    ]


def stretch(units: Sequence[Unit], rows: slice) -> list[Unit]:
    """The units of a range of rows, which may begin and end inside a unit."""
    found, first = [], 0
    for unit in units:
        start, stop = max(rows.start - first, 0), min(rows.stop - first, unit.rows)
        if start < stop:
            found.append(replace(unit, start=unit.start + start, stop=unit.start + stop))
        first += unit.rows
    return found


def _share(rows: int, rank: int, world_size: int) -> slice:
    return slice(rows * rank // world_size, rows * (rank + 1) // world_size)


def _grouped(units: Sequence[Unit], rows: int) -> Iterator[tuple[Unit, ...]]:
    """Neighbouring units in windows of about equal size, with at most about `rows` rows each."""
    sizes = np.array([unit.rows for unit in units])
    total = int(sizes.sum())
    middles = 2 * np.cumsum(sizes) - sizes  # twice the middle of each unit, so that all numbers are integers
    numbers = middles * math.ceil(total / rows) // (2 * total)
    for _, members in itertools.groupby(zip(numbers, units, strict=True), key=lambda pair: int(pair[0])):
        yield tuple(unit for _, unit in members)


def _after(plan: Iterator[Window], skip: int) -> Iterator[Window]:
    """The plan without its first `skip` samples; windows that are skipped completely are not read."""
    for window in plan:
        if skip < len(window.order):
            yield Window(window.units, window.order[skip:])
            yield from plan
            return
        skip -= len(window.order)


def _cut(
    held: Sequence[tuple[Chunks, np.ndarray]], size: int
) -> tuple[list[tuple[Chunks, np.ndarray]], list[tuple[Chunks, np.ndarray]]]:
    """The first `size` of the held samples, and the others."""
    taken, rest = [], []
    for chunks, rows in held:
        if size:
            taken.append((chunks, rows[:size]))
        if size < len(rows):
            rest.append((chunks, rows[size:]))
        size = max(size - len(rows), 0)
    return taken, rest
