"""Rows of CSV and Parquet files, their ids and their splits, for all readers of tables."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dmtg_core.names import listed
from pipelines.data.preprocessing import cell_text
from pipelines.errors import UserError
from pipelines.storage import Location

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {**{name: name for name in SPLITS}, "valid": "val", "validation": "val", "dev": "val"}
SPLIT_COLUMN = "split"  # read if it exists and no other column is configured
Line = tuple[int, list[str]]  # number and cells of a line
MOST_NAMES = 20  # most names of columns in a message
MOST_LINES = 5  # most lines in a message
BATCH_ROWS = 1024  # rows of a Parquet file that are converted at a time
BLOCK_BYTES = 2**20  # bytes of a CSV file that are read at a time
HEAD_BYTES = 32 * 2**20  # bytes of a CSV file that are read for its first rows


@dataclass(frozen=True)
class Row:
    """One row of a table: its last line, and its cells by column, without surrounding space.

    `unit` is the unit of `line`: a Parquet file has rows in place of lines.
    """

    line: int
    cells: dict[str, str]
    unit: str = "line"

    @property
    def place(self) -> str:
        """The position of the row, for a message."""
        return f"{self.unit} {self.line}"


def check_root(root: Location, layout: str) -> None:
    """Check that the folder of a data set exists.

    Args:
        root: The folder.
        layout: Expected content of the folder, for the message.

    Raises:
        UserError: When it does not exist, with the expected layout.
    """
    if not root.is_dir():
        root.check_bucket()
        raise UserError(
            "the folder of the data set does not exist",
            where=str(root),
            remedy=f"correct source.root; expected there: {layout}",
        )


def read_rows(
    location: Location,
    columns: Sequence[str],
    *,
    missing: Sequence[str] = (),
    header: Sequence[str] | None = None,
    quotes: bool = True,
) -> Iterator[Row]:
    """The rows of a CSV, TSV or Parquet file, or of all Parquet files of a folder, a block at a time.

    Args:
        location: The file, or a folder of Parquet files with the same columns.
        columns: Required columns.
        missing: Markers of an empty cell.
        header: Names of the columns of a CSV or TSV file without a header line.
        quotes: Whether cells of a CSV or TSV file can be quoted.

    Raises:
        UserError: When the file does not exist, cannot be read, is empty or lacks a column.
    """
    if location.is_dir():
        rows = _folder_rows(location, columns)
    elif location.name.lower().endswith((".parquet", ".pq")):
        rows = _parquet_rows(location, columns)
    else:
        rows = table_rows(location, columns, header=header, quotes=quotes)
    markers = frozenset(missing)
    for row in rows:
        row.cells.update([(name, "") for name, cell in row.cells.items() if cell in markers])
        yield row


def _folder_rows(location: Location, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of all Parquet files of a folder, which have the columns of the first."""
    for file in _parquet_files(location):
        for row in _parquet_rows(location / file, columns, file):
            yield row
            last = row
        columns = list(last.cells)  # no file is empty


def read_head(location: Location, most: int) -> tuple[list[Row], bool]:
    """The first rows of a table, or of the first Parquet file of a folder; and whether it has more rows.

    Args:
        location: CSV, TSV or Parquet file, or a folder of Parquet files.
        most: Number of rows to read.

    Raises:
        UserError: As `read_rows`.
    """
    if location.is_dir():
        files = _parquet_files(location)
        rows, more = read_head(location / files[0], most)
        return rows, more or len(files) > 1
    if location.name.lower().endswith((".parquet", ".pq")):
        return _parquet_head(location, most)
    try:
        with location.filesystem.open_input_stream(location.path) as file:
            data = file.read(HEAD_BYTES)
    except FileNotFoundError as error:
        raise _absent(location) from error
    except OSError as error:
        raise location.unreachable(error) from error
    cut = len(data) == HEAD_BYTES
    with _as_csv(location):
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=not cut)
        lines = list(islice(_parsed(io.StringIO(text, newline=""), location, quotes=True, cut=cut), most + 2))
    more = cut or len(lines) == most + 2
    return list(_rows(iter(lines[: most + 1]), None, (), location)), more


