"""Ensembles of decision trees of scikit-learn, trained on the samples of a network: the yardstick for tables."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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
BATCH = 4096  # samples that are read at a time
LEAST = 1e-6  # smallest probability of a class: a forest predicts 0, whose log loss is infinite


@dataclass(frozen=True)
class TreeResult:
    """The result of tree ensembles, one for each task.

    Args:
        metrics: Split → task → metric → value.
        score: Validation score; see `score_of`.
        seconds: Duration of training and evaluation.
    """

    metrics: dict[str, Metrics]
    score: float
    seconds: float


def trees_apply(kind: str, tasks: Sequence[Task]) -> bool:
    """Whether tree ensembles can be trained: the input is a vector of features, and every task has one value."""
    return kind == "features" and not any(task.dense for task in tasks)


def train_trees(
    method: str, tasks: Sequence[Task], data: Data, *, splits: Sequence[str], seed: int, threads: int = 1
) -> TreeResult:
    """Train one tree ensemble for each task on the training split, and evaluate it.

    Args:
        method: One of `TREES`, with scikit-learn's defaults: `extra_trees` are `COUNT` trees
            (Geurts et al. 2006), `gradient_boosting` is histogram-based boosting, which stops early on a tenth
            of the training split.
        tasks: Sample-wise tasks. Samples without a label are left out.
        data: Data of one process.
        splits: Splits of the evaluation, with "val".
        seed: Seed of the trees.
        threads: Threads of `extra_trees`.
    """
    started = time.perf_counter()
    inputs, targets = _samples(data, "train")
    models = {}
    for task in tasks:
        known = valid(task, targets[task.name])
        known = known if known.dim() == 1 else known.all(1)
        labels = targets[task.name][known].numpy()
        models[task.name] = _estimator(method, task, seed, threads).fit(inputs[known.numpy()], labels)
    metrics = {}
    for split in splits:
        sums = MetricSums(list(tasks))
        inputs, targets = _samples(data, split)
        sums.update({task.name: _output(models[task.name], task, inputs) for task in tasks}, targets)
        metrics[split] = sums.compute()
    return TreeResult(metrics, score_of(metrics["val"]), time.perf_counter() - started)


def _samples(data: Data, split: str) -> tuple[np.ndarray, Mapping[str, Tensor]]:
    """All samples of a split: inputs `(n, F)` and targets."""
    batches = list(data.evaluate(split, BATCH))
    inputs = torch.cat([batch.inputs for batch in batches]).cpu().float().numpy()
    return inputs, {name: torch.cat([b.targets[name] for b in batches]).cpu() for name in batches[0].targets}


def _estimator(method: str, task: Task, seed: int, threads: int) -> Any:
    from sklearn import ensemble
    from sklearn.multioutput import MultiOutputRegressor

    regression = task.kind == "regression"
    if method == EXTRA_TREES:
        make = ensemble.ExtraTreesRegressor if regression else ensemble.ExtraTreesClassifier
        return make(COUNT, random_state=seed, n_jobs=threads)
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
