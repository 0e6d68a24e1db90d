"""One row of a table, and the check of its column names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dmtg_core.names import listed
from pipelines.errors import UserError

MOST_NAMES = 20  # most names of columns in a message


@dataclass(frozen=True)
class Row:
    """One row of a table: its last line, and its cells by column, without surrounding space.

    `unit` is the unit of `line`: a Parquet file has rows in place of lines. `problem` says why a line is not a row
    of the table; it then has no cells.
    """

    line: int
    cells: dict[str, str]
    unit: str = "line"
    problem: str = ""

    @property
    def place(self) -> str:
        """The position of the row, for a message."""
        return f"{self.unit} {self.line}"


@dataclass(frozen=True)
class ImageRow(Row):
    """A row with the place of its image: the fields of an entry from which a reader gets its bytes."""

    image: Mapping[str, Any] = field(default_factory=dict)


AnyRow = TypeVar("AnyRow", bound=Row)


def check_header(header: Sequence[str], columns: Sequence[str], where: str, note: str = "") -> None:
    """Check that a table has the required columns, and each column once.

    Args:
        header: Names of the columns.
        columns: Required columns.
        where: The table, for a message.
        note: How the table was read, for a message.

    Raises:
        UserError: For a column that is missing, with similar names, and for a name of two columns.
    """
    missing = [name for name in columns if name not in header]
    if missing:
        near = [name for one in missing for name in similar(one, header)]
        hint = f"did you mean {listed(dict.fromkeys(near))}? " if near else ""
        raise UserError(
            f"no column {listed(missing)}{note}",
            where=where,
            remedy=f"{hint}use the columns of the table: {listed(header, MOST_NAMES)}",
        )
    places: dict[str, list[str]] = {}
    for number, name in enumerate(header, start=1):
        places.setdefault(name, []).append(str(number))
    twice = {name: found for name, found in places.items() if len(found) > 1}
    if twice:
        shown = [
            f"{name or repr(name)} occurs more than once: as columns {', '.join(found)}"
            for name, found in twice.items()
        ]
        raise UserError(f"column {'; column '.join(shown)}", where=where, remedy="rename one")


def similar(name: str, names: Sequence[str]) -> list[str]:
    """Names that equal a name but for the case of letters, else those that are spelled similarly."""
    same = [one for one in names if one.casefold() == name.casefold()]
    return same or difflib.get_close_matches(name, names, n=2, cutoff=0.75)
