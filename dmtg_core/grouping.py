"""A partition of tasks into groups."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dmtg_core.names import quoted


@dataclass(frozen=True)
class Grouping:
    """A partition of tasks into groups.

    Groups are ordered by their first task, so that equal partitions are equal objects. Empty groups are dropped.
    Use `Grouping.of` to build a grouping.
    """

    tasks: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, groups: Iterable[Iterable[str]], tasks: Sequence[str] | None = None) -> Grouping:
        """Build the partition from `groups`.

        Args:
            groups: Task names, each in exactly one group.
            tasks: All tasks in their order. The default is the order of appearance.

        Raises:
            ValueError: If a task is in two groups, in no group, or unknown.
        """
        members = [tuple(group) for group in groups]
        flat = [name for group in members for name in group]
        order = tuple(tasks) if tasks is not None else tuple(flat)
        twice = sorted({name for names in (flat, order) for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"each task belongs to one group, got {', '.join(twice)} in several")
        if set(flat) != set(order):
            missing, unknown = sorted(set(order) - set(flat)), sorted(set(flat) - set(order))
            raise ValueError(f"groups must cover the tasks: without a group {missing}, unknown {unknown}")
        position = {name: i for i, name in enumerate(order)}
        ordered = [tuple(sorted(group, key=position.__getitem__)) for group in members if group]
        return cls(order, tuple(sorted(ordered, key=lambda group: position[group[0]])))

    @classmethod
    def from_assignment(cls, tasks: Sequence[str], assignment: Sequence[int]) -> Grouping:
        """Build the partition with `tasks[i]` in group number `assignment[i]`.

        Raises:
            ValueError: If the lengths differ.
        """
        if len(tasks) != len(assignment):
            raise ValueError(f"expected an assignment of {len(tasks)} tasks, got {len(assignment)}")
        return cls.of(
            [[t for t, a in zip(tasks, assignment, strict=True) if a == g] for g in sorted(set(assignment))], tasks
        )

    @classmethod
    def from_dict(cls, groups: Mapping[str, Sequence[str]], tasks: Sequence[str] | None = None) -> Grouping:
        """The inverse of `to_dict`."""
        return cls.of(groups.values(), tasks)

    @classmethod
    def from_json(cls, text: str) -> Grouping:
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls.from_dict(values["groups"], values["tasks"])

    def to_dict(self) -> dict[str, list[str]]:
        """Return `{"group_0": [...], …}`."""
        return {f"group_{i}": list(group) for i, group in enumerate(self.groups)}

    def to_json(self) -> str:
        """Return indented JSON with the tasks in order, the groups and the name."""
        values = {"name": self.name, "tasks": list(self.tasks), "groups": self.to_dict()}
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    @property
    def assignment(self) -> list[int]:
        """Group number of each task, in the order of `tasks`."""
        group_of = {name: i for i, group in enumerate(self.groups) for name in group}
        return [group_of[name] for name in self.tasks]

    @property
    def name(self) -> str:
        """Short name of the partition. It does not depend on the order of the tasks."""
        canonical = sorted(sorted(group) for group in self.groups)
        digest = hashlib.sha256(json.dumps(canonical).encode()).hexdigest()
        return f"g{len(self.groups)}-{digest[:8]}"

    def __str__(self) -> str:
        return " | ".join(", ".join(map(quoted, group)) for group in self.groups)

    def adjusted_rand_index(self, other: Grouping) -> float:
        """Return the agreement of two partitions of the same tasks: 1 if equal, 0 on average by chance.

        Hubert and Arabie, "Comparing partitions", 1985, equation 5.

        Raises:
            ValueError: If the tasks differ.
        """
        if set(self.tasks) != set(other.tasks):
            raise ValueError(f"cannot compare groupings of different tasks: {self.tasks} and {other.tasks}")
        mine = [set(group) for group in self.groups]
        theirs = [set(group) for group in other.groups]
        together = sum(math.comb(len(a & b), 2) for a in mine for b in theirs)
        rows, columns = (sum(math.comb(len(g), 2) for g in groups) for groups in (mine, theirs))
        pairs = math.comb(len(self.tasks), 2)
        expected = rows * columns / pairs if pairs else 0.0
        largest = (rows + columns) / 2
        # both are trivial (one group, or a group for each task), and equal
        return 1.0 if largest == expected else (together - expected) / (largest - expected)

    def moved(self, other: Grouping) -> list[str]:
        """Return the tasks that are in another group in `other`, in the order of `tasks`.

        Groups of the two partitions are paired by their number of common tasks, the largest first. A task has
        moved if its two groups are not a pair. Tasks of only one partition are omitted.
        """
        pairs = [
            (len(set(a) & set(b)), i, j) for i, a in enumerate(self.groups) for j, b in enumerate(other.groups)
        ]
        partner: dict[int, int] = {}
        for overlap, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
            if overlap and i not in partner and j not in partner.values():
                partner[i] = j
        there = dict(zip(other.tasks, other.assignment, strict=True))
        here = zip(self.tasks, self.assignment, strict=True)
        return [name for name, group in here if name in there and partner.get(group) != there[name]]

    def among(self, tasks: Iterable[str]) -> Grouping:
        """Return the partition restricted to `tasks`. Unknown tasks are ignored."""
        kept = set(tasks)
        return Grouping.of(
            [[name for name in group if name in kept] for group in self.groups],
            [name for name in self.tasks if name in kept],
        )
