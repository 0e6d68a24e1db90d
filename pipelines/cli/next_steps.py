"""The next command after a command that measured whether grouping helps: it follows from the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from pipelines.cli.console import Next
from pipelines.cli.options import command_line

ONE_ENCODER = "network.groups=1"  # naive MTL: nothing is searched


class Verdict(Enum):
    """Whether grouping helps."""

    HELPS = "helps"
    UNMEASURED = "unmeasured"
    UNCLEAR = "unclear"
    NOT = "not"
    SETTLED = "settled"  # one encoder has been chosen, and a model of it is there


# verdict → purpose, command and further overrides; None for the command that uses the model
STEPS: Mapping[Verdict, tuple[str, str, Sequence[str]] | None] = {
    Verdict.HELPS: ("train a grouping and its models", "train", ()),
    Verdict.UNMEASURED: ("measure in short runs whether the grouping can matter", "signal", ()),
    Verdict.UNCLEAR: ("compare the search with the baselines", "compare", ()),
    Verdict.NOT: ("train one encoder for all tasks, without a search", "train", (ONE_ENCODER,)),
    Verdict.SETTLED: None,
}


def next_step(
    verdict: Verdict, config: str, overrides: Sequence[str] | None, ray_config: str, use: Next | None = None
) -> Next:
    """The next command after a verdict.

    Args:
        verdict: Whether grouping helps.
        config: The configuration file or recipe.
        overrides: `section.key=value` arguments of the command that ended.
        ray_config: The file that configures Ray; empty for the default.
        use: The command that uses the model that is there, if there is one; it needs no other training.
    """
    step = STEPS[verdict]
    if use is not None and (step is None or verdict is Verdict.HELPS):
        return use
    assert step is not None, "a verdict that is settled has a model"
    purpose, command, more = step
    return Next(purpose, command_line([command], config, [*(overrides or []), *more], ray_config))


def of_train(result: Mapping[str, Any], signal: str) -> Verdict:
    """The verdict of a training run. One run does not show the variation between seeds.

    Args:
        result: As in `result.json`.
        signal: The verdict of an earlier `dmtg signal`; empty without one.
    """
    from dmtg_core.search.options import WIDE

    gain = result["normalized_gain"]
    if result["chosen"] == WIDE or len(result["grouping"]) == 1:
        return Verdict.SETTLED
    if gain is None or gain > 0:
        return Verdict.HELPS
    return of_signal(signal) if signal else Verdict.UNMEASURED


def of_signal(text: str) -> Verdict:
    """The verdict of `dmtg signal`, from its text."""
    from pipelines.compare.signal import HARDLY, NO_SIGNAL

    # a grouping that matters can still be worse than a wide encoder, which dmtg compare shows
    return Verdict.NOT if text.startswith((HARDLY, NO_SIGNAL)) else Verdict.UNCLEAR


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
