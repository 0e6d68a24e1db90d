"""Which networks to train, given what each would give.

`select` is the exact choice among networks, for few tasks. A candidate is a network of some tasks with a loss
for each of them. Of the candidates that are chosen a task takes the one that serves it best, so they may overlap.
What is minimised is the sum over tasks of these losses, at a total cost of at most a budget (Standley et al. 2020,
section 3). "At most K groups" is the special case in which every candidate costs 1.

`best_partition` is the choice of groups by what every two tasks are worth to each other, for any number of tasks:
exact for few, a beam search for many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_TASKS = 14  # 3^14 ways to split a set of tasks in two are seconds, 3^16 are minutes
EXACT_PARTITION = 12  # tasks up to which a partition is chosen exactly
BEAM = 32  # partitions that the search among many tasks keeps


@dataclass(frozen=True)
class Candidate:
    """A network that can be chosen.

    Args:
        losses: Of each task that it serves; lower is better, any sign.
        cost: In whole units, at least 1. Where half-size networks are among them, a full one costs 2.

    Raises:
        ValueError: Without a task, with a loss that is not finite, or a cost below 1.
    """

    losses: Mapping[str, float]
    cost: int = 1

    def __post_init__(self) -> None:
        if not self.losses:
            raise ValueError("a candidate without tasks")
        wrong = {task: loss for task, loss in self.losses.items() if not math.isfinite(loss)}
        if wrong or self.cost < 1:
            raise ValueError(f"a candidate needs finite losses and a cost of at least 1, got {wrong or self.cost}")


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Args:
        chosen: Places of the chosen candidates, ascending.
        serves: Task → place of the candidate that it takes.
        loss: Sum over tasks.
    """

    chosen: tuple[int, ...]
    serves: Mapping[str, int]
    loss: float


def select(candidates: Sequence[Candidate], budget: int) -> Selection:
    """The choice with the lowest sum of losses.

    Dynamic programming over sets of tasks: the best way to serve a set is one network for the part that holds its
    first task, and the best way to serve the rest at what is left of the budget. It takes 3^N · budget steps for N
    tasks. Of equal choices the cheaper one is taken.

    Args:
        candidates: Every task is one that any of them serves.
        budget: Most that the chosen ones may cost together.

    Raises:
        ValueError: For more than `MOST_TASKS` tasks, or when no choice within the budget serves all of them.
    """
    tasks = list(dict.fromkeys(task for one in candidates for task in one.losses))
    if not 1 <= len(tasks) <= MOST_TASKS:
        raise ValueError(f"the exact choice is for 1 to {MOST_TASKS} tasks, got {len(tasks)}")
    everything = (1 << len(tasks)) - 1
    part = _cheapest_parts(candidates, tasks)
    # state: the best sum with which a set is served at a cost of at most b, and the part and place that begin it
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
        raise ValueError(f"no choice of candidates with a total cost of {budget} serves all of {', '.join(tasks)}")
    least = next(b for b in range(budget + 1) if best[everything][b] <= best[everything][budget])
    return _read_back(begins, best[everything][budget], least, tasks, candidates)


