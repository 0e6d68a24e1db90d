"""The default encoder of tables beside extra trees: training time and memory on 10,000 rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

from bench.processes import own_peak_mib
from dmtg_core import (
    ArrayData,
    Arrays,
    EncoderSpec,
    GroupingNetwork,
    InputSpec,
    NetworkSpec,
    Task,
    TrainSettings,
    fit,
)
from dmtg_core.network.encoders.tabular import tabm_options
from dmtg_core.training.settings import table_schedule
from pipelines.execution.resources import cores

ROWS_OF_TABLE, VAL, FEATURES, TARGETS, TREES = 10_000, 2_000, 50, 10, 300


def _table() -> tuple[np.ndarray, np.ndarray]:
    """Normal features `(n, F)`, and flags `(n, N)` that depend on three of them each."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS_OF_TABLE + VAL, FEATURES)).astype(np.float32)
    first, second, third = x[:, :10], x[:, 10:20], x[:, 20:30]
    return x, np.sin(2 * first) + second * third + rng.normal(size=(len(x), TARGETS)) > 0


def _encoder() -> float:
    """Seconds of a training of naive MTL with the defaults of `dmtg config new`."""
    x, y = _table()
    tasks = [Task(f"task_{n}", "binary") for n in range(TARGETS)]
    labels = {task.name: y[:, n].astype(np.uint8) for n, task in enumerate(tasks)}
    parts = {"train": slice(ROWS_OF_TABLE), "val": slice(ROWS_OF_TABLE, None)}
    splits = {
        name: Arrays(x[part], {key: v[part] for key, v in labels.items()}, {}) for name, part in parts.items()
    }
    edges = np.quantile(x[:ROWS_OF_TABLE], np.linspace(0, 1, 256), axis=0).T
    given = InputSpec("features", (FEATURES,), quantiles=tuple(map(tuple, edges.tolist())))
    options = {**tabm_options(ROWS_OF_TABLE, FEATURES), "dropout": 0.1}
    spec = NetworkSpec(given, tasks, EncoderSpec("tabm", options=options), groups=1, sampling="fixed")
    settings = TrainSettings(**table_schedule(ROWS_OF_TABLE), optimizer="adamw", weight_decay=0.1)
    data = ArrayData(splits, tasks)
    started = time.perf_counter()
    fit(GroupingNetwork(spec), data, settings)
    return time.perf_counter() - started


def _trees() -> float:
    """Seconds of a training of extra trees with all targets in one forest."""
    from sklearn.ensemble import ExtraTreesClassifier

    x, y = _table()
    started = time.perf_counter()
    ExtraTreesClassifier(TREES, random_state=0, n_jobs=cores()).fit(x[:ROWS_OF_TABLE], y[:ROWS_OF_TABLE])
    return time.perf_counter() - started


def _measured(work: Callable[[], float]) -> tuple[float, float]:
    """Seconds, and peak memory of the process in MiB."""
    seconds = work()
    return seconds, own_peak_mib()


def table_encoder() -> tuple[Any, ...]:
    """Seconds of both, each time in a new process, and a note with the memory of the last processes."""
    memory: dict[str, float] = {}

    def cost(name: str, work: Callable[[], float]) -> Callable[[], float]:
        def measured() -> float:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                seconds, memory[name] = pool.submit(_measured, work).result()
            return seconds

        return measured

    encoder, trees = cost("memory_mib_encoder", _encoder), cost("memory_mib_trees", _trees)
    return encoder, trees, lambda: {name: round(value) for name, value in memory.items()}


# name → (bound, value, function that returns numerator and denominator of the ratio, and notes)
ROWS: dict[str, tuple[str, float, Callable[[], Any]]] = {"table_encoder": ("at_most", 3, table_encoder)}
