"""`SearchOptions`: the candidates that a search trains, and the names of its stages."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dmtg_core.network.spec import NetworkSpec
from dmtg_core.training.settings import TrainSettings

BASELINE, AFFINITY, GUIDED, WIDE = "naive_mtl", "affinity", "guided", "wide"
RETRAINED, DISTILLED = "retrained", "distilled"
METHODS = ("guided", "dmtg")


@dataclass(frozen=True)
class SearchOptions:
    """The candidates of a search.

    Args:
        method: One of `METHODS`.
        starts: Number of uniform gates, each with its own seed.
        wide: Include one wide encoder with the inference cost of all branches in the candidates ("guided").
        affinity_share, affinity_limit: Smallest and largest length of the affinity phase as a share of the epochs.
            The phase ends when the proposed groups have converged ("guided").
        probability: Initial probability of a task's proposed group ("guided").
        within: Largest difference of a candidate's score to the best at the end of the search with which it can be
            the result, in addition to the noise of the best candidate's validation score ("guided"). Up to twice
            this difference a candidate is trained to the end and becomes a teacher. With "dmtg" only the best
            candidate is trained to the end.
        retrain: Train the groups of the best gate from scratch before the wide encoder is selected ("guided").
        distil_share: Epochs of the distillation as a share of all epochs ("guided"); 0 for no distillation. The
            best candidate is distilled from the mean of all candidates that were trained to the end. With a single
            such candidate there is no distillation.

    Raises:
        ValueError: For an unknown method or a number out of range.
    """

    method: str = "guided"
    starts: int = 1
    wide: bool = True
    affinity_share: float = 0.1
    affinity_limit: float = 0.3
    probability: float = 0.9
    within: float = 0.03
    retrain: bool = True
    distil_share: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}, expected one of {', '.join(METHODS)}")
        fewest = 0 if self.method == "guided" else 1
        if self.starts < fewest:
            raise ValueError(f"starts must be at least {fewest}, got {self.starts}, with method {self.method!r}")
        for name in ("affinity_share", "affinity_limit"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if not 0 < self.probability < 1:
            raise ValueError(f"probability must be in (0, 1), got {self.probability}")
        if not 0 <= self.within < math.inf:
            raise ValueError(f"within must not be negative, got {self.within}")
        if not 0 <= self.distil_share < math.inf:
            raise ValueError(f"distil_share must not be negative, got {self.distil_share}")

    def affinity_epochs(self, settings: TrainSettings) -> tuple[int, int]:
        """Return the smallest and the largest number of epochs of the affinity phase."""
        shares = (self.affinity_share, max(self.affinity_share, self.affinity_limit))
        least, most = (max(round(share * settings.epochs), 1) for share in shares)
        return least, most

    def candidates(self, spec: NetworkSpec) -> list[str]:
        """Return the names of the candidates in training order. With one branch there are no proposed groups."""
        starts = [f"start_{i}" for i in range(self.starts)]
        if self.method == "dmtg" or spec.groups == 1:
            return starts or ["start_0"]
        return [GUIDED, *starts, *([WIDE] if self.wide and spec.encoder.can_widen else [])]

    def distilled(self, settings: TrainSettings) -> TrainSettings:
        """Return the settings of the distillation. It starts with the initial learning rate, without a gate."""
        epochs = max(round(self.distil_share * settings.epochs), 1)
        return replace(settings, epochs=epochs, search_share=1.0)
