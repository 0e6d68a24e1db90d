"""Ranges of numbers, written as text: `loguniform(1e-4, 1e-2)`. The text is parsed, never evaluated."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pipelines.config.validation import LARGEST_FLOAT, clip

# name → arguments, whether the values are whole numbers, and whether their logarithm is uniform
FORMS = {
    "uniform": ("low, high", False, False),
    "quniform": ("low, high, step", False, False),
    "loguniform": ("low, high", False, True),
    "randint": ("low, high", True, False),
    "qrandint": ("low, high, step", True, False),
    "lograndint": ("low, high", True, True),
}
WRITTEN = ", ".join(f"{name}({arguments})" for name, (arguments, *_) in FORMS.items())
CALL = re.compile(r"\s*(\w+)\s*\(([^()]*)\)\s*")
EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


@dataclass(frozen=True)
class Range:
    """A range of numbers with a distribution.

    Args:
        low, high: Its ends, which belong to it.
        step: Distance of its values; None for all numbers between the ends.
        whole: Whether its values are whole numbers.
        log: Whether the logarithm of a value is uniform, not the value itself.
    """

    low: float
    high: float
    step: float | None = None
    whole: bool = False
    log: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return (self.low, self.high) if self.step is None else (self.low, self.at(self.count - 1))

    @property
    def count(self) -> int:
        """Number of values of a range with steps."""
        assert self.step is not None
        return int((self.high - self.low) / self.step + 1e-9) + 1

    def at(self, index: int) -> float:
        """A value of a range with steps."""
        assert self.step is not None
        value = self.low + index * self.step
        return value if self.whole else float(f"{value:.12g}")  # 3 · 0.1 is 0.3


def parse_range(text: str) -> Range:
    """The range that a text describes.

    Raises:
        ValueError: For any other text.
    """
    call = CALL.fullmatch(text)
    if call is None or call[1] not in FORMS:
        raise ValueError(f"expected a list of values or one of {WRITTEN}, got {clip(text)!r}")
    names, whole, log = FORMS[call[1]]
    written = call[2].split(",")
    if len(written) != len(names.split(",")):
        raise ValueError(f"expected {call[1]}({names}), got {clip(text)!r}")
    values = [_number(one, whole) for one in written]
    low, high, step = values[0], values[1], values[2] if len(values) > 2 else 1 if whole and not log else None
    if low >= high:
        raise ValueError(f"expected low < high, got {clip(text)!r}")
    if log and low <= 0:
        raise ValueError(f"expected low > 0, got {clip(text)!r}")
    if step is not None and not 0 < step <= high - low:
        raise ValueError(f"expected a step above 0 and at most high - low, got {clip(text)!r}")
    return Range(low, high, step, whole, log)


def _number(text: str, whole: bool) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"expected {kind}, got {clip(text.strip())!r}") from None
    if not abs(value) <= LARGEST_FLOAT or not math.isfinite(value):
        raise ValueError(f"expected a finite number of at most {LARGEST_FLOAT:g}, got {clip(text.strip())!r}")
    return value


def number_or_value(value: object) -> object:
    """A value of a list; YAML reads 1e-4, which has no point, as text."""
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value
