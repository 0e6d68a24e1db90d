"""The dialect of a table of text: delimiter, decimal mark, quotes, encoding, header; found in its first bytes."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice, pairwise
from typing import Any, Literal

from pydantic import Field

from dmtg_core.tables.cells import MISSING, in_points, number_pattern
from dmtg_core.tables.dates import formats_of
from pipelines.config.validation import Section
from pipelines.data.sources.tables.encodings import encoding_of, unpacked
from pipelines.errors import UserError
from pipelines.storage import Location

HEAD_BYTES = 2**20  # bytes from which the dialect is found
HEAD_LINES = 1000  # lines from which the dialect is found
_DELIMITERS = (",", ";", "\t", "|")
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces"}
_SPACES = " \u00a0\u202f"
# decimal mark and thousands separators, the likely ones first; of equally good ones the first counts
_NUMBERS = ((".", ""), (",", ""), (".", ","), (",", "."), (",", _SPACES), (".", _SPACES), (".", "'\u2019"))


class DialectOptions(Section):
    """How a table of text is written. What is not given is found in the first bytes of the file."""

    delimiter: str | None = Field(None, min_length=1, max_length=1, description="character between two cells")
    decimal: Literal[".", ","] | None = Field(None, description="decimal mark")
    thousands: str | None = Field(None, max_length=4, description="separator of thousands; empty for none")
    encoding: str | None = Field(None, description="encoding that Python knows, such as cp1252 or cp1251")
    quotes: Literal['"', "'", ""] | None = Field(None, description="character around cells; empty for none")
    header: bool | None = Field(
        None, description="false if the first line is a row: the columns are called column_1, column_2, …"
    )


@dataclass(frozen=True)
class Dialect:
    """How a table of text is written.

    Args:
        delimiter: Character between cells.
        decimal: Decimal mark.
        thousands: Characters that separate thousands; empty for none.
        encoding: Name of the encoding in Python.
        quotes: Character around cells; empty for none.
        header: Whether the first line names the columns.
        packing: Name of the compression; empty for none.
        skipped: Lines before the table, such as `sep=;`.
        unsure: A number whose decimal mark can be a separator of thousands, such as 1.234, if all numbers of its
            column are such; else empty.
    """

    delimiter: str = ","
    decimal: str = "."
    thousands: str = ""
    encoding: str = "utf-8"
    quotes: str = '"'
    header: bool = True
    packing: str = ""
    skipped: int = 0
    unsure: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """The values of `DialectOptions` that differ from the usual dialect; a byte order mark is not one."""
        usual, given = Dialect(encoding=self.encoding), DialectOptions.model_fields
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name in given}
        changed = {name: value for name, value in found.items() if value != getattr(usual, name)}
        marked = self.encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32")
        return changed if marked else {**changed, "encoding": self.encoding}

    @property
    def marks(self) -> dict[str, str]:
        """The decimal mark and the separators for a preparation; empty for a point and none."""
        return {"decimal": self.decimal, "thousands": self.thousands} if self.converts else {}

    @property
    def converts(self) -> bool:
        """Whether numbers are written otherwise than in Python."""
        return self.decimal != "." or bool(self.thousands)

    def plain(self, cell: str) -> str:
        """A cell with its number, if it is one, as Python writes it."""
        return in_points(cell, self.decimal, self.thousands) if self.converts else cell

    def __str__(self) -> str:
        parts = [f"separated by {_NAMES.get(self.delimiter, repr(self.delimiter))}"]
        parts += ["decimal commas"] if self.decimal == "," else []
        parts += [f"thousands separated by {self.thousands[0]!r}"] if self.thousands else []
        parts += [self.encoding.upper()] + ([] if self.quotes == '"' else [f"quotes {self.quotes or 'none'}"])
        parts += [] if self.header else ["no line of column names"]
        if self.unsure:
            read, other = in_points(self.unsure, self.decimal, ""), self.unsure.replace(self.decimal, "")
            option = f"source.options.dialect.thousands='{self.decimal}'"
            parts += [f"{self.unsure} is read as {read} (if it is {other}: {option})"]
        return ", ".join(parts + ([self.packing] if self.packing else []))


def dialect_of(
    location: Location,
    given: DialectOptions | None = None,
    *,
    columns: Sequence[str] = (),
    named: bool = True,
    usual: tuple[str, str] | None = None,
) -> Dialect:
    """The dialect of a file. `config new` and the readers find it with this function.

    Args:
        location: The file.
        given: What is known.
        columns: Required columns: a first line that has them all is a header.
        named: Whether the file names its columns or may do so; False for names from the options.
        usual: Decimal mark and thousands separators that are chosen if others fit as well.

    Raises:
        UserError: When the file cannot be read or decoded.
    """
    given = given or DialectOptions()
    with unpacked(location) as (file, packing):
        head = file.read(HEAD_BYTES)
    cut = len(head) == HEAD_BYTES
    found = _detected(head, given, location, columns=columns, named=named, cut=cut, usual=usual)
    return replace(found, packing=packing)


def _detected(
    head: bytes,
    given: DialectOptions,
    location: Location,
    *,
    columns: Sequence[str],
    named: bool,
    cut: bool,
    usual: tuple[str, str] | None,
) -> Dialect:
    encoding = _known(given.encoding) if given.encoding else encoding_of(head, str(location), cut=cut)
    text = codecs.getincrementaldecoder(encoding)(errors="replace").decode(head)
    skipped, delimiter = _declared(text)
    delimiter = given.delimiter or delimiter
    text = text.split("\n", skipped)[-1] if skipped else text
    quotes = '"' if given.quotes is None else given.quotes
    if delimiter is None:
        tabs = location.name.lower().split(".", 1)[-1].startswith("tsv")
        delimiter = _delimiter(text, quotes, cut, "\t" if tabs else ",")
    lines = parsed_head(text, delimiter, quotes, cut=cut)
    dialect = Dialect(delimiter, encoding=encoding, quotes=quotes, skipped=skipped)
    decimal, thousands = _marks(lines[1:] or lines, given, delimiter, usual)
    dialect = replace(dialect, decimal=decimal, thousands=thousands)
    if given.thousands is None and given.decimal is None and not thousands:
        dialect = replace(dialect, unsure=_unsure(lines[1:] or lines, decimal))
    header = named and bool(lines) and _has_header(lines, dialect, columns)
    return replace(dialect, header=header if given.header is None else given.header)


def _known(encoding: str) -> str:
    try:
        return codecs.lookup(encoding).name
    except LookupError as error:
        raise UserError(
            f"no encoding {encoding}",
            where="source.options.dialect.encoding",
            remedy="use a name that Python knows, such as utf-8, cp1252, cp1251, gb18030",
            wrong_use=True,
        ) from error


def _declared(text: str) -> tuple[int, str | None]:
    """The number of lines before the table, and the delimiter that Excel's `sep=;` declares."""
    first = text[:20].partition("\n")[0].strip('\r"\ufeff')
    return (1, first[4]) if len(first) == 5 and first.lower().startswith("sep=") else (0, None)


