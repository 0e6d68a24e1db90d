"""Numbers as text, for pages and tables; a value that is not defined is a dash."""

from __future__ import annotations


def cost(value: float | None) -> str:
    """A count with three significant digits and an SI prefix."""
    if value is None:
        return "–"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def percent(value: float | None) -> str:
    """A gain in per cent, with its sign."""
    return "–" if value is None else f"{value:+.1f} %"


def number(value: float | None) -> str:
    """A score with four decimals."""
    return "–" if value is None else f"{value:.4f}"


def significant(value: float | None) -> str:
    """A metric with four significant digits."""
    return "–" if value is None else f"{value:.4g}"
