"""The tasks that write shards, on either executor."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

from pipelines.data.planning import ShardPlan, pickled, unpickled
from pipelines.errors import UserError
from pipelines.execution.executor import Executor
from pipelines.execution.pool import Pool
from pipelines.execution.resources import cores

WINDOW = 32  # plans for each concurrent task whose samples are in memory at the same time
ALONE_S = 2.0  # about the time that a process needs to start
Write = Callable[[ShardPlan], dict[str, Any]]


def write_all(write: Write, plans: Sequence[ShardPlan], executor: Executor) -> Iterator[dict[str, Any]]:
    """Call a function with every plan; yields its results as they come.

    Args:
        write: Writes the shard of a plan. It and the plans can be pickled.
        plans: The plans.
        executor: The executor of the command.

    Raises:
        UserError: The first one that the function raises.
    """
    return _here(write, plans, executor) if executor.embedded else _on_ray(write, plans, executor)


def _here(write: Write, plans: Sequence[ShardPlan], executor: Executor) -> Iterator[dict[str, Any]]:
    """In this process, and if that takes longer than to start others, in a process for each core."""
    started = time.monotonic()
    for count, plan in enumerate(plans):
        if time.monotonic() - started > ALONE_S and len(plans) - count > 1 and cores() > 1:
            yield from _in_pool(write, plans[count:], executor)
            return
        yield write(plan)


def _in_pool(write: Write, plans: Sequence[ShardPlan], executor: Executor) -> Iterator[dict[str, Any]]:
    size = min(cores(), len(plans))
    with closing(Pool(size, executor.section.max_failures, [__name__])) as pool:
        for done in pool.run(write, plans):
            if done.error is not None:
                raise done.error
            yield done.value


def _on_ray(write: Write, plans: Sequence[ShardPlan], executor: Executor) -> Iterator[dict[str, Any]]:
    """As Ray Data tasks, `ray.data_cpus` at a time.

    The samples of `WINDOW` plans for each concurrent task are sent at a time.
    """
    import ray

    def make(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"part": json.dumps(write(unpickled(row["plan"])))}
        except UserError as error:  # Ray Data would keep only the text of the error
            return {"part": json.dumps({"error": error.to_dict()})}

    tasks = min(math.ceil(executor.section.data_cpus), len(plans))
    for start in range(0, len(plans), WINDOW * tasks):
        rows = [{"plan": pickled(plan)} for plan in plans[start : start + WINDOW * tasks]]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        for row in dataset.map(make, concurrency=tasks).iter_rows():
            part = json.loads(row["part"])
            if "error" in part:
                raise UserError(**part["error"])
            yield part
