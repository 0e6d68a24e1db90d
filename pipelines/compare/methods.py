"""The methods of `dmtg compare`: the cells that each method needs, and its results from those of its cells."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

import numpy as np
import torch

from dmtg_core.addresses import is_address
from dmtg_core.evaluation.jackknife import difference_of
from dmtg_core.evaluation.trees import TREES
from dmtg_core.grouping import Grouping
from dmtg_core.search.budget import default_budget
from dmtg_core.search.group_gains import GroupGains, TrainedGroup
from dmtg_core.search.options import BASELINE
from dmtg_core.search.search import is_better
from dmtg_core.search.selection import best_partition, partition_of
from pipelines.compare.cells import LEAST_RUNS, Cell, Kind, Result
from pipelines.config.loading import Config

MARK = "@"  # between method and budget in the name of a row
EXHAUSTIVE_TASKS = 6  # six tasks have 122 partitions into three groups, eight have 1,094
Found = Mapping[Cell, Result]


def random_groupings(tasks: Sequence[str], groups: int, rng: np.random.Generator) -> Iterator[Grouping]:
    """Yield random partitions without end. The sizes of their groups differ by one at most."""
    even = [n % groups for n in range(len(tasks))]
    while True:
        yield Grouping.from_assignment(tasks, rng.permutation(even).tolist())


@dataclass(frozen=True)
class Comparison:
    """Configuration and tasks of a comparison.

    Args:
        config: Configuration.
        tasks: Names of the tasks.
    """

    config: Config
    tasks: tuple[str, ...]

    @property
    def groups(self) -> int:
        """Largest number of groups."""
        return min(self.config.network.groups, len(self.tasks))

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budgets in runs of naive MTL, in ascending order: `compare.budgets`, or that of the search."""
        own = self.config.search_options().budget or default_budget(self.config.network.groups)
        return self.config.compare.budgets or (own,)

    def has_budget(self, method: str) -> bool:
        """Whether a method spends a budget. Others have a training of their own length."""
        if method in self.config.compare.variants:
            changes = self.config.compare.variants[method]
            return changes.get("method", self.config.search.method) != "dmtg"
        return method not in FIXED

    def random_partitions(self, seed: int) -> list[Grouping]:
        """The random partitions of a seed; see `random_groupings`."""
        rng = np.random.default_rng([seed, len(self.tasks), self.groups])
        return list(islice(random_groupings(self.tasks, self.groups, rng), self.config.compare.random_draws))

    def random_sets(self, seed: int, count: int) -> list[tuple[str, ...]]:
        """At most `count` different random groups of any size below N; more of them begin with the same ones."""
        rng, found = np.random.default_rng([seed, len(self.tasks), 1]), dict[tuple[str, ...], None]()
        for _ in range(100 * count):
            if len(found) == count:
                break
            chosen = rng.permutation(len(self.tasks))[: rng.integers(1, max(len(self.tasks), 2))]
            found[tuple(self.tasks[n] for n in sorted(chosen))] = None
        return list(found)

    def partitions(self) -> list[Grouping]:
        """All partitions into at most K groups."""
        found: list[list[int]] = [[0]]
        for _ in self.tasks[1:]:
            found = [[*one, k] for one in found for k in range(min(max(one) + 2, self.groups))]
        return [Grouping.from_assignment(self.tasks, one) for one in found]


# from a comparison, a seed and a budget to cells; the second form needs the results of the first one
First = Callable[[Comparison, int, float], list[Cell]]
Second = Callable[[Comparison, int, float, Found], list[Cell]]


def _kind(kind: Kind) -> First:
    return lambda _comparison, seed, budget: [Cell(kind, seed, budget=budget)]


def _search(label: str, options: Mapping[str, Any]) -> First:
    changes = tuple(sorted(options.items()))
    return lambda _comparison, seed, budget: [Cell(Kind.SEARCH, seed, budget=budget, options=changes, label=label)]


def _trees(method: str) -> First:
    return lambda _comparison, seed, _budget: [Cell(Kind.TREE_ENSEMBLES, seed, label=method)]


def _singles(comparison: Comparison, seed: int, _budget: float = 0.0) -> list[Cell]:
    return [Cell(Kind.PAIR, seed, groups=((task,),)) for task in comparison.tasks]


def _pairs(comparison: Comparison, seed: int, _budget: float = 0.0) -> list[Cell]:
    return _singles(comparison, seed) + [
        Cell(Kind.PAIR, seed, groups=(two,)) for two in combinations(comparison.tasks, 2)
    ]


def _all_partitions(comparison: Comparison, seed: int, _budget: float = 0.0) -> list[Cell]:
    return [Cell.of(grouping, seed) for grouping in comparison.partitions()]


def _published(comparison: Comparison, seed: int, _budget: float) -> list[Cell]:
    # the guided search can run without a uniform gate, the published search consists of uniform gates
    starts = max(comparison.config.search.starts, 1)
    return _search("dmtg", {"method": "dmtg", "starts": starts})(comparison, seed, 0.0)


def _random(comparison: Comparison, seed: int, budget: float) -> list[Cell]:
    return [Cell.of(grouping, seed, budget=budget) for grouping in comparison.random_partitions(seed)]


