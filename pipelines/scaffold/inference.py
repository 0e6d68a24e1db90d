"""Inference of the use of table columns from the first rows: id, split, number, category, kind of target."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from dmtg_core.names import display_form, listed, quoted
from dmtg_core.tables.categories import HASHED, barely_repeats
from dmtg_core.tables.cells import MISSING, cell_number, has_leading_zero
from dmtg_core.tables.dates import formats_of
from dmtg_core.tables.scaling import FINEST
from pipelines.config.yaml_text import in_line
from pipelines.data.sources.labels import DASHES
from pipelines.data.sources.rows import MOST_NAMES, Row, split_name
from pipelines.data.sources.tables.flags import FLAGS
from pipelines.errors import UserError
from pipelines.scaffold.quantities import ROWS_A_CLASS, whole_numbers

HEAD_ROWS = 20_000
MOST_VALUES = 100  # most values of a category that is not hashed, and most classes of a target
MOST_NUMBERS = 20  # most values of a target of whole numbers that counts as classes
GAPS = ("na", "n/a", "#n/a", "nan", "null", "none", "?", "-", "--", ".", "unknown", "missing")
_ID = re.compile(
    r"(?i:^(id|.*[_\s-](id|nr|no)\.?|.*nummer|uid|uuid|guid|key|index|row|ид|номер|编号|unnamed: 0|)$)"
    r"|[a-z](Id|ID)$"
)
_CODE = re.compile(
    r"(?i)(^|[^a-z])(zip|zip_?code|post_?(al)?_?code|plz|postleitzahl|code_postal|phone|telefon|iban|isbn)"
)
FEWEST_WORDS = 5  # of the values of a column of texts, on average
LOOKED_AT = 500  # different values of a column that are examined
_CHARACTERS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
_SPLIT = ("split", "set", "subset", "partition", "fold")
_UNITS = (
    "patient|person|subject|participant|proband|respondent|household|customer|client|user|student|animal|speaker"
    "|device|patienten|personen|probanden|kunde|kunden"
)
# "subject", "patient_id", "userId", "Kundennummer"; and neither "users" nor "user_agent"
_UNIT = re.compile(rf"(?i)^({_UNITS})$|(^|[^a-z])({_UNITS})[ _.-]?(id|nr|no|number|nummer|code|key)\.?$")


@dataclass(frozen=True)
class ColumnSummary:
    """A column: its cells in the rows that were read, and the properties of their values."""

    name: str
    cells: Sequence[str]

    @cached_property
    def counts(self) -> Counter[str]:
        """Number of rows of each value, without missing values."""
        return Counter(cell for cell in self.cells if cell and cell not in self.gaps)

    @cached_property
    def gaps(self) -> tuple[str, ...]:
        """Markers of an empty cell: the usual ones, and words such as "unknown" among numbers."""
        every = set(self.cells)
        usual = tuple(mark for mark in MISSING if mark not in DASHES or "+" not in every)
        words = Counter(cell for cell in self.cells if cell and cell not in usual and cell_number(cell) is None)
        filled = sum(bool(cell) for cell in self.cells)
        among_numbers = 2 * words.total() < filled
        return (*usual, *(word for word in words if among_numbers and word.lower() in GAPS))

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
    def dates(self) -> tuple[str, ...]:
        """The formats in which all values are dates; several if days and months could be exchanged."""
        if self.numeric or not self.counts:
            return ()
        formats = Counter(form for value in self.counts for form in formats_of(value))
        return tuple(form for form, count in formats.items() if count == len(self.counts))

    @property
    def digits(self) -> bool:
        """Whether the values are whole numbers that name something, such as postcodes and ids.

        They have leading zeros; or the name of the column says so, and there are many of them.
        """
        if not self.whole:
            return False
        named = _CODE.search(self.name) or _ID.search(self.name)
        return any(map(has_leading_zero, self.counts)) or bool(named and len(self.counts) > MOST_NUMBERS)

    @property
    def is_text(self) -> bool:
        """Whether the values are texts: they have several words, and few occur twice."""
        if self.numeric or self.dates or 2 * len(self.counts) <= self.counts.total():
            return False
        values = list(self.counts)[:LOOKED_AT]
        # Chinese and Japanese are written without spaces: two characters are about a word
        words = sum(len(value.split()) + len(_CHARACTERS.findall(value)) // 2 for value in values)
        return words >= FEWEST_WORDS * len(values)

    @property
    def unique(self) -> bool:
        """Whether every row has a different value."""
        return len(self.counts) == len(self.cells)

    @property
    def missing(self) -> str:
        """The share of rows without a value, as text; empty if every row has one."""
        share = 1 - self.counts.total() / len(self.cells)
        return f"{share:.0%} missing" if share >= 0.005 else "a few missing" if share else ""

    @property
    def too_close_for_float32(self) -> bool:
        """Whether the values differ too little for float32, such as times in seconds since 1970."""
        mean = math.fsum(self.numbers.values()) / len(self.numbers)
        deviation = math.sqrt(math.fsum((n - mean) ** 2 for n in self.numbers.values()) / len(self.numbers))
        return 0 < deviation < 2 * FINEST * abs(mean)


@dataclass(frozen=True)
class Use:
    """The use of a column and the reason for it.

    Args:
        use: "target", "number", "category", "date", "text", "id", "split", "split by" or "left out".
        options: For a target, `kind` and the other options that the reader takes.
    """

    column: str
    use: str
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)


def summaries(rows: Sequence[Row]) -> dict[str, ColumnSummary]:
    """Summaries of the columns of some rows."""
    return {name: ColumnSummary(name, [row.cells[name] for row in rows]) for name in rows[0].cells}


def chosen_targets(given: Sequence[str], columns: Sequence[str], where: str) -> list[str]:
    """The columns that `--targets` names: each value is one column, or several that are separated as in CSV.

    Raises:
        UserError: For fewer than two columns, a column that is named twice, and an unknown column.
    """
    by_form = {display_form(name): name for name in columns}
    named = [name for value in given for name in ([value] if display_form(value) in by_form else _in_csv(value))]
    names = [name if name in columns else by_form.get(display_form(name), name) for name in named]
    unknown = [name for name in names if name not in columns]
    problem = ""
    if not names:
        problem = "no target columns are named"
    elif unknown:
        by_case = {name.casefold(): name for name in columns}
        near = dict.fromkeys(by_case[n] for name in unknown for n in get_close_matches(name.casefold(), by_case))
        problem = f"no column {listed(unknown)}" + (f"; did you mean {listed(near)}?" if near else "")
    elif len(names) != len(set(names)):
        problem = "a target is named twice"
    elif len(names) == 1:
        problem = "grouping needs two or more tasks, got one target"
    if problem:
        raise UserError(
            problem, where=where, wrong_use=True,
            remedy="name them with --targets first,second, with --targets for each, or with quotes as in CSV, "
            f"""--targets '"first, in cm",second'; the columns are {listed(columns, MOST_NAMES)}""",
        )  # fmt: skip
    return names


def _in_csv(value: str) -> list[str]:
    """The names in a value of `--targets`: a name with a comma has quotes, as in CSV."""
    rows = csv.reader(io.StringIO(value, newline=""), skipinitialspace=True)
    return [name.strip() for row in rows for name in row if name.strip()]


def target(column: ColumnSummary, where: str, more: bool) -> Use:
    """The use of a column as a task.

    Args:
        more: Whether the table has more rows than were read.

    Raises:
        UserError: For a column that has only one value, or that is neither a number nor a class.
    """
    if {*column.counts} == {"-1", "0", "1"}:  # -1 is a usual code of a missing value
        known = ColumnSummary(column.name, ["" if cell == "-1" else cell for cell in column.cells])
        why = f"{known.missing}, written as -1; if -1 means no, write positive: ['1'] in place of missing"
        return _task(known, "binary", "values 0 and 1", why, missing=["-1"])
    counts, missing = column.counts, column.missing
    if len(counts) < 2:
        rows = f"in the first {len(column.cells)} rows" if more else "in all rows"
        value = f"is {next(iter(counts))!r}" if counts else "is empty"
        raise UserError(
            f"target {column.name} {value} {rows}: there is nothing to learn",
            where=where,
            remedy="remove it from --targets" + (", or shuffle the rows of the table" if more else ""),
        )
    if len(counts) == 2:
        return _binary(column)
    few_numbers = len(counts) <= MOST_NUMBERS and counts.total() >= ROWS_A_CLASS * len(counts)
    if column.whole and few_numbers:
        numbers: Counter[int] = Counter()
        for value, number in column.numbers.items():
            numbers[int(number)] += counts[value]
        quantity, why = whole_numbers(column.name, numbers)
        if quantity:
            return _task(column, "regression", f"an amount: {why}; for classes write kind: multiclass", missing)
        return _task(column, "multiclass", f"codes: {why}; for an amount write kind: regression", missing)
    if column.numeric:
        low, high = min(column.numbers.values()), max(column.numbers.values())
        return _task(column, "regression", f"numbers from {low:g} to {high:g}", missing)
    if len(counts) <= MOST_VALUES:
        return _task(column, "multiclass", _some(column), missing)
    odd = [value for value in counts if value not in column.numbers]
    raise UserError(
        f"target {column.name} has {len(counts)} different values that are not all numbers, such as {odd[0]!r}",
        where=where,
        remedy="remove it from --targets, or convert it: a target is a number or one of a few classes",
    )


def _binary(column: ColumnSummary) -> Use:
    (often, _), (rare, _) = column.counts.most_common(2)
    flags = set(column.counts) <= set(FLAGS) and len({FLAGS[value] for value in column.counts}) == 2
    positive = next((value for value in column.counts if flags and FLAGS[value]), rare)
    share = f"{column.counts[positive] / column.counts.total():.0%} are {positive}"
    if flags:
        return _task(column, "binary", share, column.missing)
    what = f"{share}, the rarer value; for the other write positive: {in_line([often])}"
    return _task(column, "binary", what, column.missing, positive=[rare])


def _task(column: ColumnSummary, kind: str, what: str, gaps: str, **options: Any) -> Use:
    why = ", ".join(part for part in (what, gaps) if part)
    return Use(column.name, "target", why, {"column": column.name, "kind": kind, "metric": "auto", **options})


def feature(column: ColumnSummary) -> Use:
    """The use of a column in the input, or the reason why it is left out."""
    counts = column.counts
    if len(counts) < 2 and not (counts and column.missing):
        return Use(column.name, "left out", f"always {next(iter(counts))!r}" if counts else "always empty")
    if column.digits:
        return _code_use(column)
    return _number_use(column) if column.numeric else _word_use(column)


def _number_use(column: ColumnSummary) -> Use:
    if column.too_close_for_float32:
        return Use(column.name, "left out", "the values are equal in float32; subtract an offset first")
    return Use(column.name, "number", column.missing)


def _word_use(column: ColumnSummary) -> Use:
    """The use of a column whose values are not all numbers."""
    counts, missing = column.counts, column.missing
    if len(column.dates) == 1:
        return Use(column.name, "date", ", ".join(filter(None, (f"as {column.dates[0]}", missing))))
    ways = f"; the dates can be read as {' and '.join(column.dates)}: write yyyy-mm-dd" if column.dates else ""
    if 2 * sum(counts[value] for value in column.numbers) >= counts.total():
        odd = next(value for value in counts if value not in column.numbers)
        why = f"numbers, but also {odd!r}; if that marks an empty cell, add it to missing"
    elif column.is_text:
        why = f"{len(counts)} different texts of several words: read them with --source text"
    elif len(counts) <= MOST_VALUES or not barely_repeats(counts):
        return Use(column.name, "category", ", ".join(filter(None, (_values(column), missing))) + ways)
    else:
        why = f"{len(counts)} different texts, and most occur once or twice{ways}"
    return Use(column.name, "left out", why)


def _code_use(column: ColumnSummary) -> Use:
    """The use of whole numbers that name something."""
    if len(column.counts) <= MOST_VALUES or not barely_repeats(column.counts):
        return Use(column.name, "category", f"{_values(column)}; they name something, so they are no amounts")
    why = f"{len(column.counts)} whole numbers that name something, such as a postcode or an id"
    return Use(column.name, "left out", f"{why}; as amounts, add the column to features")


def _some(column: ColumnSummary) -> str:
    names = [value for value, _ in column.counts.most_common(3)]
    return f"{len(column.counts)} values: {', '.join(map(quoted, names))}{', …' if len(column.counts) > 3 else ''}"


def _values(column: ColumnSummary) -> str:
    """The values of a category."""
    return _some(column) + f"; hashed to {HASHED} features" * (len(column.counts) > MOST_VALUES)


def split_use(columns: Mapping[str, ColumnSummary]) -> Use | None:
    """The column that assigns rows to training, validation and test; None if there is none.

    A column with such a name but other values is left out.
    """
    for column in columns.values():
        if column.name.lower() not in _SPLIT or column.missing:
            continue
        splits = {split_name(value) for value in column.counts}
        if splits >= {"train", "val"} and None not in splits:
            counts = listed(f"{value}: {count}" for value, count in column.counts.most_common())
            return Use(column.name, "split", counts)
        if splits & {"train", "test"}:
            return Use(column.name, "left out", f"a split needs train and val, it has {listed(column.counts)}")
    return None


def unit_use(columns: Mapping[str, ColumnSummary]) -> Use | None:
    """The column that says to whom a row belongs, if many persons or the like have several rows; else None."""
    for column in columns.values():
        counts = column.counts
        named = _UNIT.search(column.name) and not column.missing and (column.whole or not column.numeric)
        if named and len(counts) > MOST_NUMBERS and 2 * sum(n > 1 for n in counts.values()) >= len(counts):
            why = f"{len(counts)} values in {counts.total()} rows; all rows of a value are in one split"
            return Use(column.name, "split by", why)
    return None


def id_use(columns: Mapping[str, ColumnSummary]) -> Use | None:
    """The column that identifies the rows; None if there is none."""
    named = [
        column
        for column in columns.values()
        if column.unique and (_ID.search(column.name) or column.digits or not column.numeric)
    ]
    named.sort(key=lambda column: not _ID.search(column.name))
    return Use(named[0].name, "id", "different value in every row") if named else None
