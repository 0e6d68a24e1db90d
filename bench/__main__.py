"""Rows of the benchmark: `python -m bench [ROWS] [--repeats N]`; writes `bench.json`, prints a table."""

from __future__ import annotations

from bench import gpu, ingest, metrics, runs, start, steps
from bench.runner import Bench, Row

ROWS: dict[str, Row] = {
    **steps.ROWS, **runs.ROWS, **ingest.ROWS, **metrics.ROWS, **start.ROWS, **gpu.rows(),
}  # fmt: skip
MOST_REPEATS = {"shard_memory": 3, "ranking": 3, "sweep_small": 3, "compare_small": 3}  # they take minutes

if __name__ == "__main__":
    Bench("bench", ROWS, MOST_REPEATS).main()
