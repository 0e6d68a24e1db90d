"""Learners of scikit-learn and LightGBM at their defaults, one for each task."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dmtg_core.evaluation.trees import train_each
from dmtg_core.tasks import Task
from dmtg_core.training.data import Data
from dmtg_core.training.metrics import error_of
from pipelines.execution.resources import cores

TREES = 300  # of a random forest


def _forest(task: Task, seed: int) -> Any:
    from sklearn import ensemble

    regression = task.kind == "regression"
    make = ensemble.RandomForestRegressor if regression else ensemble.RandomForestClassifier
    return make(TREES, random_state=seed, n_jobs=cores())


def _mlp(task: Task, seed: int) -> Any:
    from sklearn import neural_network, pipeline, preprocessing

    regression = task.kind == "regression"
    make = neural_network.MLPRegressor if regression else neural_network.MLPClassifier
    return pipeline.make_pipeline(preprocessing.StandardScaler(), make(random_state=seed))


def _lightgbm(task: Task, seed: int) -> Any:
    import lightgbm

    make = lightgbm.LGBMRegressor if task.kind == "regression" else lightgbm.LGBMClassifier
    return make(random_state=seed, n_jobs=cores(), verbose=-1)


LEARNERS: Mapping[str, Callable[[Task, int], Any]] = {
    "random_forest": _forest,
    "mlp_sklearn": _mlp,
    # no dependency of the project: measured where it is installed
    **({"lightgbm": _lightgbm} if importlib.util.find_spec("lightgbm") else {}),
}


def errors(name: str, tasks: Sequence[Task], data: Data, seed: int) -> dict[str, float]:
    """The errors of a learner on test, by the name of the task."""
    done = train_each(partial(LEARNERS[name], seed=seed), tasks, data, splits=("test",))
    return {task.name: error_of(task.metric, done.metrics["test"][task.name][task.metric]) for task in tasks}
