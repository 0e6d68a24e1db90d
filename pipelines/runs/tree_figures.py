"""The figures of extra trees in the result of a run, beside those of its grouping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dmtg_core.names import key_of


@dataclass(frozen=True)
class TreeComparison:
    """The mean errors of extra trees and of a grouping, over the same tasks and samples.

    Args:
        trees: Mean error of the trees.
        grouping: Mean error of the grouping.
    """

    trees: float
    grouping: float

    @property
    def better(self) -> bool:
        """Whether the trees have the smaller error; errors that differ by rounding are equal."""
        return self.trees < self.grouping and not math.isclose(self.trees, self.grouping)


def compare_trees(result: Mapping[str, Any]) -> TreeComparison | None:
    """Compare extra trees with the grouping of a run; None if the result has no figures of trees.

    The error of a task is that of its headline metric: 1 - score, or the metric itself. rmse and mae are divided
    by the scale of the task, for tables the standard deviation of the training labels. So tasks with different
    units have a mean. Tasks for which one of the two is not defined are left out.

    Args:
        result: As in `result.json`.
    """
    from dmtg_core.training.metrics import error_of  # imports torch

    found = result.get("trees") or {}
    pairs = []
    for task, error in found.get("errors", {}).items():
        metric = result["headline"][task]
        value = result["metrics"][task][metric]
        if error is not None and value is not None:
            pairs.append((error, error_of(metric, value) / found["scales"][task]))
    if not pairs:
        return None
    trees, grouping = (math.fsum(errors) / len(pairs) for errors in zip(*pairs, strict=True))
    return TreeComparison(trees, grouping) if math.isfinite(trees + grouping) else None


def tree_values(result: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of extra trees for MLflow, and the mean error of the grouping beside theirs."""
    compared = compare_trees(result)
    if compared is None:
        return {}
    found = result["trees"]
    prefix = f"{found['method']}/{found['split']}"
    values = {
        f"{prefix}/{key_of(task)}/{name}": value
        for task, metrics in found["metrics"].items()
        for name, value in metrics.items()
    }
    return values | {f"{found['method']}/mean_error": compared.trees, "mean_error": compared.grouping}
