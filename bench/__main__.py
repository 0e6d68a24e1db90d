"""Rows of the benchmark: `python -m bench [ROWS] [--repeats N]`; writes `bench.json`, prints a table."""

from __future__ import annotations

from bench import (
    adapters,
    gpu,
    ingest,
    metrics,
    operators,
    plan,
    registry,
    runs,
    serving,
    start,
    steps,
    table_encoder,
)
from bench.runner import Bench, Row

ROWS: dict[str, Row] = {
    **steps.ROWS, **operators.ROWS, **runs.ROWS, **ingest.ROWS, **plan.ROWS, **metrics.ROWS, **start.ROWS,
    **table_encoder.ROWS, **adapters.ROWS, **registry.ROWS, **serving.ROWS, **gpu.rows(),
}  # fmt: skip
# rows that take minutes, and counts, which are always the same
MOST_REPEATS = {
    "shard_memory": 3, "ranking": 3, "plan_growth": 3, "plan_growth_time": 3, "sweep_small": 3, "compare_small": 3,
    "table_encoder": 3, "adapters_memory": 3, "operators": 1, "operators_unpruned": 1,
    "registry_adapters": 1, "serve_over_mlflow": 1,
}  # fmt: skip

if __name__ == "__main__":
    Bench("bench", ROWS, MOST_REPEATS).main()
