"""The cells of a comparison: a cell is one network or one search with one seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from dmtg_core.grouping import Grouping

FORMAT = 4  # 3 had no parts of the validation score, 2 scores of the losses alone, 1 AUROC from bins
LEAST_RUNS = 0.5  # training of groups in runs of naive MTL, also if finding them has used the budget
Result = dict[str, Any]


class Kind(StrEnum):
    """What a cell trains.

    Attributes:
        NAIVE: Naive MTL.
        AFFINITIES: Naive MTL again, with the affinities of the published selectors. With many tasks the affinities
            take far longer than the run.
        WIDE: One wide encoder.
        DISTILLED_WIDE: The best of three wide encoders, distilled from all three.
        GROUPING: Given groups, from scratch.
        PAIR: One encoder for some of the tasks.
        PROPOSAL: Groups of tasks with a high feature overlap, from scratch. The budget includes finding them.
        SEARCH: A search.
        HEADS_ALONE: Heads on a frozen encoder.
        FULL_FINETUNING: One encoder, of which nothing is frozen.
        TREE_ENSEMBLES: One ensemble of trees for each task.
        OWN: A function of another package, see `training.own_method`.
    """

    NAIVE = "naive_mtl"
    AFFINITIES = "affinities"
    WIDE = "wide"
    DISTILLED_WIDE = "wide_distilled"
    GROUPING = "grouping"
    PAIR = "pair"
    PROPOSAL = "proposal"
    SEARCH = "search"
    HEADS_ALONE = "heads_alone"
    FULL_FINETUNING = "full_finetuning"
    TREE_ENSEMBLES = "trees"
    OWN = "own"


@dataclass(frozen=True)
class Cell:
    """One network or one search with one seed.

    Args:
        kind: How it is trained.
        seed: Seed of initial weights, data order and gate noise.
        epochs: Number of epochs; 0 for `train.epochs`.
        budget: The most training in runs of naive MTL, see `train_within`; 0 for `epochs`.
        groups: Groups of a GROUPING; one group with the tasks of a PAIR.
        options: Changes of a SEARCH to the search section.
        label: Name of a SEARCH, method of TREE_ENSEMBLES, or address of an OWN function, for its file.
    """

    kind: Kind
    seed: int
    epochs: int = 0
    budget: float = 0.0
    groups: tuple[tuple[str, ...], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        """Name of the file without its suffix. Equal cells have equal names."""
        stem = (self.label or self.kind).replace(":", ".")
        if self.kind == Kind.GROUPING:
            stem = f"{self.kind}_{Grouping.of(self.groups).name}"
        elif self.kind == Kind.PAIR:
            stem = f"{self.kind}_{Grouping.of(self.groups).name}_of_{len(self.groups[0])}"
        length = f"_{self.epochs}epochs" * bool(self.epochs) + f"_{self.budget:g}runs" * bool(self.budget)
        return f"{stem}{length}_seed{self.seed}"

    @property
    def without_seed(self) -> Cell:
        """The cell without its seed and its groups, which is equal for all seeds of a method."""
        return replace(self, seed=0, groups=())

    @classmethod
    def of(cls, grouping: Grouping, seed: int, epochs: int = 0, budget: float = 0.0) -> Cell:
        """The cell that trains a grouping from scratch."""
        return cls(Kind.GROUPING, seed, epochs, budget, grouping.groups)
