"""What the columns of a table seem to be, by its first rows: id, split, number, category, kind of target."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dmtg_core.names import listed
from pipelines.data.preprocessing import cell_number
from pipelines.data.sources.labels import FLAGS
from pipelines.data.sources.rows import MOST_NAMES, Row, split_name
from pipelines.data.sources.table import FINEST, MISSING
from pipelines.errors import UserError

HEAD_ROWS = 20_000
MOST_VALUES = 100  # of a category, and of a target that is a class
MOST_NUMBERS = 20  # that a target of whole numbers can have to be taken for classes
ROWS_A_CLASS = 10  # that such a class has on average, at least
GAPS = ("na", "n/a", "#n/a", "nan", "null", "none", "?", "-", "--", ".", "unknown", "missing")
_ID = re.compile(r"(?i:^(id|.*[_\s-]id|uid|uuid|guid|key|index|row|unnamed: 0|)$)|[a-z](Id|ID)$")
_SPLIT = ("split", "set", "subset", "partition", "fold")


@dataclass(frozen=True)
class Look:
    """A column: its cells in the rows that were read, and the words that stand for an empty cell in it."""

    name: str
    cells: Sequence[str]

    @cached_property
    def counts(self) -> Counter[str]:
        """How often each value is there, without what is missing."""
        return Counter(cell for cell in self.cells if cell and cell not in self.gaps)

    @cached_property
    def gaps(self) -> tuple[str, ...]:
        """Words for an empty cell: the usual ones, and others that stand among numbers."""
        words = Counter(cell for cell in self.cells if cell and cell not in MISSING and cell_number(cell) is None)
        filled = sum(bool(cell) for cell in self.cells)
        among_numbers = 2 * words.total() < filled
        return (*MISSING, *(word for word in words if among_numbers and word.lower() in GAPS))

    @cached_property
    def numbers(self) -> dict[str, float]:
        """The values that are numbers."""
        return {value: number for value in self.counts if (number := cell_number(value)) is not None}

    @property
    def numeric(self) -> bool:
        """Whether all values are numbers."""
        return bool(self.counts) and len(self.numbers) == len(self.counts)

    @property
    def whole(self) -> bool:
        """Whether all values are whole numbers."""
        return self.numeric and all(number.is_integer() for number in self.numbers.values())

    @property
    def unique(self) -> bool:
        """Whether every row has a value of its own."""
        return len(self.counts) == len(self.cells)

    @property
    def missing(self) -> str:
        """The share of rows without a value, in words; empty where all have one."""
        share = 1 - self.counts.total() / len(self.cells)
        return f"{share:.0%} missing" if share >= 0.005 else "a few missing" if share else ""

    @property
    def blurred(self) -> bool:
        """Whether float32 could not hold the differences, as with times in seconds since 1970."""
        mean = math.fsum(self.numbers.values()) / len(self.numbers)
        deviation = math.sqrt(math.fsum((n - mean) ** 2 for n in self.numbers.values()) / len(self.numbers))
        return 0 < deviation < 2 * FINEST * abs(mean)


@dataclass(frozen=True)
class Use:
    """What a column is used as ("target", "number", "category", "text", "id", "split" or "left out"), and why.

    Args:
        options: Of a target: `kind` and what else the reader takes.
    """

    column: str
    use: str
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)


def looks(rows: Sequence[Row]) -> dict[str, Look]:
    """The columns of some rows."""
    return {name: Look(name, [row.cells[name] for row in rows]) for name in rows[0].cells}


def chosen_targets(given: Sequence[str], columns: Sequence[str], where: str) -> list[str]:
    """The columns that `--targets` names: each word is one, or several with commas between them.

    Raises:
        UserError: For none at all, less than two, one twice, and a column that is not there.
    """
    names = [name.strip() for word in given for name in ([word] if word in columns else word.split(","))]
    unknown = [name for name in names if name not in columns]
    problem = ""
    if not names:
        problem = "which columns are to be predicted?"
    elif unknown:
        problem = f"no column {listed(unknown)}"
    elif len(names) != len(set(names)):
        problem = "a target is named twice"
    elif len(names) == 1:
        problem = "tasks can be grouped when there are two or more, got one target"
    if problem:
        raise UserError(
            problem, where=where, wrong_use=True,
            remedy=f"name them with --targets first,second; the columns are {listed(columns, MOST_NAMES)}",
        )  # fmt: skip
    return names


def target(look: Look, where: str, more: bool) -> Use:
    """A column as a task.

    Args:
        more: Whether the table has more rows than were looked at.

    Raises:
        UserError: For a column that has one value only, or that is neither number nor class.
    """
    counts, missing = look.counts, look.missing
    if len(counts) < 2:
        rows = f"in the first {len(look.cells)} rows" if more else "in all rows"
        value = f"is {next(iter(counts))!r}" if counts else "is empty"
        raise UserError(
            f"target {look.name} {value} {rows}: there is nothing to learn",
            where=where,
            remedy="leave it out of --targets" + (", or shuffle the rows of the table" if more else ""),
        )
    if len(counts) == 2:
        return _binary(look)
    few_numbers = len(counts) <= MOST_NUMBERS and counts.total() >= ROWS_A_CLASS * len(counts)
    if look.numeric and not (look.whole and few_numbers):
        low, high = min(look.numbers.values()), max(look.numbers.values())
        return _task(look, "regression", f"numbers from {low:g} to {high:g}", missing)
    if len(counts) <= MOST_VALUES:
        what = f"{len(counts)} whole numbers; for an amount write regression" if look.whole else _some(look)
        return _task(look, "multiclass", what, missing, metric="balanced_accuracy")
    odd = [value for value in counts if value not in look.numbers]
    raise UserError(
        f"target {look.name} has {len(counts)} different values that are not all numbers, such as {odd[0]!r}",
        where=where,
        remedy="a target is a number, or one of a few classes: leave it out of --targets, or make it one",
    )


def _binary(look: Look) -> Use:
    (often, _), (rare, _) = look.counts.most_common(2)
    flags = set(look.counts) <= set(FLAGS) and len({FLAGS[value] for value in look.counts}) == 2
    positive = next((value for value in look.counts if flags and FLAGS[value]), rare)
    share = f"{look.counts[positive] / look.counts.total():.0%} are {positive}"
    if flags:
        return _task(look, "binary", share, look.missing, metric="auroc")
    return _task(look, "binary", f"{share}, the rest {often}", look.missing, metric="auroc", positive=[rare])


def _task(look: Look, kind: str, what: str, missing: str, **options: Any) -> Use:
    why = ", ".join(part for part in (what, missing) if part)
    return Use(look.name, "target", why, {"column": look.name, "kind": kind, **options})


def feature(look: Look) -> Use:
    """A column as a part of the input, or left out of it."""
    counts = look.counts
    if len(counts) < 2 and not (counts and look.missing):
        return Use(look.name, "left out", f"always {next(iter(counts))!r}" if counts else "always empty")
    if look.numeric and look.blurred:
        return Use(look.name, "left out", "as float32 the values would be the same; subtract an offset first")
    if look.numeric:
        return Use(look.name, "number", look.missing)
    if 2 * sum(counts[value] for value in look.numbers) >= counts.total():
        odd = next(value for value in counts if value not in look.numbers)
        return Use(
            look.name, "left out", f"numbers, but also {odd!r}; if that is an empty cell, add it to missing"
        )
    if len(counts) <= MOST_VALUES:
        return Use(look.name, "category", ", ".join(part for part in (_some(look), look.missing) if part))
    return Use(look.name, "left out", f"{len(counts)} different texts: neither number nor category")


def _some(look: Look) -> str:
    names = [value for value, _ in look.counts.most_common(3)]
    return f"{len(look.counts)} values: {', '.join(names)}{', …' if len(look.counts) > 3 else ''}"


def split_use(columns: Mapping[str, Look]) -> Use | None:
    """The column that says which rows are for training, validation and test; None where there is none.

    A column of that name that cannot be used as such is left out.
    """
    for look in columns.values():
        if look.name.lower() not in _SPLIT or look.missing:
            continue
        splits = {split_name(value) for value in look.counts}
        if splits >= {"train", "val"} and None not in splits:
            counts = listed(f"{value}: {count}" for value, count in look.counts.most_common())
            return Use(look.name, "split", counts)
        if splits & {"train", "test"}:
            return Use(look.name, "left out", f"a split needs train and val, it has {listed(look.counts)}")
    return None


def id_use(columns: Mapping[str, Look]) -> Use | None:
    """The column that names the rows; None where there is none."""
    named = [look for look in columns.values() if look.unique and (_ID.search(look.name) or not look.numeric)]
    named.sort(key=lambda look: not _ID.search(look.name))
    return Use(named[0].name, "id", "a value of its own in every row") if named else None