def _cheapest_parts(candidates: Sequence[Candidate], tasks: Sequence[str]) -> list[dict[int, tuple[float, int]]]:
    """For every set of tasks and every cost: the lowest sum that one candidate gives it, and its place."""
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
    """All subsets but the empty one of a set written in bits."""
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
    """Groups in which tasks are worth most to each other.

    A task j in a group G scores the mean of `affinity[i, j]` over the other members i of G, alone in its group
    `affinity[j, j]`; the sum over all tasks is maximised (Standley et al. 2020, section 4, and Fifty et al. 2021,
    section 4, with the groups disjoint).

    Args:
        affinity: `(N, N)`, `[i, j]` what i does for j; higher is better.
        groups: How many groups, at most; 1 to N.
        exact: Try all partitions, by dynamic programming over sets of tasks; by default up to `EXACT_PARTITION`
            tasks. Else tasks are added one by one to the `BEAM` best partitions so far, and then moved one at a
            time as long as that helps.

    Returns:
        The group of each task, numbered in the order of their first tasks.

    Raises:
        ValueError: For no square matrix, a value that is not finite, a number of groups out of range, or more than
            `MOST_TASKS` tasks where the choice is to be exact.
    """
    count = affinity.shape[0]
    if affinity.shape != (count, count) or not bool(torch.isfinite(affinity).all()):
        raise ValueError(f"an affinity is a square matrix of finite numbers, got shape {tuple(affinity.shape)}")
    if not 1 <= groups <= count:
        raise ValueError(f"{count} tasks make 1 to {count} groups, got {groups}")
    if exact and count > MOST_TASKS:
        raise ValueError(f"the exact choice is for 1 to {MOST_TASKS} tasks, got {count}")
    worth: list[list[float]] = affinity.double().tolist()
    chosen = _exact_parts if (count <= EXACT_PARTITION if exact is None else exact) else _searched_parts
    parts = chosen(worth, groups)
    number = {n: k for k, part in enumerate(sorted(parts, key=min)) for n in part}
    return [number[n] for n in range(count)]


def group_worth(worth: Sequence[Sequence[float]], members: Sequence[int]) -> float:
    """What `best_partition` sums for one group."""
    if len(members) == 1:
        return worth[members[0]][members[0]]
    return math.fsum(worth[i][j] for j in members for i in members if i != j) / (len(members) - 1)


def _exact_parts(worth: Sequence[Sequence[float]], groups: int) -> list[list[int]]:
    count = len(worth)
    members = [[n for n in range(count) if mask >> n & 1] for mask in range(1 << count)]
    value = [0.0] + [group_worth(worth, part) for part in members[1:]]
    # best[mask]: the highest sum for these tasks in the groups so far, begins[k][mask]: the group that begins it
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


def _searched_parts(worth: Sequence[Sequence[float]], groups: int) -> list[list[int]]:
    count = len(worth)
    # those first that are worth most to somebody, so that cores of groups are there before the rest has to choose
    order = sorted(
        range(count), key=lambda n: -max(worth[n][m] + worth[m][n] for m in range(count) if m != n or count == 1)
    )
    kept: list[tuple[float, list[list[int]]]] = [(0.0, [])]
    for n in order:
        found: dict[tuple[tuple[int, ...], ...], tuple[float, list[list[int]]]] = {}
        for value, parts in kept:
            for k, part in enumerate([*parts, []] if len(parts) < groups else parts):
                grown = [*part, n]
                sums = value + group_worth(worth, grown) - (group_worth(worth, part) if part else 0.0)
                whole = [*parts[:k], grown, *parts[k + 1 :]]
                found[tuple(sorted(tuple(sorted(p)) for p in whole))] = (sums, whole)
        kept = sorted(found.values(), key=lambda one: -one[0])[:BEAM]
    return _moved_parts(worth, kept[0][1], groups)


def _moved_parts(worth: Sequence[Sequence[float]], parts: list[list[int]], groups: int) -> list[list[int]]:
    """One task after another goes where the sum rises most, until none does."""
    assignment = {n: k for k, part in enumerate(parts) for n in part}
    held = [list(part) for part in parts] + [[] for _ in range(groups - len(parts))]
    moved = True
    while moved:
        moved = False
        for n in sorted(assignment):
            home = assignment[n]
            rest = [m for m in held[home] if m != n]
            leaves = (group_worth(worth, rest) if rest else 0.0) - group_worth(worth, held[home])
            gains = [
                leaves + group_worth(worth, [*part, n]) - (group_worth(worth, part) if part else 0.0)
                for part in held
            ]
            gains[home] = 0.0
            to = max(range(groups), key=gains.__getitem__)
            if gains[to] > 1e-12:
                held[home], held[to], assignment[n], moved = rest, [*held[to], n], to, True
    return [part for part in held if part]
