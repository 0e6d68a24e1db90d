"""Dates and times of a table as numbers: the same parts in training and in serving."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime

_CLOCK = r"(?:(?:T|\s+)(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2})(?:[.,]\d+)?)?"
_CLOCK += r"\s?(?P<half>[AaPp][Mm])?\s?(?:Z|UTC|[+-]\d{2}:?\d{2})?)?"
_YEAR, _MONTH, _DAY = r"(?P<year>\d{4})", r"(?P<month>\d{1,2})", r"(?P<day>\d{1,2})"
ISO = "yyyy-mm-dd"
FORMATS = {
    ISO: re.compile(f"{_YEAR}-{_MONTH}-{_DAY}{_CLOCK}"),
    "yyyy/mm/dd": re.compile(f"{_YEAR}/{_MONTH}/{_DAY}{_CLOCK}"),
    "dd.mm.yyyy": re.compile(rf"{_DAY}\.{_MONTH}\.{_YEAR}{_CLOCK}"),
    "dd/mm/yyyy": re.compile(f"{_DAY}/{_MONTH}/{_YEAR}{_CLOCK}"),
    "mm/dd/yyyy": re.compile(f"{_MONTH}/{_DAY}/{_YEAR}{_CLOCK}"),
    "dd-mm-yyyy": re.compile(f"{_DAY}-{_MONTH}-{_YEAR}{_CLOCK}"),
    "mm-dd-yyyy": re.compile(f"{_MONTH}-{_DAY}-{_YEAR}{_CLOCK}"),
}
PARTS = ("days", "year", "month", "day", "weekday", "day_of_year")
CLOCK_PART = "hour"


def read_date(cell: str, form: str) -> datetime | None:
    """The moment that a cell names in a format of `FORMATS`, or in ISO 8601; None for any other cell.

    An offset from UTC is ignored: the moment is that of the clock on the wall.
    """
    if not "0" <= cell[:1] <= "9":
        return None
    for name in dict.fromkeys((form, ISO)):
        found = FORMATS[name].fullmatch(cell)
        moment = _moment(found) if found else None
        if moment is not None:
            return moment
    return None


def _moment(found: re.Match[str]) -> datetime | None:
    hour = int(found["hour"] or 0)
    if found["half"]:
        hour = hour % 12 + 12 * (found["half"].lower() == "pm")
    year, month, day, minute, second = (
        int(found[name] or 0) for name in ("year", "month", "day", "minute", "second")
    )
    try:
        return datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError:
        return None


def formats_of(cell: str) -> Iterator[str]:
    """The formats in which a cell is a date."""
    if 8 <= len(cell) <= 40 and "0" <= cell[0] <= "9" and not cell.isdigit():
        for name, pattern in FORMATS.items():
            found = pattern.fullmatch(cell)
            if found and _moment(found) is not None:
                yield name


def has_clock(moment: datetime) -> bool:
    """Whether a moment is not midnight."""
    return bool(moment.hour or moment.minute or moment.second)


def parts_of(moment: datetime, first: datetime, *, clock: bool) -> tuple[float, ...]:
    """The numbers of a moment.

    Args:
        moment: The moment.
        first: The first training date, from which days are counted.
        clock: Whether the hour is one of them.

    Returns:
        `PARTS`: days, year, month, day, weekday (Monday is 0) and day of the year; with a clock also the hour,
        with minutes and seconds as its fraction.
    """
    days = (moment - first).total_seconds() / 86400
    day = moment.timetuple()
    numbers = (
        float(math.floor(days)),
        *map(float, (day.tm_year, day.tm_mon, day.tm_mday, day.tm_wday, day.tm_yday)),
    )
    return (*numbers, moment.hour + moment.minute / 60 + moment.second / 3600) if clock else numbers
