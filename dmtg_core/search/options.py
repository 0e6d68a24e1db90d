"""`SearchOptions`: the candidates and the budget of a search, and the names of its stages."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dmtg_core.network.spec import NetworkSpec
from dmtg_core.search.budget import default_budget

BASELINE, GUIDED, CHAMPION, WIDE, ONE = "naive_mtl", "guided", "champion", "wide", "one_encoder"
OVERLAP_ENCODER = "overlap_encoder"
RUNG, SELECTED, OVERLAP, ENSEMBLE, DISTILLED = "rung", "selected", "overlap", "ensemble", "distilled"
METHODS = ("guided", "dmtg")


@dataclass(frozen=True)
class SearchOptions:
    """The candidates and the budget of a search.

    Args:
        method: One of `METHODS`.
        budget: The most training of the search in runs of naive MTL ("guided"). The baseline is one more run. None
            for `default_budget`.
        starts: Number of uniform gates, each with its own seed.
        wide: Include one wide encoder with the inference cost of all branches in the candidates ("guided").
            Without it, the feature overlap is measured in one encoder of the width of a branch.
        rung: Epochs after which candidates are compared first, as a share of the epochs ("guided"). A candidate
            whose epochs cost less than those of the others has more, so that all have the same cost. Each further
            rung has twice as many.
        compare: Largest share of the budget for the rungs ("guided").
        probability: Initial probability of a task's proposed group ("guided"). With 1 the proposed groups are
            trained as they are, without a gate.
        within: Largest difference of a candidate's score to the best at the end of a rung with which it stays, in
            addition to the noise of the best candidate's validation score ("guided").
        distil: Use what is left of the budget to distil an ensemble into the result, if the ensemble is better on
            validation data ("guided").

    Raises:
        ValueError: For an unknown method or a number out of range.
    """

    method: str = "guided"
    budget: float | None = None
    starts: int = 1
    wide: bool = True
    rung: float = 0.2
    compare: float = 0.5
    probability: float = 0.9
    within: float = 0.03
    distil: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}, expected one of {', '.join(METHODS)}")
        fewest = 0 if self.method == "guided" else 1
        if self.starts < fewest:
            raise ValueError(f"starts must be at least {fewest}, got {self.starts}, with method {self.method!r}")
        if self.budget is not None and not 1 <= self.budget < math.inf:
            raise ValueError(f"budget must be at least 1 run of naive MTL, got {self.budget}")
        for name in ("rung", "compare", "probability"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.within < math.inf:
            raise ValueError(f"within must not be negative, got {self.within}")

    def runs(self, groups: int) -> float | None:
        """Return the budget for a number of branches; None for a search of fixed length: "dmtg", or one branch."""
        return None if self.method == "dmtg" or groups == 1 else self.budget or default_budget(groups)

    def candidates(self, spec: NetworkSpec, *, champion: bool = False) -> list[str]:
        """Return the names of the candidates in training order. With one branch there are no proposed groups.

        Args:
            spec: The grouping network.
            champion: Whether the search starts from the models of a grouping, which are a candidate of "guided".
        """
        starts = [f"start_{i}" for i in range(self.starts)]
        if self.runs(spec.groups) is None:
            return starts or ["start_0"]
        one = WIDE if self.wide and spec.encoder.can_widen else ONE
        return [one, GUIDED, *([CHAMPION] if champion else []), *starts]