def _parquet_head(location: Location, most: int) -> tuple[list[Row], bool]:
    with _opened_parquet(location) as file:
        found = pq.ParquetFile(file)
        batch = next(found.iter_batches(batch_size=most), None)
        if batch is None:
            raise UserError("the table has no rows", where=str(location), remedy="remove it, or add rows")
        return _batch_rows(batch, "row", 1), found.metadata.num_rows > most


def _parquet_files(folder: Location) -> list[str]:
    files = [name for name in folder.files() if name.lower().endswith((".parquet", ".pq"))]
    if not files:
        raise UserError(
            "no Parquet file in the folder",
            where=str(folder),
            remedy="correct source.root, or name the table with source.options.file",
        )
    return files


def _parquet_rows(location: Location, columns: Sequence[str], name: str = "") -> Iterator[Row]:
    with _opened_parquet(location) as file:
        found = pq.ParquetFile(file)
        if not found.metadata.num_rows:
            raise UserError("the table has no rows", where=str(location), remedy="remove it, or add rows")
        _check_header(found.schema_arrow.names, columns, location)
        number = 1
        for batch in found.iter_batches(batch_size=BATCH_ROWS):
            yield from _batch_rows(batch, f"{name}, row" if name else "row", number)
            number += batch.num_rows


@contextmanager
def _opened_parquet(location: Location) -> Iterator[Any]:
    try:
        with location.filesystem.open_input_file(location.path) as file:
            yield file
    except FileNotFoundError as error:
        raise _absent(location) from error
    except pa.ArrowInvalid as error:
        raise UserError(
            f"not a Parquet file: {error}", where=str(location), remedy="create the file again"
        ) from error


def _batch_rows(batch: pa.RecordBatch, unit: str, first: int) -> list[Row]:
    names = batch.schema.names
    texts = [[cell_text(cell) for cell in column.to_pylist()] for column in batch.columns]
    rows = enumerate(zip(*texts, strict=True), first)
    return [Row(number, dict(zip(names, cells, strict=True)), unit) for number, cells in rows]


def _absent(location: Location) -> UserError:
    return UserError("the table does not exist", where=str(location), remedy="correct its path")


def table_rows(
    location: Location, columns: Sequence[str], *, header: Sequence[str] | None = None, quotes: bool = True
) -> Iterator[Row]:
    r"""The rows of a CSV file, or of tab-separated values if its name ends with `.tsv`.

    One block is in memory at a time. Lines end with `\n`, `\r\n` or `\r`.

    Args:
        location: The file.
        columns: Required columns.
        header: Names of the columns; by default those of the first line.
        quotes: Whether cells can be quoted.

    Raises:
        UserError: When the file is missing, empty, not CSV in UTF-8, or lacks a column.
    """
    try:
        with location.filesystem.open_input_file(location.path) as file, _as_csv(location):
            text = io.TextIOWrapper(io.BufferedReader(file, BLOCK_BYTES), encoding="utf-8-sig", newline="")
            yield from _rows(_parsed(text, location, quotes=quotes), header, columns, location)
    except FileNotFoundError as error:
        raise _absent(location) from error
    except OSError as error:
        raise location.unreachable(error) from error


@contextmanager
def _as_csv(location: Location) -> Iterator[None]:
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"not a CSV file in UTF-8: {error}", where=str(location),
            remedy="save it as UTF-8, for example: iconv -f WINDOWS-1252 -t UTF-8 old.csv > new.csv",
        ) from error  # fmt: skip


def _parsed(text: Iterable[str], location: Location, *, quotes: bool, cut: bool = False) -> Iterator[Line]:
    """The lines that are not empty, with their numbers; without the last line of a truncated text."""
    reader = csv.reader(
        text,
        strict=not cut,
        delimiter="\t" if location.name.lower().endswith(".tsv") else ",",
        quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
    )
    lines = ((reader.line_num, cells) for cells in reader if cells)
    if not cut:
        yield from lines
        return
    yield from (line for line, _ in pairwise(lines))


