"""Cells of a table: their text, their number and their normal form, in training and in serving.

The same cell is a text in a CSV file, a float in a DataFrame and a boolean in JSON. The normal form is the same
text for all of them. The module needs numpy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from dmtg_core.names import by_number

LARGEST = float(np.finfo(np.float32).max)
# a cell with one of these is missing, in a feature of any kind and in a target
MISSING = (
    "nan", "NaN", "NAN", "null", "NULL", "Null", "None", "NA", "N/A", "n/a", "#N/A", "#N/A N/A", "#NA", "<NA>",
    "-nan", "-NaN", "?", "-", "--",
)  # fmt: skip
_WHOLE = re.compile(r"[+-]?\d+(\.0*)?")
_TRUTH = {form: word for word in ("true", "false") for form in (word, word.upper(), word.capitalize())}
_NUMBER_STARTS = frozenset("0123456789+-.")


def cell_text(value: Any) -> str:
    """A cell as in a CSV file: "" for a missing value, and no ".0" after a whole number."""
    if isinstance(value, str):
        return value.strip()
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return ""
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else _float_text(float(value))
    return str(value).strip()


def cell_number(cell: str) -> float | None:
    """The cell as a finite number that float32 can hold; None if it is not one."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if abs(number) <= LARGEST and "_" not in cell else None  # Python reads 1_000 as a number


def normal_form(text: str) -> str:
    """The text of a cell by its value: "1", "1.0" and "+1" are "1", and "TRUE" and "True" are "true".

    Any other text is unchanged.
    """
    if text[:1] not in _NUMBER_STARTS:
        return _TRUTH.get(text, text)
    if _WHOLE.fullmatch(text):
        return str(int(text.partition(".")[0])) if len(text) < 400 else text
    try:
        number = float(text)
    except ValueError:
        return text
    return _float_text(number) if math.isfinite(number) and "_" not in text else text


def _float_text(number: float) -> str:
    return str(int(number)) if number.is_integer() else repr(number)


def has_leading_zero(cell: str) -> bool:
    """Whether the cell is digits alone with a 0 before them, such as a postcode."""
    return cell[:1] == "0" and len(cell) > 1 and cell.isdigit()


def unique_forms(values: Iterable[str]) -> dict[str, str]:
    """Normal form → value, for values that no other value equals as a number."""
    found: dict[str, list[str]] = {}
    for value in values:
        found.setdefault(normal_form(value), []).append(value)
    return {form: same[0] for form, same in found.items() if len(same) == 1}


def in_points(cell: str, decimal: str, thousands: str) -> str:
    """A number with another decimal mark or with thousands separators as Python writes it; other cells unchanged.

    Args:
        cell: The cell.
        decimal: Decimal mark, "." or ",".
        thousands: Separators of thousands, each of them one character; empty for none.
    """
    if decimal not in cell and not any(mark in cell for mark in thousands):
        return cell
    if not number_pattern(decimal, thousands).fullmatch(cell):
        return cell
    for mark in thousands:
        cell = cell.replace(mark, "")
    return cell.replace(decimal, ".")


@lru_cache(maxsize=64)
def number_pattern(decimal: str, thousands: str) -> re.Pattern[str]:
    """Numbers with a decimal mark; with thousands separators, every group of digits has three of them."""
    whole = r"\d+"
    if thousands:
        whole = rf"(?:[1-9]\d{{0,2}}(?:[{re.escape(thousands)}]\d{{3}})+|\d+)"
    mark = re.escape(decimal)
    return re.compile(rf"[+-]?(?:{whole}(?:{mark}\d*)?|{mark}\d+)(?:[eE][+-]?\d+)?")


def marks_of(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Decimal mark and thousands separators that a preparation records; None for a point and no separator."""
    decimal, thousands = str(values.get("decimal", ".")), str(values.get("thousands", ""))
    return None if decimal == "." and not thousands else (decimal, thousands)


def in_order(values: Iterable[str]) -> tuple[str, ...]:
    """Cells of a column in order: numbers by size, then words by the numbers in them."""

    def place(value: str) -> tuple[Any, ...]:
        number = cell_number(value)
        return number is None, number or 0.0, by_number(value)

    return tuple(sorted(values, key=place))
