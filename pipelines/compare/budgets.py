"""The methods of a comparison at each of its budgets: the methods at the front, and sentences about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.compare.significance import SIGNIFICANT, holm, mean_of, p_value

Row = Mapping[str, Any]  # a row of `compare.json`


def rows_within(rows: Sequence[Row], budget: float, *, at_most: bool = True) -> list[Row]:
    """The rows of a budget, and those of methods with a training of their own length.

    Args:
        rows: As in `compare.json`.
        budget: The budget.
        at_most: Leave out methods with a training of their own length that cost more.
    """
    own_length = [row["budget"] is None and (row["cost"] <= budget or not at_most) for row in rows]
    return [row for row, taken in zip(rows, own_length, strict=True) if taken or row["budget"] == budget]


def front(gains: Mapping[str, Sequence[float]]) -> list[str]:
    """The method with the highest mean gain, and those whose gain is not significantly lower, in this order.

    The paired differences to the highest gain are tested, and adjusted with Holm's procedure for their number.

    Args:
        gains: Method → gain of each seed. Methods with a gain that is not defined are left out.

    Returns:
        Names of methods; empty with one seed, which gives no test.
    """
    known = {name: values for name, values in gains.items() if all(map(math.isfinite, values))}
    ranked = sorted(known, key=lambda name: -sum(known[name]))
    if not ranked or len(known[ranked[0]]) < 2:
        return []
    best, *others = ranked
    behind = [mean_of([a - b for a, b in zip(known[best], known[name], strict=True)]) for name in others]
    adjusted = holm([p_value(one) for one in behind])
    return [best, *(name for name, p in zip(others, adjusted, strict=True) if p >= SIGNIFICANT)]


def budget_sentence(rows: Sequence[Row], reference: str, at_front: Sequence[str]) -> str:
    """The gain of the search with a budget, and which methods it is better and worse than.

    Args:
        rows: The rows that are compared with the search.
        reference: Name of the row of the search.
        at_front: Result of `front`.
    """
    own = next(row for row in rows if row["method"] == reference)
    gain, spent = own["gain"], f"{own['cost']:.1f} spent"
    half = f" ± {(gain['high'] - gain['low']) / 2:.1f}" if math.isfinite(gain["low"]) else ""
    text = f"With {own['budget']:g} runs of training ({spent}), the search gains {gain['value']:+.1f}{half} %"
    words: dict[str, list[str]] = {"better than": [], "not significantly different from": [], "worse than": []}
    for row in rows:
        p = row["p_adjusted"]
        if p is not None:
            ahead = "better than" if row["behind"]["value"] > 0 else "worse than"
            words[ahead if p < SIGNIFICANT else "not significantly different from"].append(row["base"])
    relations = [f"{word} {', '.join(names)}" for word, names in words.items() if names]
    text = f"{text}. It is {'; '.join(relations)}." if relations else f"{text}."
    return f"{text} At the front: {', '.join(at_front)}." if at_front else text
