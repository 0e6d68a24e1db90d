"""Selection of networks under a budget, and of groups from affinities.

`select` is the exact selection of networks for few tasks. A candidate is a network of some tasks with a loss for
each of them. Each task uses the selected candidate with its lowest loss, so the tasks of candidates may overlap.
The sum of these losses over tasks is minimised, with a total cost of at most a budget (Standley et al. 2020,
section 3). "At most K groups" is the special case in which each candidate costs 1.

`best_partition` selects groups from pairwise affinities. It is exact for few tasks and a beam search for many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_TASKS = 14  # 3^14 splits of a set of tasks take seconds, 3^16 take minutes
EXACT_PARTITION = 12  # tasks up to which the best partition is exact
BEAM = 32  # width of the beam search

Value = Callable[[Sequence[int]], float]  # members of a group → its value


@dataclass(frozen=True)
class Candidate:
    """A network that can be selected.

    Args:
        losses: Task → loss, for the tasks of the network. Lower is better. The sign is arbitrary.
        cost: Cost as an integer of at least 1. If there are half-size networks, a full-size one costs 2.

    Raises:
        ValueError: If there is no task, if a loss is not finite, or if the cost is below 1.
    """

    losses: Mapping[str, float]
    cost: int = 1

    def __post_init__(self) -> None:
        if not self.losses:
            raise ValueError("a candidate needs at least one task, got none")
        wrong = {task: loss for task, loss in self.losses.items() if not math.isfinite(loss)}
        if wrong or self.cost < 1:
            raise ValueError(f"a candidate needs finite losses and a cost of at least 1, got {wrong or self.cost}")


@dataclass(frozen=True)
class Selection:
    """The selected candidates.

    Args:
        chosen: Indices of the selected candidates, ascending.
        serves: Task → index of its candidate.
        loss: Sum of the losses over tasks.
    """

    chosen: tuple[int, ...]
    serves: Mapping[str, int]
    loss: float


def select(candidates: Sequence[Candidate], budget: int) -> Selection:
    """Select the candidates with the lowest sum of losses.

    The algorithm is dynamic programming over sets of tasks. The best selection for a set is one network for the
    subset with the first task, and the best selection for the other tasks with the rest of the budget. It takes
    3^N · budget steps for N tasks. Among equal selections the cheapest is returned.

    Args:
        candidates: The candidates. The tasks are those of any candidate.
        budget: Largest total cost.

    Raises:
        ValueError: If there are more than `MOST_TASKS` tasks, or if no selection within the budget has all tasks.
    """
    tasks = list(dict.fromkeys(task for one in candidates for task in one.losses))
    if not 1 <= len(tasks) <= MOST_TASKS:
        raise ValueError(f"the exact selection is for 1 to {MOST_TASKS} tasks, got {len(tasks)}")
    everything = (1 << len(tasks)) - 1
    part = _cheapest_parts(candidates, tasks)
    # best[set][b]: the lowest sum for a set at a cost of at most b; begins: its first subset and candidate
    best: list[list[float]] = [[0.0] * (budget + 1)]
    begins: list[list[tuple[int, int]]] = [[(0, -1)] * (budget + 1)]
    for whole in range(1, everything + 1):
        sums, how = [math.inf] * (budget + 1), [(0, -1)] * (budget + 1)
        first = whole & -whole
        for taken in _subsets(whole):
            if not taken & first:
                continue
            for cost, (loss, place) in part[taken].items():
                rest = best[whole ^ taken]
                for spent in range(cost, budget + 1):
                    if loss + rest[spent - cost] < sums[spent]:
                        sums[spent], how[spent] = loss + rest[spent - cost], (taken, place)
        best.append(sums)
        begins.append(how)
    if math.isinf(best[everything][budget]):
        raise ValueError(
            f"no selection of candidates with a total cost of {budget} serves all of {', '.join(tasks)}"
        )
    least = next(b for b in range(budget + 1) if best[everything][b] <= best[everything][budget])
    return _read_back(begins, best[everything][budget], least, tasks, candidates)


def _cheapest_parts(candidates: Sequence[Candidate], tasks: Sequence[str]) -> list[dict[int, tuple[float, int]]]:
    """For each set of tasks and each cost: the lowest sum of a single candidate, and its index."""
    bit = {task: 1 << i for i, task in enumerate(tasks)}
    part: list[dict[int, tuple[float, int]]] = [{} for _ in range(1 << len(tasks))]
    for place, one in enumerate(candidates):
        loss_of = {bit[task]: loss for task, loss in one.losses.items()}
        for taken in _subsets(sum(loss_of)):
            loss = math.fsum(loss_of[1 << i] for i in range(len(tasks)) if taken >> i & 1)
            if loss < part[taken].get(one.cost, (math.inf, -1))[0]:
                part[taken][one.cost] = (loss, place)
    return part


def _subsets(whole: int) -> Iterator[int]:
    """Iterate over the non-empty subsets of a set that is encoded in bits."""
    taken = whole
    while taken:
        yield taken
        taken = (taken - 1) & whole


def _read_back(
    begins: Sequence[Sequence[tuple[int, int]]],
    loss: float,
    spent: int,
    tasks: Sequence[str],
    candidates: Sequence[Candidate],
) -> Selection:
    serves: dict[str, int] = {}
    left = len(begins) - 1
    while left:
        taken, place = begins[left][spent]
        serves |= {task: place for i, task in enumerate(tasks) if taken >> i & 1}
        left, spent = left ^ taken, spent - candidates[place].cost
    return Selection(tuple(sorted(set(serves.values()))), {task: serves[task] for task in tasks}, loss)


def best_partition(affinity: Tensor, groups: int, *, exact: bool | None = None) -> list[int]:
    """Compute the partition with the highest sum of affinities.

    The value of a task j in a group G is the mean of `affinity[i, j]` over the other members i of G, or
    `affinity[j, j]` if it is alone. The sum over all tasks is maximised (Standley et al. 2020, section 4, and
    Fifty et al. 2021, section 4, with disjoint groups).

    Args:
        affinity: `(N, N)`. `[i, j]` is the effect of i on j. Higher is better.
        groups: Largest number of groups, 1 to N.
        exact: Search all partitions by dynamic programming over sets of tasks. The default is True for up to
            `EXACT_PARTITION` tasks. Otherwise tasks are added one by one to the `BEAM` best partitions, and then
            moved one at a time while the sum increases.

    Returns:
        The group of each task, numbered in the order of their first tasks.

    Raises:
        ValueError: If the matrix is not square or not finite, if the number of groups is out of range, or if there
            are more than `MOST_TASKS` tasks with `exact`.
    """
    count = affinity.shape[0]
    if affinity.shape != (count, count) or not bool(torch.isfinite(affinity).all()):
        raise ValueError(f"an affinity is a square matrix of finite numbers, got shape {tuple(affinity.shape)}")
    if not 1 <= groups <= count:
        raise ValueError(f"{count} tasks can form 1 to {count} groups, got {groups}")
    if exact and count > MOST_TASKS:
        raise ValueError(f"the exact selection is for 1 to {MOST_TASKS} tasks, got {count}")
    worth: list[list[float]] = affinity.double().tolist()
    return partition_of(lambda members: group_worth(worth, members), worth, groups, exact=exact)


def partition_of(
    value: Value, worth: Sequence[Sequence[float]], groups: int, *, exact: bool | None = None
) -> list[int]:
    """Partition the tasks into groups with the highest sum of values; see `best_partition`.

    Args:
        value: Value of a group, given its members.
        worth: Pairwise affinities, by which a search orders the tasks.
        groups: Largest number of groups.
        exact: As for `best_partition`.
    """
    count = len(worth)
    if count <= EXACT_PARTITION if exact is None else exact:
        parts = _exact_parts(value, count, groups)
    else:
        parts = _searched_parts(value, worth, groups)
    number = {n: k for k, part in enumerate(sorted(parts, key=min)) for n in part}
    return [number[n] for n in range(count)]


def group_worth(worth: Sequence[Sequence[float]], members: Sequence[int]) -> float:
    """Compute the value of one group in `best_partition`."""
    if len(members) == 1:
        return worth[members[0]][members[0]]
    return math.fsum(worth[i][j] for j in members for i in members if i != j) / (len(members) - 1)


def _exact_parts(value_of: Value, count: int, groups: int) -> list[list[int]]:
    members = [[n for n in range(count) if mask >> n & 1] for mask in range(1 << count)]
    value = [0.0] + [value_of(part) for part in members[1:]]
    # best[mask]: the highest sum for these tasks with the groups so far; begins[k][mask]: the first group of it
    best, begins = value, [list(range(1 << count))]
    for _ in range(groups - 1):
        more, how = list(best), list(begins[-1])
        for whole in range(1, 1 << count):
            first = whole & -whole
            for taken in _subsets(whole):
                if taken & first and (sums := value[taken] + best[whole ^ taken]) > more[whole]:
                    more[whole], how[whole] = sums, taken
        best = more
        begins.append(how)
    parts, left = [], (1 << count) - 1
    for how in reversed(begins):
        if left:
            parts.append(members[how[left]])
            left ^= how[left]
    return parts


def _searched_parts(value_of: Value, worth: Sequence[Sequence[float]], groups: int) -> list[list[int]]:
    count = len(worth)
    # tasks with the highest affinities first, so that the cores of groups exist before other tasks are added
    order = sorted(
        range(count), key=lambda n: -max(worth[n][m] + worth[m][n] for m in range(count) if m != n or count == 1)
    )
    kept: list[tuple[float, list[list[int]]]] = [(0.0, [])]
    for n in order:
        found: dict[tuple[tuple[int, ...], ...], tuple[float, list[list[int]]]] = {}
        for value, parts in kept:
            for k, part in enumerate([*parts, []] if len(parts) < groups else parts):
                grown = [*part, n]
                sums = value + value_of(grown) - (value_of(part) if part else 0.0)
                whole = [*parts[:k], grown, *parts[k + 1 :]]
                found[tuple(sorted(tuple(sorted(p)) for p in whole))] = (sums, whole)
        kept = sorted(found.values(), key=lambda one: -one[0])[:BEAM]
    return _moved_parts(value_of, kept[0][1], groups)


def _moved_parts(value_of: Value, parts: list[list[int]], groups: int) -> list[list[int]]:
    """Move single tasks to the group with the largest increase of the sum, until no move increases it."""
    assignment = {n: k for k, part in enumerate(parts) for n in part}
    held = [list(part) for part in parts] + [[] for _ in range(groups - len(parts))]
    moved = True
    while moved:
        moved = False
        for n in sorted(assignment):
            home = assignment[n]
            rest = [m for m in held[home] if m != n]
            leaves = (value_of(rest) if rest else 0.0) - value_of(held[home])
            gains = [leaves + value_of([*part, n]) - (value_of(part) if part else 0.0) for part in held]
            gains[home] = 0.0
            to = max(range(groups), key=gains.__getitem__)
            if gains[to] > 1e-12:
                held[home], held[to], assignment[n], moved = rest, [*held[to], n], to, True
    return [part for part in held if part]
