"""The methods of `dmtg compare`: the cells that each method needs, and its results from those of its cells."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from typing import Any

import numpy as np
import torch

from dmtg_core.evaluation.trees import TREES
from dmtg_core.grouping import Grouping
from dmtg_core.search.feature_overlap import cluster
from dmtg_core.search.selection import best_partition
from pipelines.compare.cells import (
    AFFINITIES,
    DISTILLED_WIDE,
    FULL_FINETUNING,
    HEADS_ALONE,
    NAIVE,
    PAIR,
    SEARCH,
    TREE_ENSEMBLES,
    WIDE,
    Cell,
    Result,
)
from pipelines.config.loading import Config

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

    def random_partitions(self, seed: int) -> list[Grouping]:
        """The random partitions of a seed; see `random_groupings`."""
        rng = np.random.default_rng([seed, len(self.tasks), self.groups])
        return list(islice(random_groupings(self.tasks, self.groups, rng), self.config.compare.random_draws))

    def partitions(self) -> list[Grouping]:
        """All partitions into at most K groups."""
        found: list[list[int]] = [[0]]
        for _ in self.tasks[1:]:
            found = [[*one, k] for one in found for k in range(min(max(one) + 2, self.groups))]
        return [Grouping.from_assignment(self.tasks, one) for one in found]


# from a comparison and a seed to cells; the second form needs the results of the first one
First = Callable[[Comparison, int], list[Cell]]
Second = Callable[[Comparison, int, Found], list[Cell]]


def _search(label: str, options: Mapping[str, Any]) -> First:
    return lambda _comparison, seed: [Cell(SEARCH, seed, options=tuple(sorted(options.items())), label=label)]


def _trees(method: str) -> First:
    return lambda _comparison, seed: [Cell(TREE_ENSEMBLES, seed, label=method)]


def _singles(comparison: Comparison, seed: int) -> list[Cell]:
    return [Cell(PAIR, seed, groups=((task,),)) for task in comparison.tasks]


def _pairs(comparison: Comparison, seed: int) -> list[Cell]:
    return _singles(comparison, seed) + [
        Cell(PAIR, seed, groups=(two,)) for two in combinations(comparison.tasks, 2)
    ]


def _published(comparison: Comparison, seed: int) -> list[Cell]:
    # the guided search can run without a uniform gate, the published search consists of uniform gates
    starts = max(comparison.config.search.starts, 1)
    return _search("dmtg", {"method": "dmtg", "starts": starts})(comparison, seed)


SELECTED = ("cs", "tag", "etap", "gradtag")  # affinities that are collected in a run of naive MTL
AFFINITY = "affinity"  # the one of SELECTED with the best validation score
FEATURE_OVERLAP = "feature_overlap"
GUIDED, UNDISTILLED = "guided", "undistilled"  # the latter is the guided search before its distillation
GUIDED_SEARCH = _search(GUIDED, {"method": "guided"})
FIRST: Mapping[str, First] = {
    "naive_mtl": lambda _comparison, seed: [Cell(NAIVE, seed)],
    "single_task": _singles,
    "wide": lambda _comparison, seed: [Cell(WIDE, seed)],
    "wide_distilled": lambda _comparison, seed: [Cell(DISTILLED_WIDE, seed)],
    "random": lambda comparison, seed: [
        Cell.of(grouping, seed) for grouping in comparison.random_partitions(seed)
    ],
    **dict.fromkeys((*SELECTED, AFFINITY), lambda _comparison, seed: [Cell(AFFINITIES, seed)]),
    FEATURE_OVERLAP: GUIDED_SEARCH,
    "hoa": _pairs,
    "exhaustive": lambda comparison, seed: [Cell.of(grouping, seed) for grouping in comparison.partitions()],
    "dmtg": _published,
    GUIDED: GUIDED_SEARCH,
    UNDISTILLED: GUIDED_SEARCH,
    "retrained": GUIDED_SEARCH,
    HEADS_ALONE: lambda _comparison, seed: [Cell(HEADS_ALONE, seed)],
    FULL_FINETUNING: lambda _comparison, seed: [Cell(FULL_FINETUNING, seed)],
    **{method: _trees(method) for method in TREES},
}


def first_cells(comparison: Comparison, method: str, seed: int) -> list[Cell]:
    """The cells of a method that need no other results."""
    if method in comparison.config.compare.variants:
        changes = comparison.config.compare.variants[method]
        # a variant with the same name and other changes is another cell
        digest = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]
        return _search(f"{method}_{digest}", changes)(comparison, seed)
    if method in comparison.config.compare.groupings:
        return [Cell.of(Grouping.of(comparison.config.compare.groupings[method], comparison.tasks), seed)]
    return FIRST[method](comparison, seed)


def _grouping_cells(comparison: Comparison, seed: int, groups: Sequence[int]) -> list[Cell]:
    return [Cell.of(Grouping.from_assignment(comparison.tasks, groups), seed)]


def _selected(name: str) -> Second:
    def cells(comparison: Comparison, seed: int, found: Found) -> list[Cell]:
        affinity = torch.tensor(found[Cell(AFFINITIES, seed)]["affinities"][name])
        return _grouping_cells(comparison, seed, best_partition(affinity, comparison.groups))

    return cells


def _any_selected(comparison: Comparison, seed: int, found: Found) -> list[Cell]:
    names = (name for name in comparison.config.compare.methods if name in SELECTED)
    return [cell for name in names for cell in SECOND[name](comparison, seed, found)]


def _feature_overlap(comparison: Comparison, seed: int, found: Found) -> list[Cell]:
    affinity = torch.tensor(found[_guided(comparison, seed)]["affinity"])
    return _grouping_cells(comparison, seed, cluster(affinity, comparison.groups))


def _guided(comparison: Comparison, seed: int) -> Cell:
    (cell,) = GUIDED_SEARCH(comparison, seed)
    return cell


def _retrained(comparison: Comparison, seed: int, found: Found) -> list[Cell]:
    """The cell that trains the groups of the best gate of the guided search from scratch."""
    result = found[_guided(comparison, seed)]
    gated = [one for one in result["candidates"] if one["probabilities"] and len(one["probabilities"][0]) > 1]
    best = min(gated, key=lambda one: (one["final"] is None, one["final"] or 0.0, one["score"]))
    return [Cell.of(Grouping.from_dict(best["grouping"], comparison.tasks), seed)]


def _hoa(comparison: Comparison, seed: int, found: Found) -> list[Cell]:
    return _grouping_cells(
        comparison, seed, best_partition(pair_affinity(comparison, seed, found), comparison.groups)
    )


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


def _best(comparison: Comparison, seed: int, found: Found) -> list[Cell]:
    return [min((Cell.of(one, seed) for one in comparison.partitions()), key=lambda cell: found[cell]["score"])]


SECOND: Mapping[str, Second] = {
    **{name: _selected(name) for name in SELECTED},
    AFFINITY: _any_selected,
    FEATURE_OVERLAP: _feature_overlap,
    "hoa": _hoa,
    "exhaustive": _best,
    "retrained": _retrained,
}


def second_cells(comparison: Comparison, method: str, seed: int, found: Found) -> list[Cell]:
    """The cells of a method, given the results of its first cells."""
    if method in SECOND:
        return SECOND[method](comparison, seed, found)
    return first_cells(comparison, method, seed)


LONG = "_long"  # suffix of a method that is trained for as many epochs as the guided search costs
LONGER: Mapping[str, tuple[str, ...]] = {  # each applies if one of its values is among the methods
    "wide": ("wide",),
    "random": ("random",),
    AFFINITY: SELECTED,
    "retrained": ("retrained",),
}


def last_cells(comparison: Comparison, method: str, seed: int, found: Found) -> list[Cell]:
    """The cells whose results are those of the method."""
    if not method.endswith(LONG):
        return second_cells(comparison, method, seed, found)
    own, *others = second_cells(comparison, method.removesuffix(LONG), seed, found)
    if method == f"{AFFINITY}{LONG}":
        own = min((own, *others), key=lambda cell: found[cell]["score"])
    factor = found[_guided(comparison, seed)]["cost"] / found[own]["cost"]
    return [replace(own, epochs=max(round(comparison.config.train.epochs * factor), 1))]


def results_of(comparison: Comparison, method: str, seed: int, found: Found) -> list[Result]:
    """The results of a method with a seed, each with its whole training cost: several for `random`, else one."""
    results = [found[cell] for cell in last_cells(comparison, method, seed, found)]
    if method == "single_task":
        return [_merged(comparison, results)]
    if method == UNDISTILLED:
        return [_undistilled(result) for result in results]
    before = _cost_of_grouping(comparison, method, seed, found)
    return [result | {"cost": result["cost"] + before} for result in results]


def _undistilled(result: Result) -> Result:
    before = result["distilled"]  # the figures before distillation, and the cost of the distillation
    if not before:
        return result
    figures = {"score": before["score"], "metrics": before["metrics"], "cost": result["cost"] - before["cost"]}
    return result | figures


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


def _cost_of_grouping(comparison: Comparison, method: str, seed: int, found: Found) -> float:
    """Training cost of a method before its own network is trained, in runs of naive MTL."""
    if method in SELECTED:
        naive = found[Cell(AFFINITIES, seed)]
        return float(naive["cost"] + naive["affinity_costs"][method])
    if method == "hoa":
        return math.fsum(found[cell]["cost"] for cell in _pairs(comparison, seed))
    if method == "exhaustive":
        others = {Cell.of(one, seed) for one in comparison.partitions()} - set(_best(comparison, seed, found))
        return math.fsum(found[cell]["cost"] for cell in others)
    if method == "retrained":
        return float(found[_guided(comparison, seed)]["cost"])
    if method == FEATURE_OVERLAP:
        return float(found[_guided(comparison, seed)]["affinity_cost"])
    return 0.0
