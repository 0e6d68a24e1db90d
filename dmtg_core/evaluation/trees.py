"""Ensembles of decision trees of scikit-learn, trained on the samples of a network: the yardstick for tables."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmtg_core.tasks import Task
from dmtg_core.training.data import Data
from dmtg_core.training.loop import score_of
from dmtg_core.training.losses import valid
from dmtg_core.training.metrics import Metrics, MetricSums

EXTRA_TREES, GRADIENT_BOOSTING = "extra_trees", "gradient_boosting"
TREES = (EXTRA_TREES, GRADIENT_BOOSTING)
COUNT = 300  # trees of `extra_trees`
QUICK_COUNT = 100  # trees of a quick figure
QUICK_ROWS, QUICK_VALUES = 10_000, 1_000_000  # most training samples of a quick figure, and samples × features
BATCH = 4096  # samples that are read at a time
LEAST = 1e-6  # smallest probability of a class: a forest predicts 0, whose log loss is infinite


@dataclass(frozen=True)
class TreeResult:
    """The result of tree ensembles, one for each task.

    Args:
        metrics: Split → task → metric → value.
        score: Validation score; see `score_of`. NaN if "val" was not evaluated.
        seconds: Duration of training and evaluation.
    """

    metrics: dict[str, Metrics]
    score: float
    seconds: float


def trees_apply(kind: str, tasks: Sequence[Task]) -> bool:
    """Whether tree ensembles can be trained: the input is a vector of features, and every task has one value."""
    return kind == "features" and not any(task.dense for task in tasks)


def quick_rows(rows: int, features: int) -> int:
    """Training samples of a quick figure: at most `QUICK_ROWS`, and at most `QUICK_VALUES` values.

    Args:
        rows: Samples of the training split.
        features: Features of a sample.
    """
    return min(rows, QUICK_ROWS, max(QUICK_VALUES // features, 1))


def train_trees(
    method: str,
    tasks: Sequence[Task],
    data: Data,
    *,
    splits: Sequence[str],
    seed: int,
    threads: int = 1,
    count: int = COUNT,
    rows: int | None = None,
) -> TreeResult:
    """Train one tree ensemble for each task on the training split, and evaluate it.

    Args:
        method: One of `TREES`, with scikit-learn's defaults: `extra_trees` are `count` trees
            (Geurts et al. 2006), `gradient_boosting` is histogram-based boosting, which stops early on a tenth
            of the training split.
        tasks: Sample-wise tasks. Samples without a label are left out.
        data: Data of one process.
        splits: Splits of the evaluation. All their samples are evaluated.
        seed: Seed of the trees.
        threads: Threads of `extra_trees`.
        count: Number of trees of `extra_trees`.
        rows: Number of training samples, the first ones; None for all. The samples of shards are in random order.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    return train_each(
        lambda task: _estimator(method, task, seed, threads, count), tasks, data, splits=splits, rows=rows
    )


def train_each(
    make: Callable[[Task], Any],
    tasks: Sequence[Task],
    data: Data,
    *,
    splits: Sequence[str],
    rows: int | None = None,
) -> TreeResult:
    """Train an estimator of scikit-learn for each task, and evaluate it; see `train_trees`.

    Args:
        make: Task → an estimator that is not fitted: a regressor, or a classifier with `predict_proba`.
        tasks, data, splits, rows: As in `train_trees`.
    """
    started = time.perf_counter()
    inputs, targets = _samples(data, "train", rows)
    models = {}
    for task in tasks:
        known = valid(task, targets[task.name])
        known = known if known.dim() == 1 else known.all(1)
        models[task.name] = make(task).fit(inputs[known.numpy()], targets[task.name][known].numpy())
    metrics = {split: _evaluate(models, tasks, data, split) for split in splits}
    score = score_of(tasks, metrics["val"]) if "val" in metrics else math.nan
    return TreeResult(metrics, score, time.perf_counter() - started)


def _samples(data: Data, split: str, rows: int | None) -> tuple[np.ndarray, Mapping[str, Tensor]]:
    """The first samples of a split, or all: inputs `(n, F)` and targets."""
    batches, held = [], 0
    for batch in data.evaluate(split, BATCH):
        batches.append(batch)
        held += len(batch.inputs)
        if rows is not None and held >= rows:
            break
    inputs = torch.cat([batch.inputs for batch in batches])[:rows].cpu().float().numpy()
    names = batches[0].targets
    return inputs, {name: torch.cat([b.targets[name] for b in batches])[:rows].cpu() for name in names}


def _evaluate(models: Mapping[str, Any], tasks: Sequence[Task], data: Data, split: str) -> Metrics:
    """The metrics of a split, of which one batch at a time is in memory."""
    sums = MetricSums(list(tasks))
    for batch in data.evaluate(split, BATCH):
        inputs = batch.inputs.cpu().float().numpy()
        outputs = {task.name: _output(models[task.name], task, inputs) for task in tasks}
        sums.update(outputs, {name: target.cpu() for name, target in batch.targets.items()})
    return sums.compute()


def _estimator(method: str, task: Task, seed: int, threads: int, count: int) -> Any:
    from sklearn import ensemble
    from sklearn.multioutput import MultiOutputRegressor

    regression = task.kind == "regression"
    if method == EXTRA_TREES:
        make = ensemble.ExtraTreesRegressor if regression else ensemble.ExtraTreesClassifier
        return make(count, random_state=seed, n_jobs=threads)
    if not regression:
        return ensemble.HistGradientBoostingClassifier(random_state=seed)
    one = ensemble.HistGradientBoostingRegressor(random_state=seed)
    return one if task.channels == 1 else MultiOutputRegressor(one)


def _output(model: Any, task: Task, inputs: np.ndarray) -> Tensor:
    """Predictions in the layout and the units of `GroupingNetwork.forward`."""
    if task.kind == "regression":
        return torch.from_numpy(np.asarray(model.predict(inputs), np.float32))
    found = np.asarray(model.predict_proba(inputs))
    every = np.zeros((len(inputs), 2 if task.kind == "binary" else task.channels))
    every[:, model.classes_.astype(int)] = found  # a class without a sample in training has the probability 0
    shares = torch.from_numpy(every).clamp(LEAST, 1 - LEAST)
    shares = shares / shares.sum(1, keepdim=True)
    if task.kind == "binary":
        return shares[:, 1].logit().float()
    return shares.log().float()