def _affinities(_comparison: Comparison, seed: int, _budget: float) -> list[Cell]:
    return [Cell(Kind.AFFINITIES, seed)]


def _trained_groups(comparison: Comparison, seed: int, budget: float) -> list[Cell]:
    """The groups from which `ETAP_FULL` predicts all others: as many as half of the budget can train."""
    sets = comparison.random_sets(seed, max(int(budget / 2), 2))
    return [Cell(Kind.PAIR, seed, groups=(members,)) for members in sets]


NAIVE, LONGER_NAIVE, SINGLE, WIDE, DISTILLED_WIDE, RANDOM = (
    "naive_mtl", "naive_longer", "single_task", "wide", "wide_distilled", "random"
)  # fmt: skip
GUIDED, FEATURE_OVERLAP, ETAP_FULL, EXHAUSTIVE = "guided", "feature_overlap", "etap_full", "exhaustive"
HEADS_ALONE, FULL_FINETUNING = "heads_alone", "full_finetuning"
SELECTED = ("cs", "tag", "etap", "gradtag")  # affinities that are collected in a run of naive MTL
# methods with a training of their own length
FIXED: Mapping[str, First] = {
    NAIVE: lambda _comparison, seed, _budget: [Cell(Kind.NAIVE, seed)],
    SINGLE: _singles,
    "hoa": _pairs,
    EXHAUSTIVE: _all_partitions,
    "dmtg": _published,
    **{method: _trees(method) for method in TREES},
}
# methods that spend a budget
BUDGETED: Mapping[str, First] = {
    LONGER_NAIVE: _kind(Kind.NAIVE),
    WIDE: _kind(Kind.WIDE),
    DISTILLED_WIDE: _kind(Kind.DISTILLED_WIDE),
    RANDOM: _random,
    **dict.fromkeys(SELECTED, _affinities),
    ETAP_FULL: lambda comparison, seed, budget: [
        Cell(Kind.AFFINITIES, seed),
        *_trained_groups(comparison, seed, budget),
    ],
    FEATURE_OVERLAP: _kind(Kind.PROPOSAL),
    GUIDED: _search(GUIDED, {"method": "guided"}),
    HEADS_ALONE: _kind(Kind.HEADS_ALONE),
    FULL_FINETUNING: _kind(Kind.FULL_FINETUNING),
}


def rows_of(comparison: Comparison, methods: Sequence[str]) -> dict[str, tuple[str, float]]:
    """Name of a row → its method and budget; budget 0 for a training of its own length.

    With several budgets the name has the budget: `wide@8`.
    """
    budgets, found = comparison.budgets, dict[str, tuple[str, float]]()
    for method in methods:
        if not comparison.has_budget(method):
            found[method] = (method, 0.0)
        elif len(budgets) == 1:
            found[method] = (method, budgets[0])
        else:
            found |= {f"{method}{MARK}{budget:g}": (method, budget) for budget in budgets}
    return found


def first_cells(comparison: Comparison, method: str, budget: float, seed: int) -> list[Cell]:
    """The cells of a method that need no other results."""
    if method in comparison.config.compare.variants:
        changes = comparison.config.compare.variants[method]
        # a variant with the same name and other changes is another cell
        digest = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]
        return _search(f"{method}_{digest}", changes)(comparison, seed, budget)
    if method in comparison.config.compare.groupings:
        groups = Grouping.of(comparison.config.compare.groupings[method], comparison.tasks)
        return [Cell.of(groups, seed, budget=budget)]
    if is_address(method):
        return [Cell(Kind.OWN, seed, budget=budget, label=method)]
    return {**FIXED, **BUDGETED}[method](comparison, seed, budget)


def _grouping_cells(comparison: Comparison, seed: int, budget: float, groups: Sequence[int]) -> list[Cell]:
    return [Cell.of(Grouping.from_assignment(comparison.tasks, groups), seed, budget=budget)]


def _selected(name: str) -> Second:
    def cells(comparison: Comparison, seed: int, budget: float, found: Found) -> list[Cell]:
        affinity = torch.tensor(found[Cell(Kind.AFFINITIES, seed)]["affinities"][name])
        left = _left(comparison, name, seed, budget, found)
        return _grouping_cells(comparison, seed, left, best_partition(affinity, comparison.groups))

    return cells


def _left(comparison: Comparison, method: str, seed: int, budget: float, found: Found) -> float:
    """The budget for the network of a method after its grouping was found."""
    left = max(budget - _cost_of_grouping(comparison, method, seed, budget, found), LEAST_RUNS)
    return math.floor(1000 * left) / 1000  # a short name of the cell


def _etap_full(comparison: Comparison, seed: int, budget: float, found: Found) -> list[Cell]:
    naive = found[Cell(Kind.AFFINITIES, seed)]
    affinity = torch.tensor(naive["affinities"]["etap"])
    everything = TrainedGroup(dict.fromkeys(range(len(comparison.tasks)), 0.0))  # gains are those over naive MTL
    trained = [
        _trained_group(comparison, found[cell], naive) for cell in _trained_groups(comparison, seed, budget)
    ]
    gains = GroupGains(affinity, [everything, *trained])
    groups = partition_of(gains.worth, affinity.double().tolist(), comparison.groups)
    return _grouping_cells(comparison, seed, _left(comparison, ETAP_FULL, seed, budget, found), groups)


