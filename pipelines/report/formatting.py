"""Numbers as people write them, for pages, figures and tables of the terminal; an undefined value is a dash."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

LARGE = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))
SMALLEST = 1e-4  # smaller numbers have a power of ten
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
FRACTION = re.compile(r"1/(\d+) (.+)")  # a stored unit such as 1/512 m


def figure(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits: 0.6, 712, 44,026, 3.106 million, 1.2·10⁻⁷.

    Numbers below a million have all digits of their integer part.
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    value += 0.0  # no negative zero
    size = abs(value)
    if round(size) >= LARGE[-1][0]:
        rounded = float(f"{size:.{digits}g}")
        unit, word = next(pair for pair in LARGE if rounded >= pair[0])
        return f"{_significant(value / unit, digits)} {word}"
    if size >= 1000:
        return f"{value:,.0f}" if size >= 9999.5 else f"{value:.0f}"
    if 0 < size < SMALLEST:
        exponent = int(f"{size:.{digits - 1}e}".partition("e")[2])
        return f"{_significant(value / 10.0**exponent, digits)}·10{str(exponent).translate(RAISED)}"
    return _significant(value, digits)


def _significant(value: float, digits: int) -> str:
    shown = f"{value:.{digits}g}"
    return f"{float(shown):.0f}" if "e" in shown else shown  # 999.99 has four digits as 1e+03


def cost(value: float | None) -> str:
    """A count of operations or parameters with three significant digits above a million."""
    return figure(value, 3)


def percent(value: float | None) -> str:
    """A gain in per cent, with its sign; positive is better."""
    return "–" if value is None else f"{round(value, 1) + 0.0:+.1f} %"  # no negative zero


def share(value: float | None) -> str:
    """A share in per cent; a share that is neither 0 nor 1 is not shown as 0 or 1."""
    if value is None:
        return "–"
    if 0 < value < 0.001:
        return "< 0.1%"
    return "> 99.9%" if 0.9995 <= value < 1 else f"{value:.1%}"


def number(value: float | None) -> str:
    """A score with four decimals."""
    return "–" if value is None else f"{value:.4f}"


def in_unit(value: float, unit: str) -> tuple[float, str]:
    """A raw value and its unit without a fraction: 1024 of 1/512 m are 2 m."""
    found = FRACTION.fullmatch(unit)
    return (value / int(found[1]), found[2]) if found else (value, unit)


def quantity(value: float, unit: str) -> str:
    """A raw value with its unit."""
    converted, shown = in_unit(value, unit)
    return f"{figure(converted)} {shown}".rstrip()


def scaled(values: Sequence[float]) -> tuple[list[float], str]:
    """Numbers for an axis, and the word for their unit: "million" if the largest is 3 million, "" if it is 700."""
    most = max((abs(value) for value in values), default=0.0)
    unit, word = next((pair for pair in (*LARGE, (1e3, "thousand")) if most >= max(pair[0], 1e4)), (1.0, ""))
    return [value / unit for value in values], word
