"""The budget of a search: how much training it may use, in runs of naive MTL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dmtg_core.network.cost import flops_of_heads, inference_cost, naive_flops, training_flops
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.training.settings import TrainSettings

OVERLAP_EPOCHS = 0.05  # epochs of an encoder for the feature overlap alone, as a share of those of naive MTL
OVERLAP_SHARE = 1 / 6  # the most of the budget for it
LONGEST = 3  # the most training of the first candidate until its groups are stable, in first rungs
GROUPS_SHARE = 1 / 3  # and as a share of the budget


def default_budget(groups: int) -> float:
    """Return K + 2: the training of all branches, and two runs to compare candidates."""
    return groups + 2.0


class Budget:
    """Costs of trainings in runs of naive MTL: one branch for all tasks, trained for `settings.epochs` epochs.

    Operations of training steps are counted, see `training_flops`. Evaluations are not.

    Args:
        spec: The grouping network.
        settings: Training settings of naive MTL.
        runs: The most training of the search.
    """

    def __init__(self, spec: NetworkSpec, settings: TrainSettings, runs: float) -> None:
        self.runs, self.naive_epochs = runs, settings.epochs
        self.run = naive_flops(spec) * settings.epochs  # operations for each sample of the training split
        self._epochs: dict[tuple[str, str], float] = {}
        self._counted: dict[int, tuple[Sequence[Mapping[str, Any]], int, float]] = {}

    def epoch(self, network: GroupingNetwork) -> float:
        """Return the cost of an epoch with the live heads of a network."""
        return training_flops(network) / self.run

    def epoch_of(self, spec: NetworkSpec) -> float:
        """Return the cost of an epoch with all heads of a network."""
        return self.epoch(GroupingNetwork(spec.without_weights()))

    def overlap_epochs(self, cost: float) -> int:
        """Return the epochs of an encoder for the feature overlap alone; 0 if one, at `cost`, is too costly."""
        return min(max(round(OVERLAP_EPOCHS * self.naive_epochs), 1), int(OVERLAP_SHARE * self.runs / cost))

    def longest(self, epochs: int, cost: float) -> int:
        """Return the most epochs of a candidate until its groups are stable.

        Args:
            epochs: Its epochs in the first rung.
            cost: Cost of an epoch.
        """
        return max(min(LONGEST * epochs, int(GROUPS_SHARE * self.runs / cost)), epochs)

    def first_rung(
        self, costs: Mapping[str, float], compare: float, rung: float, spent: float = 0.0
    ) -> dict[str, int]:
        """Return the epochs of the first rung of each candidate that the budget allows.

        All candidates of a rung have the same cost. If an epoch of one costs less than one of the others, as that
        of a wide adapter of a frozen trunk, it has more epochs. The last candidates are left out first.

        Args:
            costs: Candidate → cost of an epoch.
            compare, rung: See `SearchOptions`. `rung` is that of the candidate whose epochs cost most.
            spent: Runs that have been used before.
        """
        names, limit = list(costs), compare * self.runs - spent
        while len(names) > 1 and len(names) * max(costs[name] for name in names) > limit:
            names.pop()
        share, highest = limit / len(names), max(costs[name] for name in names)
        equal = highest * max(min(round(rung * self.naive_epochs), int(share / highest)), 1)
        return {name: max(min(round(equal / costs[name]), int(share / costs[name])), 1) for name in names}

    def of(self, spec: NetworkSpec, history: Sequence[Mapping[str, Any]]) -> float:
        """Return the cost of the epochs of a history, each with the heads that were live in it.

        It is called after each epoch, so that only the epochs since the last call are counted.
        """
        _, count, total = self._counted.get(id(history), (history, 0, 0.0))
        for record in history[count:]:
            alive = [[p > 0 for p in row] for row in record["probabilities"]]
            key = spec.text, str(alive)
            if key not in self._epochs:
                self._epochs[key] = flops_of_heads(spec, alive) / self.run
            total += self._epochs[key]
        self._counted[id(history)] = (history, len(history), total)  # it is held, so that its id stays its own
        return total

    def teaching(self, teachers: Sequence[GroupingNetwork]) -> float:
        """Return the cost of an epoch of the predictions of teachers."""
        return sum(inference_cost(teacher).flops for teacher in teachers) / self.run

    def epochs(self, cost: float, spent: float) -> int:
        """Return the number of epochs of `cost` each that are left when `spent` runs have been used."""
        return max(int((self.runs - spent) / cost + 1e-9), 0)