def _rows(
    lines: Iterator[Line], header: Sequence[str] | None, columns: Sequence[str], location: Location
) -> Iterator[Row]:
    if header is None:
        header = [name.strip() for name in next(lines, (0, []))[1]]
    first = next(lines, None)
    if first is None:
        raise UserError(
            "the table has no rows", where=str(location), remedy="add a line of column names, and rows below it"
        )
    _check_header(header, columns, location)
    for line, cells in chain([first], lines):
        yield _row(header, line, cells, location)


def _check_header(header: Sequence[str], columns: Sequence[str], location: Location) -> None:
    missing = [name for name in columns if name not in header]
    other = _other_separator(header, location)
    if other:
        raise UserError(
            f"the cells are separated by {other}, so the whole header line is one column",
            where=str(location),
            remedy="save it with commas, or with tabs and a name that ends with .tsv",
        )
    if missing:
        raise UserError(
            f"no column {listed(missing)}",
            where=str(location),
            remedy=f"use the columns of the table: {listed(header, MOST_NAMES)}",
        )
    twice = sorted(name for name, count in Counter(header).items() if count > 1)
    if twice:
        raise UserError(f"column {listed(twice)} occurs more than once", where=str(location), remedy="rename one")


def _other_separator(header: Sequence[str], location: Location) -> str:
    """The probable separator of a file that was read with another separator; empty if there is none."""
    if len(header) > 1 or location.name.lower().endswith((".parquet", ".pq")):
        return ""
    return next((shown for mark, shown in ((";", "semicolons"), ("\t", "tabs")) if mark in header[0]), "")


def _row(header: Sequence[str], line: int, cells: list[str], location: Location) -> Row:
    if len(cells) != len(header):
        raise UserError(
            f"line {line} has {len(cells)} cells, expected {len(header)}",
            where=str(location),
            remedy="correct the line; a cell with a comma needs quotes",
        )
    return Row(line, dict(zip(header, (cell.strip() for cell in cells), strict=True)))


def check_unique(ids: Sequence[str], where: str) -> None:
    """Check that no id occurs twice.

    Raises:
        UserError: When ids occur twice; up to five are named.
    """
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise UserError(
            f"{len(twice)} ids occur more than once: {listed(twice)}",
            where=where,
            remedy="keep one row for each id",
        )


def split_name(value: str) -> str | None:
    """The split of a common name ("valid", "dev", …); None for any other name."""
    return _SPLIT_NAMES.get(value.lower())


def hash_split(sample_id: str) -> str:
    """70 % train, 15 % val, 15 % test, by the hash of the id alone: new samples do not move others."""
    u = int(hashlib.sha256(sample_id.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if u < 0.70 else "val" if u < 0.85 else "test"


def with_ids(rows: Iterable[Row], column: str | None, prefix: str, where: str) -> Iterator[tuple[Row, str]]:
    """Each row with its id: a cell, or `prefix` and the number of the row if there is no column of ids.

    That no id occurs twice is checked when the shards are planned.

    Raises:
        UserError: After the last row, when ids are empty; up to five lines are named.
    """
    empty: list[str] = []
    count = 0
    for number, row in enumerate(rows, start=1):
        name = f"{prefix}{number}" if column is None else row.cells[column]
        if not name:
            count += 1
            empty += [str(row.line)] * (len(empty) < MOST_LINES)
            continue
        yield row, name
    if count:
        more = f" and {count - len(empty)} more" if count > len(empty) else ""
        raise UserError(
            f"no {column} id in line {listed(empty)}{more}", where=where, remedy=f"fill the column {column}"
        )


def split_of(row: Row, column: str | None, row_id: str, where: str) -> str:
    """The split that the cell of a row names; by the hash of the id if there is no such column.

    Raises:
        UserError: For a cell that names no split.
    """
    if column is None or column not in row.cells:
        return hash_split(row_id)
    split = split_name(row.cells[column])
    if split is None:
        raise UserError(
            f"unknown split {row.cells[column]!r} in column {column}, {row.place}",
            where=where,
            remedy="use train, val (valid, validation, dev) or test",
        )
    return split
