"""Measures rows, each in a process of its own, and writes `bench.json` after each row.

A row's memory, caches and threads are therefore its own. A row that fails or is killed has an error
as its result. The other rows still run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from pipelines.cli.__main__ import keep_memory, wait_briefly
from pipelines.execution.resources import cores

# bound, value, and a function that returns numerator and denominator of the ratio, and notes
Row = tuple[str, float, Callable[[], tuple[Any, ...]]]
KEYS = {"name", "ratio", "bound", "value", "repeats", "medians", "command", "machine"}  # of a result without notes
RESULT = Path("bench.json")


@dataclass(frozen=True)
class Bench:
    """The rows of a benchmark.

    Args:
        module: Module that `python -m` runs, and that calls `main`.
        rows: Name → row.
        most_repeats: Name → largest number of repeats, for rows that take minutes.
    """

    module: str
    rows: Mapping[str, Row]
    most_repeats: Mapping[str, int] = field(default_factory=dict)

    def main(self) -> None:
        """Measure the requested rows, by default all. Rows that fail or miss their bound are printed first.

        Raises:
            SystemExit: With code 1 if a row failed. A row that misses its bound did not fail.
        """
        arguments = self._arguments()
        if arguments.row:
            repeats = min(arguments.repeats, self.most_repeats.get(arguments.row, arguments.repeats))
            print(json.dumps(measure(arguments.row, self.rows[arguments.row], repeats)))
            return
        found = []
        for name in arguments.rows:
            print(f"measuring {name} …", flush=True)
            found.append(self._in_process(name, arguments.repeats))
            RESULT.write_text(json.dumps(found, indent=2) + "\n")
        found.sort(key=order)
        RESULT.write_text(json.dumps(found, indent=2) + "\n")
        print(table(found))
        if any("error" in row for row in found):
            sys.exit(1)

    def _arguments(self) -> argparse.Namespace:
        parser = argparse.ArgumentParser(prog=f"python -m {self.module}")
        parser.add_argument("rows", nargs="*", help=f"beginnings of names: {', '.join(self.rows)}")
        parser.add_argument("--repeats", type=int, default=7)
        parser.add_argument("--row", choices=self.rows, help="measure one row in this process, and print its JSON")
        arguments = parser.parse_args()
        wanted = tuple(arguments.rows) or ("",)
        arguments.rows = [name for name in self.rows if name.startswith(wanted)]
        if not arguments.rows:
            parser.error(f"no row begins with {' or '.join(wanted)}")
        return arguments

    def _in_process(self, name: str, repeats: int) -> dict[str, object]:
        """Measure a row in a process of its own. What the process prints is shown if it fails."""
        command = [sys.executable, "-m", self.module, "--row", name, "--repeats", str(repeats)]
        # files and not pipes: processes that a killed row has left behind would keep a pipe open
        variables = dict(os.environ)
        wait_briefly(variables)  # as the command `dmtg`
        keep_memory(variables)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            code = psutil.Popen(command, stdout=out, stderr=errors, env=variables).wait()
            out.seek(0), errors.seek(0)
            if not code:
                row: dict[str, object] = json.loads(out.read().splitlines()[-1])
                return row
            printed = errors.read()
        print(printed, file=sys.stderr)
        reason = printed.strip().rpartition("\n")[2] if code == 1 else f"the process ended with code {code}"
        return {"name": name, "error": reason, "command": _command(name), "machine": machine()}


def measure(name: str, row: Row, repeats: int) -> dict[str, object]:
    """Measure the two costs of a row in turn, A B A B …, after one warm-up of each.

    `ratio` is the median of the ratios of the pairs: a change of the speed of the machine affects both costs.
    `medians` are the medians of the two costs: seconds for a call, a sample or an epoch, or MiB.
    """
    bound, value, make = row
    above, below, *notes = make()
    above(), below()
    pairs = [(above(), below()) for _ in range(repeats)]
    return {
        "name": name,
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "bound": bound,
        "value": value,
        "repeats": repeats,
        "medians": [statistics.median(costs) for costs in zip(*pairs, strict=True)],
        "command": _command(name),
        "machine": machine(),
        **{key: value for note in notes for key, value in note().items()},
    }


def machine() -> str:
    """Describe this machine."""
    threads = os.environ.get("OMP_NUM_THREADS") or cores()
    return f"{platform.machine()}, {threads} threads, torch {version('torch')}"


def _command(name: str) -> str:
    return f"make bench ROWS={name}"


def missed(row: Mapping[str, object]) -> bool:
    """Whether a row misses its bound."""
    ratio, value = float(str(row["ratio"])), float(str(row["value"]))
    return ratio < value if row["bound"] == "at_least" else ratio > value


def order(row: Mapping[str, object]) -> int:
    """Return 0 for a row that failed, 1 for one that misses its bound, and 2 for the others."""
    return 0 if "error" in row else 2 - missed(row)


def table(rows: list[dict[str, object]]) -> str:
    """Return the printed table: for each row its ratio, the medians of its costs and notes, and the machine."""
    lines = [f"{'':6}  {'row':26} {'ratio':>7}  bound           medians"]
    for row in rows:
        mark = ("FAILED", "MISSES", "ok")[order(row)]
        lines.append(f"{mark:6}  {row['name']:26} {_figures(row)}")
    return "\n".join([*lines, str(rows[0]["machine"])])


def _figures(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    costs = ", ".join(f"{cost:.3g}" for cost in row["medians"])
    notes = "".join(f"; {key} {value}" for key, value in row.items() if key not in KEYS)
    return f"{row['ratio']:>7}  {row['bound']:8} {row['value']:<5}  {costs}{notes}"
