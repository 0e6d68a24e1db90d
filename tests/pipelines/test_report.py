"""What a run's page says of what was tried."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.report import shown_gate, verdict


def candidate(stage: str, score: float, final: float | None, branches: int = 2) -> dict[str, Any]:
    return {"stage": stage, "score": score, "final": final, "probabilities": [[1 / branches] * branches] * 3}


def result(chosen: str, gain: float | None = 4.0) -> dict[str, Any]:
    groups = {"group_0": ["a", "b", "c"]} if chosen == "wide" else {"group_0": ["a", "b"], "group_1": ["c"]}
    return {
        "chosen": chosen,
        "grouping": groups,
        "metrics": {"a": {}, "b": {}, "c": {}},
        "split": "test",
        "normalized_gain": gain,
        "candidates": [
            candidate("guided", -1.0, None), candidate("start_0", -1.2, -1.3), candidate("wide", -1.1, -1.4, 1)
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("start_0", "3 tasks in 2 groups. Against one shared encoder"),
        ("wide", "No grouping of the 3 tasks was better than one wide encoder of the same cost. Against"),
    ],
)
def test_the_verdict_names_what_was_kept(chosen: str, said: str) -> None:
    assert verdict(result(chosen)).startswith(said)
    assert verdict(result(chosen, gain=None)) == said.split(". ", maxsplit=1)[0] + "."


def test_the_gate_that_is_drawn_is_that_of_the_result_or_the_best_there_is() -> None:
    assert shown_gate(result("start_0")) == "start_0"
    assert shown_gate(result("guided")) == "guided"
    assert shown_gate(result("wide")) == "start_0"
    alone = result("start_0") | {"candidates": [candidate("start_0", 0.0, 0.0, branches=1)]}
    assert shown_gate(alone) == ""
