"""Figures as text."""

from __future__ import annotations


def cost(value: float | None) -> str:
    """A count with three digits and a unit."""
    if value is None:
        return "–"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def percent(value: float | None) -> str:
    """A gain with its sign."""
    return "–" if value is None else f"{value:+.1f} %"


def number(value: float | None) -> str:
    """A score with four digits."""
    return "–" if value is None else f"{value:.4f}"
