"""`SearchOptions`: the candidates that a search trains, and the names of its stages."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dmtg_core.network.encoders import WIDTHS
from dmtg_core.network.grouping_network import NetworkSpec
from dmtg_core.training.settings import TrainSettings

BASELINE, AFFINITY, GUIDED, WIDE = "naive_mtl", "affinity", "guided", "wide"
RETRAINED, DISTILLED = "retrained", "distilled"
METHODS = ("guided", "dmtg")


@dataclass(frozen=True)
class SearchOptions:
    """Which candidates a search trains.

    Args:
        method: One of `METHODS`.
        starts: Gates that start undecided, each with a seed of its own.
        wide: Have one wide encoder, at the inference cost of all branches, among the candidates ("guided").
        affinity_share, affinity_limit: Share of the epochs that the network trains in which tasks are compared, at
            least and at most: it stops when the groups that follow no longer change ("guided").
        probability: With which a task begins in its proposed group ("guided").
        within: How much worse than the best a candidate's score may be when the search ends and yet be the result,
            beside what the best one's validation score changed from epoch to epoch ("guided"); up to twice as much
            it goes on to be learned from. With "dmtg" the best goes on alone.
        retrain: Before the wide encoder is kept, train the groups of the best gate from scratch ("guided").
        distil_share: For how many more epochs, as a share of all, the best candidate learns from the mean of all
            that were trained to their end ("guided"); 0 for none. Where there is but one, nothing can be learned.

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
        if self.within < 0:
            raise ValueError(f"within must not be negative, got {self.within}")
        if self.distil_share < 0:
            raise ValueError(f"distil_share must not be negative, got {self.distil_share}")

    def affinity_epochs(self, settings: TrainSettings) -> tuple[int, int]:
        """The fewest and the most epochs of the network that tasks are compared in."""
        shares = (self.affinity_share, max(self.affinity_share, self.affinity_limit))
        least, most = (max(round(share * settings.epochs), 1) for share in shares)
        return least, most

    def candidates(self, spec: NetworkSpec) -> list[str]:
        """Their names, in the order in which they are trained. One branch has nothing to be guided to."""
        starts = [f"start_{i}" for i in range(self.starts)]
        if self.method == "dmtg" or spec.groups == 1:
            return starts or ["start_0"]
        return [GUIDED, *starts, *([WIDE] if self.wide and spec.encoder.name in WIDTHS else [])]

    def distilled(self, settings: TrainSettings) -> TrainSettings:
        """How the best candidate learns on: from the first learning rate again, and every epoch may be best."""
        epochs = max(round(self.distil_share * settings.epochs), 1)
        return replace(settings, epochs=epochs, search_share=1.0)
