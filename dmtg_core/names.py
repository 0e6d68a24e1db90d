"""Names: their keys in narrower stores, a sort key for names with numbers, and short lists for messages."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

LONGEST_KEY = 200  # bytes; a store adds the stage and the metric, and a file name has at most 255 bytes
LONGEST_PREFIX = 100  # bytes of a name that a derived key shows
_WORDS = re.compile(r"[\w.-]+( [\w.-]+)*")
_DERIVED = re.compile(r".* [0-9a-f]{10}")


def by_number(name: str) -> tuple[list[Any], str]:
    """Return a sort key that compares the numbers in names as numbers.

    Example:
        >>> sorted(["group_10", "group_9", "group_1"], key=by_number)
        ['group_1', 'group_9', 'group_10']
    """
    # digits without leading zeros, compared by length first: this is the order of numbers of any length
    parts = [part.lstrip("0") if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]
    return [(len(part), part) if i % 2 else part for i, part in enumerate(parts)], name


def quoted(name: str) -> str:
    """Return a name as it is written between commas: in quotes, as in CSV, if it has a comma.

    Example:
        >>> quoted("height"), quoted("height, in cm")
        ('height', '"height, in cm"')
    """
    return '"' + name.replace('"', '""') + '"' if "," in name or name.startswith('"') else name


def unquoted(text: str) -> list[str]:
    """Return the names that `", ".join(map(quoted, names))` has written.

    Example:
        >>> unquoted('weight, "height, in cm"')
        ['weight', 'height, in cm']
    """
    return [
        whole[1:-1].replace('""', '"') if whole else plain
        for whole, plain in re.findall(r'("(?:[^"]|"")*")(?:, |$)|(.+?)(?:, |$)', text, re.DOTALL)
    ]


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return names for a message: the first `most` names, and the number of further names.

    Example:
        >>> listed("abcdefg", 3)
        'a, b, c and 4 more'
    """
    every = [quoted(name) for name in names]
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def key_of(name: str) -> str:
    """Return the key of a name in a store that takes fewer characters than a name has, such as MLflow.

    Letters and digits of any script, `_`, `.`, `-` and single spaces are kept: a name of these that has at most
    `LONGEST_KEY` bytes in UTF-8 is its own key. The key of any other name is its beginning and ten hex digits of
    its SHA-256. Distinct names have distinct keys.

    Example:
        >>> key_of("价格 2024"), key_of("a/b")
        ('价格 2024', 'a_b c14cddc033')
    """
    encoded = name.encode("utf-8", "surrogatepass")
    own = _WORDS.fullmatch(name) and not _DERIVED.fullmatch(name) and name not in (".", "..")
    if own and len(encoded) <= LONGEST_KEY:
        return name
    words = re.sub(r"[^\w. -]+", "_", name).encode()[:LONGEST_PREFIX].decode(errors="ignore")
    return f"{words.strip('. ') or '_'} {hashlib.sha256(encoded).hexdigest()[:10]}"


def display_form(name: str) -> str:
    """Return a name in composed Unicode (NFC) with single spaces: names with one display form look the same."""
    return " ".join(unicodedata.normalize("NFC", name).split())
