"""Cost of metrics: ten million scores of a binary task in batches, against scikit-learn on all at once."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from dmtg_core.tasks import Task
from dmtg_core.training.metrics import MetricSums

SCORES, BATCH = 10_000_000, 4096


def ranking() -> tuple[Callable[[], float], Callable[[], float], Callable[[], dict[str, Any]]]:
    """Measure seconds for all metrics of a binary task, and for AUROC and average precision with scikit-learn."""
    rng = np.random.default_rng(0)
    label = rng.random(SCORES) < 0.1
    score = (rng.normal(size=SCORES) + label).astype(np.float32)
    outputs, targets = torch.from_numpy(score), torch.from_numpy(label.astype(np.float32))

    def evaluated() -> dict[str, float]:
        sums = MetricSums([Task("t", "binary")])
        for start in range(0, SCORES, BATCH):
            rows = slice(start, start + BATCH)
            sums.update({"t": outputs[rows]}, {"t": targets[rows]})
        return sums.compute()["t"]

    def ours() -> float:
        started = time.perf_counter()
        evaluated()
        return time.perf_counter() - started

    def reference() -> float:
        started = time.perf_counter()
        roc_auc_score(label, score)
        average_precision_score(label, score)
        return time.perf_counter() - started

    def notes() -> dict[str, Any]:
        tracemalloc.start()
        found = evaluated()
        peak = tracemalloc.get_traced_memory()[1]  # of NumPy; collected tensors add 8 MiB
        tracemalloc.stop()
        off = abs(found["auroc"] - roc_auc_score(label, score))
        return {"mib": round(peak / 2**20), "off_by": off}

    return ours, reference, notes


ROWS = {"ranking": ("at_most", 1.0, ranking)}
