"""Plans of shards: the samples of each split in the order of the hash of their ids, cut into shards.

Samples of one block (see `Entry`) stay together: blocks are in the order of the hash of their names, and the
samples of a block in that of their ids.

Neither the samples nor their ids are held in memory. They are sorted with temporary files
(`pipelines.data.external_sort`), and a plan reads its own samples from there when they are needed. The order and
the digests are those of sorting a list in memory.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from itertools import islice
from typing import Any, overload

from dmtg_core.names import listed
from pipelines.config.sections import DataSection, SourceSection
from pipelines.data.external_sort import Run, TemporaryRecords, sort_records
from pipelines.data.manifest import SPLITS
from pipelines.data.sources.base import Description, Entry
from pipelines.errors import UserError

SHARD_BYTES = 64 * 2**20  # decoded size of a shard if its number of rows is not configured
SMALL_COUNT, SMALL_BYTES = 100, 2**20  # shards, and their decoded size, for a note
NAMED = 5  # most ids in a message
MOST_SHARDS = 10_000  # of a configured size that is smaller than the default
_ID = hashlib.sha256().digest_size
_KEY = 2 * _ID  # of the order: the hash of the block, and that of the id


@dataclass(frozen=True)
class ShardPlan:
    """Plan of a shard.

    Args:
        file: Name of the shard.
        split: Its split.
        entries: Its samples.
        key: Digest of the samples and the options. The shard holds it, and equal data has equal shards.
        digest: Digest of the key and of the state of the raw files, which changes when they are copied.
    """

    file: str
    split: str
    entries: Sequence[Entry]
    key: str
    digest: str


class StoredEntries(Sequence[Entry]):
    """Samples in a temporary file. Each iteration reads them; a pickled copy holds them as a tuple."""

    def __init__(self, run: Run, count: int) -> None:
        self._run, self._count = run, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        return (_entry(record) for record in self._run)

    @overload
    def __getitem__(self, place: int) -> Entry: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Entry]: ...
    def __getitem__(self, place: int | slice) -> Entry | Sequence[Entry]:
        chosen = range(self._count)[place]
        if isinstance(chosen, range):
            return tuple(self)[place]
        return next(islice(self, chosen, None))

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        # another machine cannot read the temporary files of this one
        return tuple, (tuple(self),)


def make_plans(
    entries: Iterable[Entry],
    description: Description,
    source: SourceSection,
    data: DataSection,
    files: str = "",
) -> list[ShardPlan]:
    """Divide the samples of each split, shuffled by the hash of their ids, into shards.

    Args:
        entries: The samples in any order; they are read once.
        description: Content of their rows.
        source: Kind and options are part of the digests.
        data: Rows of a shard and compression.
        files: Digest of the files on which shards depend beyond the fields of their samples.

    Returns:
        The plans of all splits, in order. They are small: their samples are in temporary files.

    Raises:
        UserError: When there are no samples for training or validation, two samples have the same id, there are
            too many shards of a small configured size, or the temporary folder is full.
    """
    described = [description.input.to_dict(), [task.to_dict() for task in description.tasks]]
    described.append(dict(description.preparation))
    options = json.dumps([described, source.kind, source.options, data.compression], sort_keys=True, default=str)
    usual = min(max(SHARD_BYTES // max(description.row_bytes, 1), 64), 8192)
    size = data.rows_per_shard or usual
    splits = {split: _Split(split, size, options, files) for split in SPLITS}
    repeated, before, ids = _Repeated(), b"", TemporaryRecords()
    # neighbours on disk are similar; a hash shuffles them in the same way on every machine
    for record in sort_records(map(_record, entries)):
        key, stored = record[:_KEY], record[_KEY:]
        entry = _entry(stored)
        if entry.block:  # the same id in two blocks has two places in the order
            ids.append(key[_ID:] + entry.id.encode())
        elif key == before:
            repeated.add(entry.id)
        before = key
        splits[entry.split].add(entry, stored)
    repeated.add_neighbours(sort_records(ids.read(0, ids.size)))
    repeated.check(source.root)
    counts = {name: split.count for name, split in splits.items()}
    if not counts["train"] or not counts["val"]:
        raise UserError(
            f"splits hold {', '.join(f'{name}: {count}' for name, count in counts.items())} samples",
            where=source.root,
            remedy="training needs samples for train and val; check the split column or file. Without one, the "
            "SHA-256 of the id decides: rows that were chosen by it can be in one split; then add a split column"
            + (", or set source.options.val_share=0.1" if source.kind in ("image_table", "webdataset") else ""),
        )
    plans = [plan for split in splits.values() for plan in split.finished()]
    if size < usual and len(plans) > MOST_SHARDS:
        raise UserError(
            f"data.rows_per_shard={size} makes {len(plans)} shards of {sum(counts.values())} samples, "
            f"at most {MOST_SHARDS} are reasonable",
            where="data.rows_per_shard",
            remedy=f"leave it out: a shard then has {usual} samples",
            wrong_use=True,
        )
    return plans


def small_shards(plans: Sequence[ShardPlan], row_bytes: int) -> str:
    """A note for shards that are much smaller than is useful; empty for others.

    Args:
        plans: All shards.
        row_bytes: Decoded size of a sample.
    """
    rows = max(len(plan.entries) for plan in plans)
    if len(plans) < SMALL_COUNT or rows * row_bytes >= SMALL_BYTES:
        return ""
    return f"{len(plans)} shards of {rows} samples at most are slow to read: raise data.rows_per_shard"


def _record(entry: Entry) -> bytes:
    """The key of the order, and the sample."""
    own = hashlib.sha256(entry.id.encode()).digest()
    first = hashlib.sha256(entry.block.encode()).digest() if entry.block else own
    return first + own + pickle.dumps((entry.id, entry.split, entry.fields, entry.block))


def _entry(stored: bytes) -> Entry:
    return Entry(*unpickled(stored))


def pickled(plan: ShardPlan) -> bytes:
    """The plan with its samples, for a task on any machine."""
    return pickle.dumps(plan)


def unpickled(data: bytes) -> Any:
    """A plan, or the values of a sample."""
    return pickle.loads(data)  # noqa: S301 - written by this job


class _Repeated:
    """Ids that occur more than once, which are neighbours in the order: their number, and the first by name."""

    def __init__(self) -> None:
        self._count, self._last = 0, ""
        self._first: list[str] = []

    def add(self, name: str) -> None:
        if self._count and name == self._last:
            return
        self._count, self._last = self._count + 1, name
        self._first = heapq.nsmallest(NAMED, [*self._first, name])

    def add_neighbours(self, records: Iterable[bytes]) -> None:
        """Add the ids that follow themselves in sorted records of a hash and an id."""
        before = b""
        for record in records:
            if record == before:
                self.add(record[_ID:].decode())
            before = record

    def check(self, where: str) -> None:
        if self._count:
            more = f" and {self._count - NAMED} more" if self._count > NAMED else ""
            raise UserError(
                f"{self._count} ids occur more than once: {listed(self._first)}{more}",
                where=where,
                remedy="give every sample a different id",
            )


class _Split:
    """The plans of a split, made from its samples in their order."""

    def __init__(self, name: str, rows: int, options: str, files: str) -> None:
        self.count = 0
        self._name, self._rows, self._options, self._files = name, rows, options.encode(), files
        self._file = TemporaryRecords()
        self._plans: list[ShardPlan] = []
        self._start()

    def _start(self) -> None:
        self._begin, self._digest, self._held = self._file.size, hashlib.sha256(self._options), 0

    def add(self, entry: Entry, stored: bytes) -> None:
        """Add the next sample."""
        text = _ENCODER.encode({"id": entry.id, "split": entry.split, "fields": entry.fields})
        self._digest.update(f"{', ' if self._held else '['}{text}".encode())
        self._file.append(stored)
        self._held += 1
        self.count += 1
        if self._held == self._rows:
            self._end()

    def _end(self) -> None:
        self._digest.update(b"]")
        key = self._digest.hexdigest()
        digest = hashlib.sha256(f"{key} {self._files}".encode()).hexdigest() if self._files else key
        run = Run(self._file, self._begin, self._file.size)
        file = f"{self._name}-{len(self._plans):05d}-{digest[:12]}.parquet"
        self._plans.append(ShardPlan(file, self._name, StoredEntries(run, self._held), key, digest))
        self._start()

    def finished(self) -> list[ShardPlan]:
        """All plans; the last can have fewer samples."""
        if self._held:
            self._end()
        return self._plans


def _plain(value: Any) -> Any:
    """A value of a sample that JSON does not have."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


_ENCODER = json.JSONEncoder(sort_keys=True, default=_plain)
