"""Extra trees on the table of a run, a yardstick beside its result. The search does not read it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dmtg_core.evaluation.trees import EXTRA_TREES, QUICK_COUNT, quick_rows, train_trees, trees_apply
from dmtg_core.tasks import Task
from dmtg_core.training.metrics import Metrics, error_of, error_scale
from pipelines.data.ingest import open_data
from pipelines.execution.executor import Executor
from pipelines.runs.files import SEARCHED, TREES
from pipelines.training.failures import describe
from pipelines.training.worker import Job

MISSING = "scikit-learn is not installed: pip install 'dmtg[tables]'"
SKIPPED, FAILED = "skipped", "failed"  # keys of the reason why there are no figures


def tree_figures(job: Job, executor: Executor, log: Callable[[str], None]) -> dict[str, Any]:
    """Train extra trees on the samples of a run and evaluate them, once for a run folder.

    The trees are trained in one process, a task of the executor: `QUICK_COUNT` trees for each task on at most
    `quick_rows` samples. All samples of the split of the result are evaluated. A failure does not end the run.

    Args:
        job: The job of the run, with its tables.
        executor: The executor of its workers.
        log: Called with each line.

    Returns:
        `method`, `count` (trees of a task), `rows` (training samples) and `of` (those of the split), `split`,
        `metrics` (task → metric → value), `errors` (task → error, see `runs.tree_figures.compare_trees`),
        `scales` (task → divisor of the error) and `error` (mean of the errors); or the reason why there are no
        figures: `skipped` if none are wanted, else `failed`.
    """
    stored, reason = job.run / TREES, _not_wanted(job)
    if reason:
        return {SKIPPED: reason}
    if stored.exists():
        held: dict[str, Any] = stored.read_json()
        return held
    log("training extra trees on the same table, for comparison (train.trees=false leaves them out)")
    (done,) = executor.run(partial(_train, job), [None])
    found: dict[str, Any] = {FAILED: describe(done.error)} if done.error else done.value
    if FAILED in found:
        log(f"note: no extra trees for comparison: {found[FAILED]}")
    else:
        stored.write_json(found)
    return found


def _not_wanted(job: Job) -> str:
    """Why no trees are to be trained; empty if they are."""
    if not job.config.train.trees:
        return "train.trees=false"
    kind = job.reader.manifest.description.input.kind
    if not trees_apply(kind, job.reader.tasks):
        return f"extra trees read tables, got {kind} input"
    return "the search is finished" if (job.run / SEARCHED).exists() else ""


def _train(job: Job, _item: None) -> dict[str, Any]:
    """The figures, or the reason why scikit-learn is not there."""
    job.allow_code()
    manifest, tasks, config = job.reader.manifest, job.reader.tasks, job.config
    split = "test" if manifest.rows("test") else "val"
    held = None if job.outputs else job.held  # trees read the inputs
    data = open_data(
        job.reader, held, config.data, seed=config.train.seed, rank=0, world_size=1, device=torch.device("cpu")
    )
    rows = quick_rows(manifest.rows("train"), math.prod(manifest.description.input.shape))
    try:
        done = train_trees(
            EXTRA_TREES, tasks, data, splits=[split], seed=config.train.seed, threads=torch.get_num_threads(),
            count=QUICK_COUNT, rows=rows,
        )  # fmt: skip
    except ImportError:
        return {FAILED: MISSING}
    size = {"count": QUICK_COUNT, "rows": rows, "of": manifest.rows("train"), "split": split}
    return {"method": EXTRA_TREES, **size, **_errors(tasks, done.metrics[split])}


def _errors(tasks: tuple[Task, ...], metrics: Metrics) -> dict[str, Any]:
    scales = {task.name: error_scale(task) for task in tasks}
    errors = {
        task.name: error_of(task.metric, metrics[task.name][task.metric]) / scales[task.name] for task in tasks
    }
    known = [error for error in errors.values() if math.isfinite(error)]
    mean = math.fsum(known) / len(known) if known else None
    return {"metrics": metrics, "errors": errors, "scales": scales, "error": mean}
