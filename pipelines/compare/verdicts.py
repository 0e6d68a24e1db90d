"""Whether grouping helps, from the result of a command; the next command follows from it.

Heavy libraries are imported in the functions: the command line imports this module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

MATTERS, NOT, UNCLEAR = "matters", "not", "unclear"  # conclusions of `dmtg signal`


class Verdict(Enum):
    """Whether grouping helps."""

    HELPS = "helps"
    UNMEASURED = "unmeasured"
    UNCLEAR = "unclear"
    NOT = "not"
    SETTLED = "settled"  # one encoder has been chosen, and a model of it is there


def of_train(result: Mapping[str, Any], signal: str) -> Verdict:
    """The verdict of a training run. One run does not show the variation between seeds.

    Args:
        result: As in `result.json`.
        signal: The conclusion of an earlier `dmtg signal`; empty without one.
    """
    from dmtg_core.search.options import WIDE

    gain = result["normalized_gain"]
    if result["chosen"] == WIDE or len(result["grouping"]) == 1:
        return Verdict.SETTLED
    if gain is None or gain > 0:
        return Verdict.HELPS
    return of_signal(signal) if signal else Verdict.UNMEASURED


def of_signal(conclusion: str) -> Verdict:
    """The verdict of `dmtg signal`, from its conclusion."""
    # a grouping that matters can still be worse than a wide encoder, which dmtg compare shows
    return Verdict.NOT if conclusion == NOT else Verdict.UNCLEAR


def of_compare(rows: Sequence[Mapping[str, Any]], reference: str) -> Verdict:
    """The verdict of `dmtg compare`: the interval of the gain over naive MTL, over seeds.

    Args:
        rows: As in `compare.json`.
        reference: The method that is compared with the others.
    """
    gain = next((row["gain"] for row in rows if row["method"] == reference), None)
    low = None if gain is None else gain["low"]
    if low is None or not math.isfinite(low):  # one seed has no interval
        return Verdict.HELPS if gain is None or (gain["value"] or 0) > 0 else Verdict.NOT
    return Verdict.HELPS if low > 0 else Verdict.NOT


def of_sweep(best: Mapping[str, Any] | None) -> Verdict:
    """The verdict of `dmtg sweep`: the gain of the best setting on validation."""
    gain = None if best is None else best["gain_validation"]
    return Verdict.HELPS if gain is None or gain > 0 else Verdict.NOT
