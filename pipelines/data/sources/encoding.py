"""Encoding of new data as in earlier shards, so that models trained on either can be evaluated on both.

A tokenizer, the categories of a column, the classes of a label and the units of a value depend on the training
split. Without this module they would differ between the data sets of two days.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dmtg_core.names import listed
from dmtg_core.tasks import Task
from pipelines.data.sources.base import INPUT, Description, Source
from pipelines.data.sources.preprocessed import PreparedSource
from pipelines.errors import UserError

MOST_LABELS = 20  # most labels in a message


def encode_like(source: Source, earlier: Description, where: str) -> Description:
    """Make a reader encode its input as in earlier shards, and return its new description.

    Tasks of both keep the units of the earlier shards; tasks of the reader alone keep their own units.

    Args:
        source: A reader whose samples have not been read yet.
        earlier: Description of the earlier shards.
        where: Address of the earlier shards, for a message.

    Raises:
        UserError: When the input or a task differs.
    """
    if isinstance(source, PreparedSource) and earlier.preparation:
        source.prepare_as(earlier.input, earlier.preparation)
    found = source.describe()
    if found.columns[INPUT] != earlier.columns[INPUT] or dict(found.preparation) != dict(earlier.preparation):
        raise UserError(
            f"the input is {found.input.kind} of shape {found.input.shape}, the earlier shards have "
            f"{earlier.input.kind} of shape {earlier.input.shape}",
            where=f"data.like={where}",
            remedy="make both equal with source.options, or remove data.like",
            wrong_use=True,
        )
    known = {task.name: task for task in earlier.tasks}
    tasks = tuple(_in_its_units(task, known.get(task.name), where) for task in found.tasks)
    return replace(found, input=earlier.input, tasks=tasks)


def _in_its_units(task: Task, earlier: Task | None, where: str) -> Task:
    if earlier is None:
        return task
    for key in ("kind", "labels", "channels"):
        mine, theirs = getattr(task, key), getattr(earlier, key)
        if mine != theirs and not unnamed(task, key, mine, theirs):
            raise UserError(
                f"task {task.name}: {key} {shown(mine, theirs)}, in the earlier shards {shown(theirs, mine)}",
                where=f"data.like={where}",
                remedy="name its classes in source.options.tasks, or give the task another name",
                wrong_use=True,
            )
    return replace(task, offset=earlier.offset, scale=earlier.scale, labels=earlier.labels)


def unnamed(task: Task, key: str, mine: Any, theirs: Any) -> bool:
    """Whether a field differs only because one of two flags has no names of its values, as in older shards."""
    return task.kind == "binary" and key == "labels" and not (mine and theirs)


def shown(value: Any, other: Any) -> str:
    """The value of a field that differs between two tasks; of many labels, only those that the other lacks."""
    if not isinstance(value, tuple) or len(value) <= MOST_LABELS:
        return repr(value)
    lacking = frozenset(value) - frozenset(other)
    own = [label for label in value if label in lacking]
    return f"{len(value)} names" + (f" with {listed(own)}" if own else "")
