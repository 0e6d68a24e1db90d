"""A benchmark of rows that take no time, for the tests of the runner: `python -m tests.bench.tiny_rows`."""

import os
import signal
from collections.abc import Callable
from itertools import count

from bench.runner import Bench, Row

Costs = tuple[Callable[[], float], Callable[[], float]]


def raises() -> Costs:
    raise ValueError("no such scene")


def killed() -> Costs:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def process() -> tuple[Callable[[], float], Callable[[], float], Callable[[], dict[str, object]]]:
    return lambda: 1.0, lambda: 1.0, lambda: {"process": os.getpid(), "threads": 1}


def counted() -> Costs:
    """The numerator is 1, 2, 3, …; the first cost of each kind is the warm-up."""
    numbers = count(1)
    return lambda: float(next(numbers)), lambda: 2.0


ROWS: dict[str, Row] = {
    "good": ("at_least", 0.5, process),
    "raises": ("at_most", 1.0, raises),
    "killed": ("at_most", 1.0, killed),
    "good_too": ("at_most", 1.0, process),
    "misses": ("at_most", 1.5, counted),
}

if __name__ == "__main__":
    Bench("tests.bench.tiny_rows", ROWS, {"good_too": 2}).main()
