"""Sorting of more byte strings than fit into memory (external merge sort: Knuth, TAOCP vol. 3, section 5.4).

Sorted runs of bounded size are written to temporary files and merged. The files have no name: the system frees
their space when the process ends, also when it is killed. They are in the folder of `tempfile.gettempdir()`, which
`TMPDIR` sets.
"""

from __future__ import annotations

import heapq
import os
import struct
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import UserError

MEMORY = 32 * 2**20  # bytes of a run, with the objects that hold it
OVERHEAD = 48  # bytes of an object and its place in a list
WAYS = 64  # runs that are merged at the same time
BLOCK = 2**16  # bytes that are read or written at a time
_LENGTH = struct.Struct("<I")


class TemporaryRecords:
    """A temporary file of byte strings, which are appended and read in order.

    Raises:
        UserError: When the temporary folder cannot be written to; it is named.
    """

    def __init__(self) -> None:
        self._pending = bytearray()
        self._written = 0
        try:
            self._file, name = tempfile.mkstemp(prefix="dmtg-")
            Path(name).unlink()
        except OSError as error:
            raise _no_space(error) from error
        weakref.finalize(self, os.close, self._file)

    @property
    def size(self) -> int:
        """Bytes of all records, and the position of the next record."""
        return self._written + len(self._pending)

    def append(self, record: bytes) -> None:
        """Add a record of less than 4 GiB."""
        self._pending += _LENGTH.pack(len(record))
        self._pending += record
        if len(self._pending) >= BLOCK:
            self._flush()

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """The records between two positions; one block is in memory at a time."""
        self._flush()
        data, at, place = b"", 0, start
        while at < len(data) or place < end:
            needed = _LENGTH.size
            if len(data) - at >= needed:
                needed += _LENGTH.unpack_from(data, at)[0]
                if len(data) - at >= needed:
                    yield data[at + _LENGTH.size : at + needed]
                    at += needed
                    continue
            block = os.pread(self._file, min(max(BLOCK, needed), end - place), place)
            if not block:
                raise EOFError(f"a temporary file ends at {place} of {end} bytes")
            data, at, place = data[at:] + block, 0, place + len(block)

    def _flush(self) -> None:
        rest = memoryview(bytes(self._pending))
        self._pending.clear()
        while rest:
            try:
                count = os.pwrite(self._file, rest, self._written)
            except OSError as error:
                raise _no_space(error) from error
            self._written, rest = self._written + count, rest[count:]


def _no_space(error: OSError) -> UserError:
    return UserError(
        f"cannot write temporary files: {error.strerror or error}",
        where=tempfile.gettempdir(),
        remedy="free disk space there, or set TMPDIR to a folder with free space",
    )


@dataclass(frozen=True)
class Run:
    """Records of a temporary file between two positions. It can be iterated several times."""

    file: TemporaryRecords
    start: int
    end: int

    def __iter__(self) -> Iterator[bytes]:
        return self.file.read(self.start, self.end)


def sort_records(records: Iterable[bytes]) -> Iterator[bytes]:
    """The records in order. Up to `MEMORY` bytes are sorted without a file. The number of runs changes nothing.

    Args:
        records: Byte strings, of less than 4 GiB each.

    Raises:
        UserError: When the temporary folder cannot be written to.
    """
    runs: list[Run] = []
    held: list[bytes] = []
    file, size = None, 0
    for record in records:
        held.append(record)
        size += len(record) + OVERHEAD
        if size >= MEMORY:
            file = file or TemporaryRecords()
            runs.append(_append(file, sorted(held)))
            held, size = [], 0
    held.sort()
    file = None  # merging frees the files of the runs before
    while len(runs) > WAYS:
        runs = _merge_groups(runs)
    yield from heapq.merge(*runs, held) if runs else held


def _append(file: TemporaryRecords, records: Iterable[bytes]) -> Run:
    start = file.size
    for record in records:
        file.append(record)
    return Run(file, start, file.size)


def _merge_groups(runs: Sequence[Run]) -> list[Run]:
    """Longer runs, in a new file: each is merged from `WAYS` of the old ones."""
    file = TemporaryRecords()
    return [_append(file, heapq.merge(*runs[at : at + WAYS])) for at in range(0, len(runs), WAYS)]
