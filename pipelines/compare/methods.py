"""What `dmtg compare` compares: each method as the cells that it needs, and what follows from their results."""

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

from dmtg_core.grouping import Grouping
from dmtg_core.search.feature_overlap import cluster
from dmtg_core.search.selection import best_partition
from pipelines.compare.cells import AFFINITIES, DISTILLED_WIDE, NAIVE, PAIR, SEARCH, WIDE, Cell, Result
from pipelines.config.loading import Config

EXHAUSTIVE_TASKS = 6  # six tasks have 122 partitions into three groups, eight have 1,094
Found = Mapping[Cell, Result]


def random_groupings(tasks: Sequence[str], groups: int, rng: np.random.Generator) -> Iterator[Grouping]:
    """Random partitions without end, into groups of equal size or sizes that differ by one."""
    even = [n % groups for n in range(len(tasks))]
    while True:
        yield Grouping.from_assignment(tasks, rng.permutation(even).tolist())


@dataclass(frozen=True)
class Contest:
    """What is compared on what.

    Args:
        config: The configuration.
        tasks: Names of the tasks.
    """

    config: Config
    tasks: tuple[str, ...]

    @property
    def groups(self) -> int:
        """The most groups."""
        return min(self.config.network.groups, len(self.tasks))

    def draws(self, seed: int) -> list[Grouping]:
        """Random partitions of a seed, see `random_groupings`."""
        rng = np.random.default_rng([seed, len(self.tasks), self.groups])
        return list(islice(random_groupings(self.tasks, self.groups, rng), self.config.compare.random_draws))

    def partitions(self) -> list[Grouping]:
        """All partitions into at most K groups."""
        found: list[list[int]] = [[0]]
        for _ in self.tasks[1:]:
            found = [[*one, k] for one in found for k in range(min(max(one) + 2, self.groups))]
        return [Grouping.from_assignment(self.tasks, one) for one in found]


# method → the cells of a seed; the second form needs results of the first ones
First = Callable[[Contest, int], list[Cell]]
Second = Callable[[Contest, int, Found], list[Cell]]


def _search(label: str, options: Mapping[str, Any]) -> First:
    return lambda _contest, seed: [Cell(SEARCH, seed, options=tuple(sorted(options.items())), label=label)]


def _singles(contest: Contest, seed: int) -> list[Cell]:
    return [Cell(PAIR, seed, groups=((task,),)) for task in contest.tasks]


def _pairs(contest: Contest, seed: int) -> list[Cell]:
    return _singles(contest, seed) + [Cell(PAIR, seed, groups=(two,)) for two in combinations(contest.tasks, 2)]


def _plain(contest: Contest, seed: int) -> list[Cell]:
    # the guided search can do without an undecided gate, the published one is nothing else
    starts = max(contest.config.search.starts, 1)
    return _search("dmtg", {"method": "dmtg", "starts": starts})(contest, seed)


SELECTED = ("cs", "tag", "etap", "gradtag")  # affinities that are collected beside naive MTL
AFFINITY = "affinity"  # whichever of them is best on validation data
GUIDED, UNDISTILLED = "guided", "undistilled"  # the latter is what it was before it learned on
GUIDED_SEARCH = _search(GUIDED, {"method": "guided"})
FIRST: Mapping[str, First] = {
    "naive_mtl": lambda _contest, seed: [Cell(NAIVE, seed)],
    "single_task": _singles,
    "wide": lambda _contest, seed: [Cell(WIDE, seed)],
    "wide_distilled": lambda _contest, seed: [Cell(DISTILLED_WIDE, seed)],
    "random": lambda contest, seed: [Cell.of(grouping, seed) for grouping in contest.draws(seed)],
    **dict.fromkeys((*SELECTED, AFFINITY), lambda _contest, seed: [Cell(AFFINITIES, seed)]),
    "reading": GUIDED_SEARCH,
    "hoa": _pairs,
    "exhaustive": lambda contest, seed: [Cell.of(grouping, seed) for grouping in contest.partitions()],
    "dmtg": _plain,
    GUIDED: GUIDED_SEARCH,
    UNDISTILLED: GUIDED_SEARCH,
    "retrained": GUIDED_SEARCH,
}


def first_cells(contest: Contest, method: str, seed: int) -> list[Cell]:
    """What a method needs before anything is known."""
    if method in contest.config.compare.variants:
        changes = contest.config.compare.variants[method]
        # the same name with other changes is another cell
        digest = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]
        return _search(f"{method}_{digest}", changes)(contest, seed)
    if method in contest.config.compare.groupings:
        return [Cell.of(Grouping.of(contest.config.compare.groupings[method], contest.tasks), seed)]
    return FIRST[method](contest, seed)


def _chosen(contest: Contest, seed: int, groups: Sequence[int]) -> list[Cell]:
    return [Cell.of(Grouping.from_assignment(contest.tasks, groups), seed)]


def _selected(name: str) -> Second:
    def cells(contest: Contest, seed: int, found: Found) -> list[Cell]:
        affinity = torch.tensor(found[Cell(AFFINITIES, seed)]["affinities"][name])
        return _chosen(contest, seed, best_partition(affinity, contest.groups))

    return cells


def _any_selected(contest: Contest, seed: int, found: Found) -> list[Cell]:
    asked = (name for name in contest.config.compare.methods if name in SELECTED)
    return [cell for name in asked for cell in SECOND[name](contest, seed, found)]


