"""Names: a sort key for names with numbers, and short lists of names for messages."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def by_number(name: str) -> tuple[list[Any], str]:
    """Return a sort key that compares the numbers in names as numbers.

    Example:
        >>> sorted(["group_10", "group_9", "group_1"], key=by_number)
        ['group_1', 'group_9', 'group_10']
    """
    # digits without leading zeros, compared by length first: this is the order of numbers of any length
    parts = [part.lstrip("0") if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]
    return [(len(part), part) if i % 2 else part for i, part in enumerate(parts)], name


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return names for a message: the first `most` names, and the number of further names.

    Example:
        >>> listed("abcdefg", 3)
        'a, b, c and 4 more'
    """
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more
