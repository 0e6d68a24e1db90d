"""Rows of tables of text, a block at a time; every error has its line and its column."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice

from pipelines.data.sources.tables.dialect import Dialect, csv_format
from pipelines.data.sources.tables.encodings import BLOCK_BYTES, bad_byte, unpacked
from pipelines.data.sources.tables.row import Row, check_header
from pipelines.errors import UserError
from pipelines.storage import Location

MOST_SHOWN = 30  # most characters of a cell in a message
Line = tuple[int, list[str]]  # number and cells of a line


def delimited_rows(
    location: Location,
    dialect: Dialect,
    columns: Sequence[str],
    header: Sequence[str] | None = None,
    *,
    ragged: bool = False,
) -> Iterator[Row]:
    r"""The rows of a table of text. One block is in memory at a time. Lines end with `\n`, `\r\n` or `\r`.

    Args:
        location: The file.
        dialect: How it is written.
        columns: Required columns.
        header: Names of the columns; by default those of the first line.
        ragged: Whether a line with too many or too few cells is a row with a problem and no error.

    Raises:
        UserError: When the file is missing, empty, not in the dialect, or lacks a column.
    """
    try:
        with _text(location, dialect) as text:
            for row in _rows(_lines(text, location, dialect), header, columns, location, dialect):
                if row.problem and not ragged:
                    raise UserError(
                        f"line {row.line} {row.problem}",
                        where=str(location),
                        remedy=f"correct the line; a cell with a {_mark(dialect)} needs quotes",
                    )
                yield row
    except UnicodeError as error:
        raise bad_byte(location, dialect.encoding) from error


@contextmanager
def _text(location: Location, dialect: Dialect) -> Iterator[io.TextIOWrapper]:
    encoding = "utf-8-sig" if dialect.encoding == "utf-8" else dialect.encoding
    with unpacked(location) as (file, _):
        text = io.TextIOWrapper(io.BufferedReader(file, BLOCK_BYTES), encoding, newline="")
        for _ in range(dialect.skipped):
            text.readline()
        yield text


def _lines(text: io.TextIOWrapper, location: Location, dialect: Dialect) -> Iterator[Line]:
    """The lines that are not empty, with their numbers."""
    reader = csv.reader(text, strict=True, **csv_format(dialect.delimiter, dialect.quotes))
    last, before = 0, dialect.skipped
    try:
        for cells in reader:
            last = reader.line_num
            if cells:
                yield last + before, cells
    except csv.Error as error:
        raise _not_csv(location, dialect, last, str(error)) from error


def _rows(
    lines: Iterator[Line],
    header: Sequence[str] | None,
    columns: Sequence[str],
    location: Location,
    dialect: Dialect,
) -> Iterator[Row]:
    start = next(lines, None)
    ahead = [start] if start else []
    if header is None and dialect.header:
        header, ahead = [name.strip() for name in start[1]] if start else [], []
    elif header is None and start:
        header = [f"column_{number}" for number in range(1, len(start[1]) + 1)]
    rest = chain(ahead, lines)
    first = next(rest, None)
    if first is None or header is None:
        raise UserError(
            "the table has no rows", where=str(location), remedy="add a line of column names, and rows below it"
        )
    check_header(header, columns, str(location), note="" if dialect.header else ": its first line is a row")
    names, width, strip = tuple(header), len(header), str.strip
    for line, cells in chain([first], rest):
        if len(cells) == width:
            yield Row(line, dict(zip(names, map(strip, cells), strict=True)))
        else:
            yield Row(line, {}, problem=_ragged(cells, names))


def _ragged(cells: list[str], names: Sequence[str]) -> str:
    if len(cells) < len(names):
        place = f"it ends before column {names[len(cells)]}"
    else:
        place = f"{_shown(cells[len(names)])} is after the last column, {names[-1]}"
    return f"has {len(cells)} cells, expected {len(names)}: {place}"


def _mark(dialect: Dialect) -> str:
    names = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
    return names.get(dialect.delimiter, repr(dialect.delimiter))


def _shown(cell: str) -> str:
    return repr(cell if len(cell) <= MOST_SHOWN else f"{cell[:MOST_SHOWN]}…")


def _not_csv(location: Location, dialect: Dialect, last: int, reason: str) -> UserError:
    """The error of a line that is not CSV. The file is read once more for the place.

    Args:
        location: The file.
        dialect: How it is written.
        last: Number of lines that are CSV.
        reason: The reason of the `csv` module.
    """
    with _text(location, dialect) as text:
        names = next(csv.reader([text.readline()], **csv_format(dialect.delimiter, dialect.quotes)), [])
    with _text(location, dialect) as text:
        found = _quote_problem(islice(text, last, None), dialect)
    if found is None:
        return UserError(
            f"line {last + 1 + dialect.skipped} is not CSV: {reason}", where=str(location), remedy="correct it"
        )
    opened, ended, cell, after = found
    name = f" ({names[cell].strip()})" if cell < len(names) and dialect.header else ""
    place = f"line {opened + last + dialect.skipped}, column {cell + 1}{name}"
    if ended is None:
        return UserError(
            f"{place}: a quote opens and is not closed",
            where=str(location),
            remedy="close it; if quotes are not for cells in this file, set source.options.dialect={quotes: ''}",
        )
    other = f" in line {ended + last + dialect.skipped}" if ended != opened else ""
    return UserError(
        f"{place}: a quote opens, and closes{other} before {_shown(after)}",
        where=str(location),
        remedy='quotes inside a cell are doubled in CSV: "5"" pipe"',
    )


def _quote_problem(lines: Iterator[str], dialect: Dialect) -> tuple[int, int | None, int, str] | None:
    """The first cell whose quotes are wrong.

    Returns:
        The line where its quote opens, from 1; the line where it closes, None if it does not; the index of the
        cell; and the text after the quote that closes it. None if all quotes are right.
    """
    quote, delimiter = dialect.quotes, dialect.delimiter
    opened, cell, inside = 0, 0, False
    for number, line in enumerate(lines, start=1):
        place, fresh = 0, not inside
        cell = cell if inside else 0
        while place < len(line):
            if inside:
                place = line.find(quote, place)
                if place < 0:
                    break
                if line[place + 1 : place + 2] == quote:
                    place += 2
                    continue
                inside, place = False, place + 1
                if line[place : place + 1] not in ("", delimiter, "\r", "\n"):
                    return opened, number, cell, line[place:].rstrip("\r\n")
            elif fresh and line[place] == quote:
                opened, inside, fresh, place = number, True, False, place + 1
            else:
                fresh = line[place] == delimiter
                cell += fresh
                place += 1
    return (opened, None, cell, "") if inside else None