def parsed_head(text: str, delimiter: str, quotes: str, *, cut: bool) -> list[list[str]]:
    """The cells of the first lines, without the last one of a text that is cut off."""
    reader = csv.reader(io.StringIO(text, newline=""), **csv_format(delimiter, quotes))
    lines = list(islice((cells for cells in reader if cells), HEAD_LINES))
    return lines[:-1] if cut and 1 < len(lines) < HEAD_LINES else lines


def csv_format(delimiter: str, quotes: str) -> dict[str, Any]:
    """The arguments of `csv.reader`."""
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    return {"delimiter": delimiter, "quoting": quoting, "quotechar": quotes or '"'}


def _delimiter(text: str, quotes: str, cut: bool, usual: str) -> str:
    """The delimiter for which most lines have as many cells as the first, more than one."""

    def quality(mark: str) -> tuple[float, float, bool, int]:
        lines = parsed_head(text, mark, quotes, cut=cut)
        width = len(lines[0]) if lines else 0
        if width < 2:
            return (0.0, 0.0, mark == usual, 0)
        same = [cells for cells in lines if len(cells) == width]
        # of two that fit, one cuts cells in pieces that hold the other
        others = [other for other in _DELIMITERS[1:] if other != mark]
        mixed = sum(any(other in cell for other in others for cell in cells) for cells in same)
        return (round(len(same) / len(lines), 1), 1 - round(mixed / len(lines), 1), mark == usual, width)

    return max((usual, *(mark for mark in _DELIMITERS if mark != usual)), key=quality)


