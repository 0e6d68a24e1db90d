"""The section `search` of a configuration, and the budget of a search in numbers."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipelines.config.validation import Section

CEILING = 4  # the most training with `search.budget=auto`, in default budgets


class SearchSection(Section):
    """The search for the grouping."""

    method: Literal["guided", "dmtg"] = Field(
        "guided",
        description="guided: the candidates are a wide encoder, a gate that starts at groups of tasks with a high "
        "feature overlap, and uniform gates. They are compared after short rungs, and the best one gets what is "
        "left of search.budget. dmtg: uniform gates, as published.",
    )
    starts: int = Field(
        1,
        ge=0,
        le=100,
        description="Number of uniform gates. dmtg needs at least one and fine-tunes the gate with the best "
        "validation score.",
    )
    wide: bool = Field(
        True, description="guided: add a wide encoder, at the inference cost of all groups, to the candidates."
    )
    budget: Annotated[float, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="guided: the most training of the search in runs of naive MTL; by default network.groups + 2. "
        "The search ends earlier if validation data says that more does not pay. auto: as long as it pays, with "
        "four times the default as the most. The baseline of naive MTL is one more run on top.",
    )
    rung: float = Field(
        0.2,
        gt=0,
        le=1,
        description="guided: epochs after which the candidates are compared first, as a share of train.epochs. "
        "A candidate whose epochs cost less than those of the others has more, so that all have the same cost. "
        "Each further rung has twice as many.",
    )
    compare: float = Field(
        0.5, gt=0, le=1, description="guided: largest share of search.budget in which candidates are compared."
    )
    probability: float = Field(
        0.9,
        gt=0,
        le=1,
        description="guided: initial probability of each task for its proposed group; with 1 the proposed groups "
        "are trained without a gate.",
    )
    within: float = Field(
        0.03,
        ge=0,
        description="guided: distance to the best validation score at the end of a rung within which a candidate "
        "is trained further; the noise of the validation score is added to it.",
    )
    distil: bool = Field(
        True,
        description="guided: spend what is left of search.budget on further networks and a distillation from all "
        "of them, if the mean of their predictions is better on validation data.",
    )
    average: float = Field(
        1.0,
        ge=0,
        description="guided: epochs over which the weights of a network are averaged; the averaged network is "
        "validated and kept. 0 for no average.",
    )
    share: float = Field(0.5, gt=0, le=1, description="Share of train.epochs in which a gate is trained.")
    group_epochs: int = Field(
        0,
        ge=0,
        le=10**6,
        description="Epochs that each group is trained on its own afterwards; groups are trained at the same "
        "time if resources are available.",
    )
    group_learning_rate: float | None = Field(
        None, gt=0, description="Learning rate of search.group_epochs; by default a tenth of train.learning_rate."
    )
    baseline: bool = Field(
        True,
        description="Train naive MTL as well, as the baseline. guided: it is the result if nothing is better.",
    )

    @field_validator("budget", mode="before")
    @classmethod
    def _runs(cls, value: object) -> object:
        if isinstance(value, int | float) and not isinstance(value, bool):
            if 1 <= value < math.inf:
                return value
        elif value is None or value == "auto":
            return value
        raise ValueError("expected auto, or a number of runs of naive MTL that is at least 1")


def runs_of(budget: float | Literal["auto"] | None, groups: int) -> float | None:
    """The most training of a search in runs of naive MTL; None for the default of the core.

    Args:
        budget: Value of `search.budget`.
        groups: Value of `network.groups`.
    """
    if budget != "auto":
        return budget
    from dmtg_core.search.budget import default_budget

    return CEILING * default_budget(groups)
