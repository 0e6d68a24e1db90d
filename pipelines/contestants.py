"""What `dmtg compare` compares: each method as the cells that it needs, and what follows from their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch

from dmtg_core.affinity import cluster
from dmtg_core.grouping import Grouping
from dmtg_core.selection import best_partition
from pipelines.cells import NAIVE, PAIR, SEARCH, WIDE, Cell, Result
from pipelines.config import Config

EXHAUSTIVE_TASKS = 6  # six tasks have 122 partitions into three groups, eight have 1,094
Found = Mapping[Cell, Result]


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
        """Random partitions of a seed into groups of equal size, or sizes that differ by one."""
        rng = np.random.default_rng([seed, len(self.tasks), self.groups])
        even = [n % self.groups for n in range(len(self.tasks))]
        return [
            Grouping.from_assignment(self.tasks, rng.permutation(even).tolist())
            for _ in range(self.config.compare.random_draws)
        ]

    def partitions(self) -> list[Grouping]:
        """All partitions into at most K groups."""
        found: list[list[int]] = [[0]]
        for _ in self.tasks[1:]:
            found = [[*one, k] for one in found for k in range(min(max(one) + 2, self.groups))]
        return [Grouping.from_assignment(self.tasks, one) for one in found]


# method → the cells of a seed; the second form needs results of the first ones
First = Callable[[Contest, int], list[Cell]]
Second = Callable[[Contest, int, Found], list[Cell]]


def _search(label: str, **options: Any) -> First:
    return lambda _contest, seed: [Cell(SEARCH, seed, options=tuple(sorted(options.items())), label=label)]


def _naive(_contest: Contest, seed: int) -> list[Cell]:
    return [Cell(NAIVE, seed)]


def _singles(contest: Contest, seed: int) -> list[Cell]:
    return [Cell(PAIR, seed, groups=((task,),)) for task in contest.tasks]


def _pairs(contest: Contest, seed: int) -> list[Cell]:
    return _singles(contest, seed) + [Cell(PAIR, seed, groups=(two,)) for two in combinations(contest.tasks, 2)]


FIRST: Mapping[str, First] = {
    "naive_mtl": _naive,
    "single_task": _singles,
    "wide": lambda _contest, seed: [Cell(WIDE, seed)],
    "random": lambda contest, seed: [Cell.of(grouping, seed) for grouping in contest.draws(seed)],
    "cs": _naive,
    "tag": _naive,
    "etap": _naive,
    "gradtag": _naive,
    "reading": _search("guided", method="guided"),
    "hoa": _pairs,
    "exhaustive": lambda contest, seed: [Cell.of(grouping, seed) for grouping in contest.partitions()],
    "dmtg": _search("dmtg", method="dmtg"),
    "guided": _search("guided", method="guided"),
    "retrained": _search("guided", method="guided"),
}
GUIDED = "guided"


def first_cells(contest: Contest, method: str, seed: int) -> list[Cell]:
    """What a method needs before anything is known."""
    if method in contest.config.compare.variants:
        return _search(method, **contest.config.compare.variants[method])(contest, seed)
    if method in contest.config.compare.groupings:
        return [Cell.of(Grouping.of(contest.config.compare.groupings[method], contest.tasks), seed)]
    return FIRST[method](contest, seed)


def _selected(name: str) -> Second:
    def cells(contest: Contest, seed: int, found: Found) -> list[Cell]:
        affinity = torch.tensor(found[Cell(NAIVE, seed)]["affinities"][name])
        return [Cell.of(Grouping.from_assignment(contest.tasks, best_partition(affinity, contest.groups)), seed)]

    return cells


def _reading(contest: Contest, seed: int, found: Found) -> list[Cell]:
    affinity = torch.tensor(found[_guided(contest, seed)]["affinity"])
    return [Cell.of(Grouping.from_assignment(contest.tasks, cluster(affinity, contest.groups)), seed)]


def _guided(contest: Contest, seed: int) -> Cell:
    (cell,) = FIRST[GUIDED](contest, seed)
    return cell


def _retrained(contest: Contest, seed: int, found: Found) -> list[Cell]:
    """The grouping of the best gated candidate of the guided search, from scratch."""
    result = found[_guided(contest, seed)]
    gated = [one for one in result["candidates"] if one["probabilities"] and len(one["probabilities"][0]) > 1]
    best = min(gated, key=lambda one: (one["final"] is None, one["final"] or 0.0, one["score"]))
    return [Cell.of(Grouping.from_dict(best["grouping"], contest.tasks), seed)]


def _hoa(contest: Contest, seed: int, found: Found) -> list[Cell]:
    return [
        Cell.of(Grouping.from_assignment(contest.tasks, best_partition(pair_affinity(contest, seed, found),
                                                                       contest.groups)), seed)
    ]  # fmt: skip


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
    "cs": _selected("cs"),
    "tag": _selected("tag"),
    "etap": _selected("etap"),
    "gradtag": _selected("gradtag"),
    "reading": _reading,
    "hoa": _hoa,
    "exhaustive": _best,
    "retrained": _retrained,
}
LONG = "_long"  # the same, trained for as many epochs as the guided search costs


def second_cells(contest: Contest, method: str, seed: int, found: Found) -> list[Cell]:
    """The networks that stand for a method in the end."""
    if method.endswith(LONG):
        own = first_cells(contest, method.removesuffix(LONG), seed)[:1]
        times = found[_guided(contest, seed)]["cost"] / found[own[0]]["cost"]
        epochs = max(round(contest.config.train.epochs * times), 1)
        return [replace(cell, epochs=epochs) for cell in own]
    if method in SECOND:
        return SECOND[method](contest, seed, found)
    return first_cells(contest, method, seed)


def entries(contest: Contest, method: str, seed: int, found: Found) -> list[Result]:
    """What a method came to with a seed: several for draws, else one, each with its whole training cost."""
    results = [found[cell] for cell in second_cells(contest, method, seed, found)]
    if method == "single_task":
        return [_merged(contest, results)]
    return [result | {"cost": result["cost"] + spent} for result, spent in
            zip(results, _spent_before(contest, method, seed, found, len(results)), strict=True)]  # fmt: skip


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


def _spent_before(contest: Contest, method: str, seed: int, found: Found, count: int) -> Iterator[float]:
    """What it cost to come to the grouping, beside training it."""
    spent = 0.0
    if method in ("cs", "tag", "etap", "gradtag"):
        naive = found[Cell(NAIVE, seed)]
        spent = naive["cost"] + naive["affinity_costs"][method]
    elif method == "hoa":
        spent = sum(found[cell]["cost"] for cell in _pairs(contest, seed))
    elif method == "exhaustive":
        others = {Cell.of(one, seed) for one in contest.partitions()} - set(_best(contest, seed, found))
        spent = sum(found[cell]["cost"] for cell in others)
    elif method == "retrained":
        spent = found[_guided(contest, seed)]["cost"]
    elif method == "reading":
        spent = found[_guided(contest, seed)]["affinity_cost"]
    return iter([spent] * count)
