"""Rows of the benchmark: `python -m bench [ROWS] [--repeats N]`; writes `bench.json`, prints a table."""

from __future__ import annotations

from bench import gpu, ingest, metrics, plan, runs, start, steps
from bench.runner import Bench, Row

ROWS: dict[str, Row] = {
    **steps.ROWS, **runs.ROWS, **ingest.ROWS, **plan.ROWS, **metrics.ROWS, **start.ROWS, **gpu.rows(),
}  # fmt: skip
# rows that take minutes
MOST_REPEATS = dict.fromkeys(
    ("shard_memory", "ranking", "plan_growth", "plan_growth_time", "sweep_small", "compare_small"), 3
)

if __name__ == "__main__":
    Bench("bench", ROWS, MOST_REPEATS).main()
