"""Rows of the benchmark: `python -m bench [ROWS=]step [--repeats N]`; writes `bench.json`, prints a table.

Each row measures two costs in turn, A B A B …, and computes the median of the ratios of the pairs. A change of the
speed of the machine affects both. `medians` are the two costs: seconds for a call, a sample or an epoch, MiB, or
operators.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import gpu, ingest, metrics, operators, runs, steps

# name → (bound, value, function that returns numerator and denominator of the ratio, and notes)
ROWS: dict[str, tuple[str, float, Callable[[], tuple[Any, ...]]]] = {
    **steps.ROWS, **operators.ROWS, **runs.ROWS, **ingest.ROWS, **metrics.ROWS, **gpu.rows(),
}  # fmt: skip
# for rows that take minutes, and for counts, which are always the same
MOST_REPEATS = {"shard_memory": 3, "ranking": 3, "operators": 1, "operators_unpruned": 1}


def measure(name: str, repeats: int) -> dict[str, object]:
    """One row of `bench.json`."""
    repeats = min(repeats, MOST_REPEATS.get(name, repeats))
    bound, value, make = ROWS[name]
    above, below, *notes = make()
    above(), below()
    pairs = [(above(), below()) for _ in range(repeats)]
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return {
        "name": name,
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "bound": bound,
        "value": value,
        "repeats": repeats,
        "medians": [statistics.median(costs) for costs in zip(*pairs, strict=True)],
        "command": f"make bench ROWS={name}",
        "machine": machine,
        **{key: value for note in notes for key, value in note().items()},
    }


def missed(row: dict[str, object]) -> bool:
    """Whether a row misses its bound."""
    ratio, value = float(str(row["ratio"])), float(str(row["value"]))
    return ratio < value if row["bound"] == "at_least" else ratio > value


def main() -> None:
    """Measure the requested rows, by default all. Rows that miss their bound are printed first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    rows = arguments.rows
    names = [name for name in ROWS if not rows or any(name.startswith(row) for row in rows)]
    found = []
    for name in names:
        print(f"measuring {name} …", flush=True)
        found.append(measure(name, arguments.repeats))
        Path("bench.json").write_text(json.dumps(found, indent=2) + "\n")
    found.sort(key=missed, reverse=True)
    Path("bench.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"{'':6}  {'row':20} {'ratio':>7}  bound")
    for row in found:
        mark = "MISSES" if missed(row) else "ok"
        print(f"{mark:6}  {row['name']:20} {row['ratio']:>7}  {row['bound']} {row['value']}")
    print(found[0]["machine"])


if __name__ == "__main__":
    main()
