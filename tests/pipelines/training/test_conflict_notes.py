"""Notes of a result on tasks of a group whose gradients conflict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dmtg_core import Grouping
from dmtg_core.search.search import SearchResult, search
from dmtg_core.training.metrics import error_of, normalized_gain
from pipelines.training.worker import conflict_notes
from tests.dmtg_core import samples
from tests.dmtg_core.searches import SETTINGS, SPEC, local

NAMES = [task.name for task in SPEC.tasks]


@pytest.fixture(scope="module")
def found() -> SearchResult:
    """A result with two groups, whose first two tasks share one."""
    result = search(SPEC, samples.data(SPEC.input, SPEC.tasks), SETTINGS, context=local())
    grouping = Grouping.from_assignment(NAMES, [0, 0, *[1] * (len(NAMES) - 2)])
    return replace(result, grouping=grouping, chosen="guided", distilled={})


def records(cosine: float, stage: str = "guided") -> list[dict[str, Any]]:
    cosines: list[list[float | None]] = [[None] * len(NAMES) for _ in NAMES]
    cosines[0][1] = cosines[1][0] = cosine
    return [{"stage": stage, "phase": "finetune", "cosines": cosines}] * 2


def with_gains(found: SearchResult, first: float, second: float) -> SearchResult:
    """The result with these relative gains, in per cent, of the first two tasks over naive MTL."""
    metrics = {name: dict(values) for name, values in found.metrics["val"].items()}
    for task, gain in zip(SPEC.tasks[:2], (first, second), strict=True):
        error = error_of(task.metric, found.baseline["val"][task.name][task.metric]) * (1 - gain / 100)
        metrics[task.name][task.metric] = error_of(task.metric, error)  # an error, or 1 - score
        assert normalized_gain([task], metrics, found.baseline["val"]) == pytest.approx(gain)
    return replace(found, metrics=found.metrics | {"val": metrics})


def test_a_conflict_is_named_if_a_task_is_worse_than_with_naive_mtl(found: SearchResult) -> None:
    (note,) = conflict_notes(records(-0.3), with_gains(found, 20.0, -10.0))
    assert note == (
        f"{NAMES[0]} and {NAMES[1]} share a group and their gradients conflict (mean cosine -0.30), "
        f"and {NAMES[1]} lost against naive MTL: try more groups (network.groups) or more starts (search.starts)"
    )
    (both,) = conflict_notes(records(-0.3), with_gains(found, -1.0, -10.0))
    assert f"{NAMES[0]} and {NAMES[1]} lost against naive MTL" in both
    assert conflict_notes(records(-0.3), with_gains(found, 20.0, 10.0)) == []
    assert conflict_notes(records(-0.1), with_gains(found, 20.0, -10.0)) == []


def test_the_notes_are_those_of_the_network_that_is_the_result(found: SearchResult) -> None:
    worse = with_gains(found, -1.0, -1.0)
    assert conflict_notes(records(-0.3, "start_0"), worse) == []
    assert conflict_notes(records(-0.3, "distilled"), replace(worse, distilled={"kept": False})) == []
    assert len(conflict_notes(records(-0.3, "distilled"), replace(worse, distilled={"kept": True}))) == 1
    one = Grouping.from_assignment(NAMES, [0] * len(NAMES))
    assert conflict_notes(records(-0.3), replace(worse, grouping=one)) == []


def test_without_a_baseline_every_conflict_is_named(found: SearchResult) -> None:
    (note,) = conflict_notes(records(-0.3), replace(found, baseline={}))
    assert note.startswith(f"{NAMES[0]} and {NAMES[1]} share a group and their gradients conflict")
    assert "naive MTL" not in note
