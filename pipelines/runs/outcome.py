"""What a search has found, in one sentence: its groups, or that no grouping helps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmtg_core.names import by_number, quoted
from dmtg_core.search.options import BASELINE, DISTILLED, OVERLAP_ENCODER, WIDE

WIDE_ENCODER, ONE_ENCODER, GROUPS = "wide encoder", "one encoder", "groups"
LONGEST = 100  # characters of the groups
EQUAL = 1.05  # a smaller ratio of costs is not worth a word


def network_of(result: Mapping[str, Any]) -> str:
    """The kind of the network of a result: `WIDE_ENCODER`, `ONE_ENCODER` or `GROUPS`.

    Args:
        result: As in `result.json`.
    """
    if WIDE in (result["chosen"], result["chosen"].rpartition("_")[0]):
        return WIDE_ENCODER
    return ONE_ENCODER if len(result["grouping"]) == 1 else GROUPS


def was_searched(result: Mapping[str, Any]) -> bool:
    """Whether a candidate could have several groups."""
    return any(len(candidate["probabilities"][0]) > 1 for candidate in result["candidates"])


def outcome(result: Mapping[str, Any]) -> str:
    """The outcome as a sentence.

    Args:
        result: As in `result.json`. Results of earlier versions have no cost of the groups.
    """
    kind = network_of(result)
    if kind == GROUPS:
        return groups_text(result)
    if result["candidates"] and not was_searched(result):
        return "One encoder for all tasks: no grouping was searched."
    found, groups = f"No grouping helps here: one {kind.removeprefix('one ')}", result.get("groups_inference")
    if groups is None or result.get("inference") is None:
        return f"{found}."
    ratio = groups["flops"] / result["inference"]["flops"]
    if ratio >= EQUAL:
        return f"{found}, {ratio:.1f} times cheaper at inference."
    return f"{found}, at the inference cost of all groups."


def groups_text(result: Mapping[str, Any]) -> str:
    """Number and tasks of the groups; of many tasks only the first."""
    grouping = result["grouping"]
    shown = " | ".join(", ".join(map(quoted, grouping[name])) for name in sorted(grouping, key=by_number))
    shown = shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"
    return f"{len(grouping)} groups: {shown}"


def spent_text(result: Mapping[str, Any]) -> str:
    """The training cost: what was spent of which budget, and on which networks.

    Args:
        result: As in `result.json`. Results of earlier versions have the sum alone.
    """
    budget, costs = result.get("budget"), result.get("costs") or {}
    of = f" of {budget:.3g}" if budget is not None else ""
    text = f"{result['training_cost']:.1f}{of} runs of naive MTL"
    parts = _parts(result, costs) if budget is not None else []
    if BASELINE in costs:
        parts.append(f"the baseline is {costs[BASELINE]:.1f} more")
    return f"{text} ({', '.join(parts)})" if parts else text


def _parts(result: Mapping[str, Any], costs: Mapping[str, float]) -> list[str]:
    """Costs of the best candidate, the dropped ones, the other networks and the distillation, as texts."""
    complete = [c["stage"] for c in result["candidates"] if c["final"] is not None]
    dropped = [c["stage"] for c in result["candidates"] if c["final"] is None]
    shares = [(complete[:1], ", ".join(complete[:1])), (dropped, "dropped candidates"),
              ([OVERLAP_ENCODER], "feature overlap"),
              (complete[1:], "further networks"), ([DISTILLED], "distillation")]  # fmt: skip
    found = [(sum(costs.get(name, 0.0) for name in names), what) for names, what in shares]
    return [f"{what} {cost:.1f}" for cost, what in found if cost]
