"""Which networks to train, given what each would give: the exact choice, for few tasks.

A candidate is a network of some tasks with a loss for each of them. Of the candidates that are chosen a task
takes the one that serves it best, so candidates may overlap. What is minimised is the sum over tasks of these
losses, at a total cost of at most a budget (Standley et al. 2020, section 3). "At most K groups" is the special
case in which every candidate costs 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

MOST_TASKS = 14  # 3^14 ways to split a set of tasks in two are seconds, 3^16 are minutes


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
    tasks = sorted({task for one in candidates for task in one.losses})
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