def _reading(contest: Contest, seed: int, found: Found) -> list[Cell]:
    affinity = torch.tensor(found[_guided(contest, seed)]["affinity"])
    return _chosen(contest, seed, cluster(affinity, contest.groups))


def _guided(contest: Contest, seed: int) -> Cell:
    (cell,) = GUIDED_SEARCH(contest, seed)
    return cell


def _retrained(contest: Contest, seed: int, found: Found) -> list[Cell]:
    """The grouping of the best gated candidate of the guided search, from scratch."""
    result = found[_guided(contest, seed)]
    gated = [one for one in result["candidates"] if one["probabilities"] and len(one["probabilities"][0]) > 1]
    best = min(gated, key=lambda one: (one["final"] is None, one["final"] or 0.0, one["score"]))
    return [Cell.of(Grouping.from_dict(best["grouping"], contest.tasks), seed)]


def _hoa(contest: Contest, seed: int, found: Found) -> list[Cell]:
    return _chosen(contest, seed, best_partition(pair_affinity(contest, seed, found), contest.groups))


def pair_affinity(contest: Contest, seed: int, found: Found) -> torch.Tensor:
    """HOA's table (Standley et al. 2020, section 4): `[i, j]` is what j gains from being trained with i.

    It is the negative validation loss of j in the network of the pair, relative to that of j alone.
    """
    loss = {}
    for cell in _pairs(contest, seed):
        for task, metrics in found[cell]["metrics"]["val"].items():
            loss[frozenset(cell.groups[0]), task] = metrics["loss"]
    count = len(contest.tasks)
    affinity = torch.zeros(count, count, dtype=torch.float64)
    for i, a in enumerate(contest.tasks):
        for j, b in enumerate(contest.tasks):
            affinity[i, j] = -loss[frozenset((a, b)), b] / max(abs(loss[frozenset((b,)), b]), 1e-12)
    return affinity


def _best(contest: Contest, seed: int, found: Found) -> list[Cell]:
    return [min((Cell.of(one, seed) for one in contest.partitions()), key=lambda cell: found[cell]["score"])]


SECOND: Mapping[str, Second] = {
    **{name: _selected(name) for name in SELECTED},
    AFFINITY: _any_selected,
    "reading": _reading,
    "hoa": _hoa,
    "exhaustive": _best,
    "retrained": _retrained,
}


def second_cells(contest: Contest, method: str, seed: int, found: Found) -> list[Cell]:
    """The networks that a method comes to with what its first cells found."""
    if method in SECOND:
        return SECOND[method](contest, seed, found)
    return first_cells(contest, method, seed)


LONG = "_long"  # the same, trained for as many epochs as the guided search costs
LONGER: Mapping[str, tuple[str, ...]] = {  # where one of these is among the methods
    "wide": ("wide",),
    "random": ("random",),
    AFFINITY: SELECTED,
    "retrained": ("retrained",),
}


def last_cells(contest: Contest, method: str, seed: int, found: Found) -> list[Cell]:
    """The networks that stand for a method in the end."""
    if not method.endswith(LONG):
        return second_cells(contest, method, seed, found)
    own, *others = second_cells(contest, method.removesuffix(LONG), seed, found)
    if method == f"{AFFINITY}{LONG}":
        own = min((own, *others), key=lambda cell: found[cell]["score"])
    times = found[_guided(contest, seed)]["cost"] / found[own]["cost"]
    return [replace(own, epochs=max(round(contest.config.train.epochs * times), 1))]


def entries(contest: Contest, method: str, seed: int, found: Found) -> list[Result]:
    """What a method came to with a seed: several for draws, else one, each with its whole training cost."""
    results = [found[cell] for cell in last_cells(contest, method, seed, found)]
    if method == "single_task":
        return [_merged(contest, results)]
    if method == UNDISTILLED:
        return [_undistilled(result) for result in results]
    spent = _spent_before(contest, method, seed, found)
    return [result | {"cost": result["cost"] + spent} for result in results]


def _undistilled(result: Result) -> Result:
    before = result["distilled"]
    if not before:
        return result
    kept = {"score": before["score"], "metrics": before["metrics"], "cost": result["cost"] - before["cost"]}
    return result | kept


def _merged(contest: Contest, results: Sequence[Result]) -> Result:
    splits = results[0]["metrics"]
    return {
        "grouping": {f"group_{i}": [task] for i, task in enumerate(contest.tasks)},
        "score": sum(result["score"] for result in results) / len(results),
        "metrics": {
            split: {task: m for result in results for task, m in result["metrics"][split].items()}
            for split in splits
        },
        **{key: sum(result[key] for result in results) for key in ("cost", "flops", "parameters", "seconds")},
    }


def _spent_before(contest: Contest, method: str, seed: int, found: Found) -> float:
    """What it cost to come to the grouping, beside training it."""
    if method in SELECTED:
        looked = found[Cell(AFFINITIES, seed)]
        return float(looked["cost"] + looked["affinity_costs"][method])
    if method == "hoa":
        return math.fsum(found[cell]["cost"] for cell in _pairs(contest, seed))
    if method == "exhaustive":
        others = {Cell.of(one, seed) for one in contest.partitions()} - set(_best(contest, seed, found))
        return math.fsum(found[cell]["cost"] for cell in others)
    if method == "retrained":
        return float(found[_guided(contest, seed)]["cost"])
    if method == "reading":
        return float(found[_guided(contest, seed)]["affinity_cost"])
    return 0.0