def _trained_group(comparison: Comparison, result: Result, naive: Result) -> TrainedGroup:
    losses, before = (
        {task: max(values["loss"], 1e-12) for task, values in one["metrics"]["val"].items()}
        for one in (result, naive)
    )
    number = {task: n for n, task in enumerate(comparison.tasks)}
    return TrainedGroup({number[task]: 1 - loss / before[task] for task, loss in losses.items()})


def _hoa(comparison: Comparison, seed: int, _budget: float, found: Found) -> list[Cell]:
    affinity = pair_affinity(comparison, seed, found)
    return _grouping_cells(comparison, seed, 0.0, best_partition(affinity, comparison.groups))


def pair_affinity(comparison: Comparison, seed: int, found: Found) -> torch.Tensor:
    """The affinities of HOA (Standley et al. 2020, section 4): `[i, j]` is the gain of j from training with i.

    `[i, j]` is the negative validation loss of j in the network of the pair, divided by that of j alone.
    """
    loss = {}
    for cell in _pairs(comparison, seed):
        for task, metrics in found[cell]["metrics"]["val"].items():
            loss[frozenset(cell.groups[0]), task] = metrics["loss"]
    count = len(comparison.tasks)
    affinity = torch.zeros(count, count, dtype=torch.float64)
    for i, a in enumerate(comparison.tasks):
        for j, b in enumerate(comparison.tasks):
            affinity[i, j] = -loss[frozenset((a, b)), b] / max(abs(loss[frozenset((b,)), b]), 1e-12)
    return affinity


def _best(comparison: Comparison, seed: int, _budget: float, found: Found) -> list[Cell]:
    return [min(_all_partitions(comparison, seed), key=lambda cell: found[cell]["score"])]


SECOND: Mapping[str, Second] = {
    **{name: _selected(name) for name in SELECTED},
    ETAP_FULL: _etap_full,
    "hoa": _hoa,
    EXHAUSTIVE: _best,
}


def second_cells(comparison: Comparison, method: str, budget: float, seed: int, found: Found) -> list[Cell]:
    """The cells whose results are those of a method, given the results of its first cells."""
    if method in SECOND:
        return SECOND[method](comparison, seed, budget, found)
    return first_cells(comparison, method, budget, seed)


def results_of(comparison: Comparison, method: str, budget: float, seed: int, found: Found) -> list[Result]:
    """The results of a method with a seed, each with its whole training cost: several for `random`, else one."""
    cells = second_cells(comparison, method, budget, seed, found)
    results = [found[cell] for cell in cells]
    if method == SINGLE:
        return [_merged(comparison, results)]
    if cells[0].kind == Kind.SEARCH and method != "dmtg":
        return [_or_naive(result, found[Cell(Kind.NAIVE, seed)]) for result in results]
    before = _cost_of_grouping(comparison, method, seed, budget, found)
    return [result | {"cost": result["cost"] + before} for result in results]


def _or_naive(result: Result, naive: Result) -> Result:
    """Naive MTL with the cost of the search unless the search is better, as for `dmtg train`."""
    difference = difference_of(naive["score_parts"], result["score_parts"])
    if is_better(difference, result["flops"] / naive["flops"]):
        return result
    everything = [[1.0] for _ in result["probabilities"]]
    own = {"cost": result["cost"], "chosen": BASELINE, "distilled": {}, "probabilities": everything}
    return result | naive | own


def _merged(comparison: Comparison, results: Sequence[Result]) -> Result:
    splits = results[0]["metrics"]
    return {
        "grouping": {f"group_{i}": [task] for i, task in enumerate(comparison.tasks)},
        "score": sum(result["score"] for result in results) / len(results),
        "metrics": {
            split: {task: m for result in results for task, m in result["metrics"][split].items()}
            for split in splits
        },
        **{key: sum(result[key] for result in results) for key in ("cost", "flops", "parameters", "seconds")},
    }


def _cost_of_grouping(comparison: Comparison, method: str, seed: int, budget: float, found: Found) -> float:
    """Training cost of a method before its own network is trained, in runs of naive MTL."""
    if method == ETAP_FULL:
        own = math.fsum(found[cell]["cost"] for cell in _trained_groups(comparison, seed, budget))
        return own + _cost_of_grouping(comparison, "etap", seed, budget, found)
    if method in SELECTED:
        naive = found[Cell(Kind.AFFINITIES, seed)]
        return float(naive["cost"] + naive["affinity_costs"][method])
    if method == "hoa":
        return math.fsum(found[cell]["cost"] for cell in _pairs(comparison, seed))
    if method == EXHAUSTIVE:
        others = {*_all_partitions(comparison, seed)} - set(_best(comparison, seed, 0.0, found))
        return math.fsum(found[cell]["cost"] for cell in others)
    return 0.0
