"""The cells of a comparison: a cell is one network or one search with one seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dmtg_core.grouping import Grouping

CELLS = "cells"
FORMAT = 4  # 3 had no parts of the validation score, 2 scores of the losses alone, 1 AUROC from bins
NAIVE, AFFINITIES, WIDE, DISTILLED_WIDE, GROUPING, PAIR, PROPOSAL, SEARCH, TREE_ENSEMBLES, OWN = (
    "naive_mtl", "affinities", "wide", "wide_distilled", "grouping", "pair", "proposal", "search", "trees", "own"
)  # fmt: skip
HEADS_ALONE, FULL_FINETUNING = "heads_alone", "full_finetuning"
LEAST_RUNS = 0.5  # training of groups in runs of naive MTL, also if finding them has used the budget
Result = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One network or one search with one seed.

    Args:
        kind: NAIVE, AFFINITIES (naive MTL again, with the affinities of the published selectors; with many tasks
            the affinities take far longer than the run), WIDE, DISTILLED_WIDE (the best of three wide encoders,
            distilled from all three), GROUPING, PAIR, PROPOSAL (groups of tasks with a high feature overlap,
            trained from scratch; the budget includes finding them), SEARCH, HEADS_ALONE (heads on a frozen
            encoder), FULL_FINETUNING (one encoder, of which nothing is frozen), TREE_ENSEMBLES (`label` is the
            method), or OWN (`label` is the address of a function of another package, see `training.own_method`).
        seed: Seed of initial weights, data order and gate noise.
        epochs: Number of epochs; 0 for `train.epochs`.
        budget: The most training in runs of naive MTL, see `train_within`; 0 for `epochs`.
        groups: Groups of a GROUPING, tasks of a PAIR.
        options: Changes of a SEARCH to the search section.
        label: Name of a SEARCH, of TREE_ENSEMBLES or of an OWN method, for its file.
    """

    kind: str
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
        if self.kind == GROUPING:
            stem = f"{self.kind}_{Grouping.of(self.groups).name}"
        elif self.kind == PAIR:
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
        return cls(GROUPING, seed, epochs, budget, grouping.groups)
