"""The result of a run: gains over naive MTL, and the files of the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dmtg_core.grouping import Grouping
from dmtg_core.network.cost import Cost, grouping_cost, inference_cost
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.search.search import SearchResult
from dmtg_core.tasks import Task
from dmtg_core.training.loop import score_of
from dmtg_core.training.metrics import Metrics, normalized_gain
from pipelines.runs.files import GROUPING, MODELS, RESULT
from pipelines.runs.models import write_models
from pipelines.runs.outcome import outcome
from pipelines.storage import Location

# rows of the table of inference cost, besides one for each group
ALL, NAIVE, SINGLE = "all groups", "naive MTL", "single-task networks"


def gains(tasks: Sequence[Task], metrics: Metrics, baseline: Metrics) -> dict[str, float]:
    """The gain over naive MTL in per cent: of errors, and in the published forms of scores and of losses."""
    return {
        "error": normalized_gain(tasks, metrics, baseline),
        "score": normalized_gain(tasks, metrics, baseline, form="score"),
        "loss": normalized_gain(tasks, metrics, baseline, metric="loss"),
    }


def write_result(
    run: Location,
    result: SearchResult,
    spec: NetworkSpec,
    notes: Sequence[str] = (),
    file: str = RESULT,
    trees: Mapping[str, Any] | None = None,
    estimate: Mapping[str, Any] | None = None,
    code: Sequence[Mapping[str, str]] = (),
) -> None:
    """Write group models, grouping and metrics; `file` is written last and marks the result as complete.

    Args:
        run: The run folder.
        result: The search.
        spec: The configured network.
        notes: Warnings to store with the result.
        file: `RESULT` or `SEARCHED`.
        trees: The figures of extra trees on the same table, or why there are none.
        estimate: The estimate before the start.
        code: Records of the code of other packages, see `pipelines.config.code.records_of`.
    """
    write_models(run / MODELS, result.network.specialise())
    (run / GROUPING).write_text(result.grouping.to_json())
    split = "test" if "test" in result.metrics else "val"
    tasks = result.network.tasks
    found = gains(tasks, result.metrics[split], result.baseline[split]) if result.baseline else {}
    values = {
        "grouping": result.grouping.to_dict(),
        "grouping_name": result.grouping.name,
        "split": split,
        "metrics": result.metrics[split],
        "baseline": result.baseline.get(split, {}),
        "normalized_gain": found.get("error"),
        "gains": found,
        "validation": result.metrics.get("val", {}),
        "chosen": result.chosen,
        "score": finite_or_none(result.score),
        "difference": asdict(result.difference) if result.difference is not None else None,
        "baseline_score": score_or_none(tasks, result.baseline["val"]) if "val" in result.baseline else None,
        "candidates": result.candidates,
        "distilled": result.distilled,
        "affinity": result.affinity,
        "budget": result.budget,
        "training_cost": result.cost,
        "costs": result.costs,
        "estimate": dict(estimate or {}),
        "inference": asdict(inference_cost(result.network)),
        "groups_inference": asdict(cost_of_groups(result, spec)),
        "headline": {task.name: task.metric for task in tasks},
        "trees": dict(trees or {}),
        "code": list(code),
        "notes": list(notes),
    }
    (run / file).write_json({"outcome": outcome(values), **values})


def cost_of_groups(result: SearchResult, spec: NetworkSpec) -> Cost:
    """The inference cost of the best groups that a search has found, or else of as many groups as it may have.

    Args:
        result: The search.
        spec: The configured network.
    """
    names = [task.name for task in spec.tasks]
    several = [one for one in result.candidates if len(one["grouping"]) > 1]
    if several:
        best = min(several, key=lambda one: one["score"])
        return grouping_cost(spec, Grouping.from_dict(best["grouping"], names))
    groups = min(spec.groups, len(names))
    return grouping_cost(spec, Grouping.from_assignment(names, [n % groups for n in range(len(names))]))


def score_or_none(tasks: Sequence[Task], metrics: Mapping[str, Any]) -> float | None:
    """The validation score of metrics as they are written; None if it is not defined."""
    return finite_or_none(score_of(tasks, numbers({task.name: metrics[task.name] for task in tasks})))


def gain_of(
    tasks: Sequence[Task], metrics: Mapping[str, Any], reference: Mapping[str, Any], *, metric: str = ""
) -> float | None:
    """The normalized gain in per cent, of headline metrics or of one metric; None if it is not defined."""
    return finite_or_none(normalized_gain(tasks, numbers(metrics), numbers(reference), metric=metric))


def numbers(metrics: Mapping[str, Any]) -> Metrics:
    """Metrics as before they were written: undefined values are NaN."""
    return {
        task: {name: math.nan if value is None else value for name, value in found.items()}
        for task, found in metrics.items()
    }


def finite_or_none(value: float) -> float | None:
    """The value, or None if JSON cannot represent it."""
    return value if math.isfinite(value) else None
