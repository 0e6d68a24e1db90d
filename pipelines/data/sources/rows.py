"""Rows of tables of text and of Parquet files, and their ids, for all readers of tables."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice

from dmtg_core.names import listed
from pipelines.data.sources.tables.delimited import delimited_rows
from pipelines.data.sources.tables.dialect import Dialect, DialectOptions, dialect_of
from pipelines.data.sources.tables.folders import SPLIT_COLUMN, SPLITS, split_name
from pipelines.data.sources.tables.parquet import file_head, file_rows, folder_head, folder_rows, is_columnar
from pipelines.data.sources.tables.row import MOST_NAMES, AnyRow, Row
from pipelines.errors import UserError
from pipelines.storage import Location

__all__ = [
    "MOST_NAMES", "SPLITS", "SPLIT_COLUMN", "Dialect", "DialectOptions", "Row", "check_root", "check_unique",
    "read_head", "read_rows", "split_name", "table_dialect", "with_ids",
]  # fmt: skip

logger = logging.getLogger(__name__)

MOST_LINES = 5  # most lines in a message


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
    dialect: Dialect | None = None,
    header: Sequence[str] | None = None,
    words: Collection[str] = (),
    ragged: bool = False,
) -> Iterator[Row]:
    """The rows of a table of text, a Parquet or Arrow file, or a folder of them, a block at a time.

    Numbers with decimal commas or thousands separators are written as in Python.

    Args:
        location: The file, or a folder of files with the same columns; see `tables.folders`.
        columns: Required columns.
        dialect: How a table of text is written; by default it is found in its first bytes.
        header: Names of the columns of a table of text without a header line.
        words: Columns whose cells stay as they are written, such as texts and ids.
        ragged: As `delimited_rows`.

    Raises:
        UserError: When the file does not exist, cannot be read, is empty or lacks a column.
    """
    if location.is_dir():
        yield from folder_rows(location, columns)
        return
    if is_columnar(location.name):
        yield from file_rows(location, columns)
        return
    found = dialect or dialect_of(location, columns=columns, named=header is None)
    rows = delimited_rows(location, found, columns, header, ragged=ragged)
    yield from _in_points(rows, found, frozenset(words)) if found.converts else rows


def table_dialect(
    location: Location,
    given: DialectOptions | None = None,
    *,
    columns: Sequence[str] = (),
    named: bool = True,
    usual: tuple[str, str] | None = None,
    log: bool = False,
) -> Dialect:
    """How a table is written; the usual dialect for Parquet.

    Args:
        location: The table.
        given: What is known.
        columns: Required columns.
        named: False for a table of text whose columns are named by the options.
        usual: As `dialect_of`.
        log: Whether to log a dialect that is not the usual one.

    Raises:
        UserError: When a table of text cannot be read or decoded.
    """
    if location.is_dir() or is_columnar(location.name):
        return Dialect()
    found = dialect_of(location, given, columns=columns, named=named, usual=usual)
    if log and (found.packing or found.options or found.unsure):
        logger.info("%s: %s", location, found)
    return found


def _in_points(rows: Iterable[Row], dialect: Dialect, words: frozenset[str]) -> Iterator[Row]:
    for row in rows:
        row.cells.update([(name, dialect.plain(cell)) for name, cell in row.cells.items() if name not in words])
        yield row


def read_head(location: Location, most: int) -> tuple[list[Row], bool]:
    """The first rows of a table, or of the Parquet files of a folder; and whether it has more rows.

    Args:
        location: As `read_rows`.
        most: Number of rows to read.

    Raises:
        UserError: As `read_rows`.
    """
    if location.is_dir():
        return folder_head(location, most)
    if is_columnar(location.name):
        return file_head(location, most)
    rows = read_rows(location, ())
    found = list(islice(rows, most))
    return found, next(rows, None) is not None


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


def with_ids(rows: Iterable[AnyRow], column: str | None, prefix: str, where: str) -> Iterator[tuple[AnyRow, str]]:
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
