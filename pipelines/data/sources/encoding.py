"""New data encoded as earlier shards are, so that models trained on either can be asked about both.

A tokenizer, the categories of a column, the classes of a label and the units of a value are learnt from the
training split. Learnt anew every night they would differ every night.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dmtg_core.names import listed
from dmtg_core.tasks import Task
from pipelines.data.sources.base import INPUT, Description, Source
from pipelines.data.sources.preprocessed import PreparedSource
from pipelines.errors import UserError

MOST_LABELS = 20  # in a message


def encode_like(source: Source, earlier: Description, where: str) -> Description:
    """Let a reader make its input as earlier shards have it; what its rows then hold.

    Tasks that both have keep the units of the earlier shards; tasks that only the reader has are its own.

    Args:
        source: A reader whose samples have not been read yet.
        earlier: What the earlier shards hold.
        where: Where they are, for a message.

    Raises:
        UserError: When the input or a task is another one.
    """
    if isinstance(source, PreparedSource) and earlier.preparation:
        source.prepare_as(earlier.input, earlier.preparation)
    found = source.describe()
    if found.columns[INPUT] != earlier.columns[INPUT] or dict(found.preparation) != dict(earlier.preparation):
        raise UserError(
            f"the input is {found.input.kind} of shape {found.input.shape}, the earlier shards have "
            f"{earlier.input.kind} of shape {earlier.input.shape}",
            where=f"data.like={where}",
            remedy="make it the same with source.options, or leave data.like out",
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
        if mine != theirs:
            raise UserError(
                f"task {task.name}: {key} {shown(mine, theirs)}, in the earlier shards {shown(theirs, mine)}",
                where=f"data.like={where}",
                remedy="name its classes in source.options.tasks, or give the task another name",
                wrong_use=True,
            )
    return replace(task, offset=earlier.offset, scale=earlier.scale)


def shown(value: Any, other: Any) -> str:
    """A field of a task that differs from the same one's elsewhere; of many labels those that the other lacks."""
    if not isinstance(value, tuple) or len(value) <= MOST_LABELS:
        return repr(value)
    lacking = frozenset(value) - frozenset(other)
    own = [label for label in value if label in lacking]
    return f"{len(value)} names" + (f" with {listed(own)}" if own else "")