def _columns(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """The filled cells of each column, of the lines with the usual number of cells."""
    width = Counter(map(len, lines)).most_common(1)[0][0] if lines else 0
    rows = [[cell.strip() for cell in cells] for cells in lines if len(cells) == width]
    return [[cell for cell in column if cell and cell not in MISSING] for column in zip(*rows, strict=True)]


def _marks(
    lines: Sequence[Sequence[str]], given: DialectOptions, delimiter: str, usual: tuple[str, str] | None
) -> tuple[str, str]:
    """The decimal mark and the thousands separators with which most columns are numbers."""
    known = given.thousands
    choices = [
        (decimal, thousands if known is None else known)
        for decimal, thousands in _NUMBERS
        if given.decimal in (None, decimal) and (known is not None or thousands != given.decimal)
    ]
    if delimiter == ",":  # a cell that is quoted for its comma is rather 1,234 than 1,5
        choices.sort(key=lambda marks: marks[0] == ",")
    choices.sort(key=lambda marks: marks != usual)
    columns = [column for column in _columns(lines) if column]
    counts = {marks: sum(_all_numbers(column, *marks) for column in columns) for marks in choices}
    best = max(choices, key=lambda marks: counts[marks])
    return best if counts[best] or given.decimal or known else (".", "")


def _unsure(lines: Sequence[Sequence[str]], decimal: str) -> str:
    """A number of the first column in which three digits follow each decimal mark, as after one of thousands."""
    group = re.compile(rf"[+-]?[1-9]\d{{0,2}}{re.escape(decimal)}\d{{3}}")
    columns = [column for column in _columns(lines) if len(column) > 1]
    return next((column[0] for column in columns if all(map(group.fullmatch, column))), "")


def _all_numbers(column: Sequence[str], decimal: str, thousands: str) -> bool:
    pattern = number_pattern(decimal, thousands)
    return all(pattern.fullmatch(cell) for cell in column)


def _has_header(lines: Sequence[Sequence[str]], dialect: Dialect, columns: Sequence[str]) -> bool:
    """Whether the first line names the columns.

    It does not if all columns of numbers and dates begin with one in the first line, unless these are whole
    numbers in ascending order, such as years.
    """
    first = [cell.strip() for cell in lines[0]]
    if len(lines) < 3 or (columns and set(columns) <= set(first)):
        return True
    found = _columns(lines[1:])
    if len(found) != len(first):
        return True
    pairs = [(cell, column) for cell, column in zip(first, found, strict=True) if cell and column]
    heads = [cell for cell, column in pairs if all(_measured(one, dialect) for one in column)]
    if not heads or not all(_measured(cell, dialect) for cell in heads):
        return True
    numbers = [float(dialect.plain(cell)) for cell in heads if _number(cell, dialect)]
    whole = len(numbers) == len(heads) and all(one.is_integer() and one >= 0 for one in numbers)
    return whole and all(one < other for one, other in pairwise(numbers))


def _number(cell: str, dialect: Dialect) -> bool:
    pattern = number_pattern(dialect.decimal, dialect.thousands)
    return bool(pattern.fullmatch(cell) or number_pattern(".", "").fullmatch(cell))


def _measured(cell: str, dialect: Dialect) -> bool:
    return _number(cell, dialect) or any(True for _ in formats_of(cell))
