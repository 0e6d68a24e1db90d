"""The columns of a file of predictions, for `pandas.read_parquet`.

| task | columns |
|---|---|
| all | `id`, as in the shards |
| binary | `<task>`: name of the more likely value; `<task>.<positive>`: probability of class 1, the second of |
|  | `labels`. Without names, for 0 and 1, only `<task>`: probability of class 1 |
| multiclass | `<task>`: name of the most likely class, or its id if classes have no names; |
|  | `<task>.<class>`: probability of each; with more than `MOST_SHARES` only `<task>.probability`, the highest |
| regression | `<task>`: value in the task's unit; `<task>.<channel>` if there are several |
| dense | `<task>`: the pixels' raw bytes, class ids or values; `_predictions.json` has their dtype and shape |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dmtg_core.tasks import MOST_SHARES, Task
from pipelines.errors import UserError

ID = "id"


def schema(tasks: Sequence[Task], name: str = ID, *, numbered: bool = False) -> pa.Schema:
    """Columns of a file of predictions.

    Args:
        tasks: The tasks.
        name: Name of the column of ids.
        numbered: Whether the ids are numbers of rows.
    """
    fields = [pa.field(name, pa.int64() if numbered else pa.string())]
    for task in tasks:
        fields += [pa.field(name, kind) for name, kind in columns_of(task).items()]
    return pa.schema(fields)


def check_names(tasks: Iterable[Task], name: str, model: str) -> None:
    """Check that all columns have different names.

    Args:
        tasks: The tasks.
        name: Column of the ids.
        model: Address of the model, for the message.

    Raises:
        UserError: With the names that occur twice.
    """
    counted = Counter([name, *(column for task in tasks for column in columns_of(task))])
    twice = [column for column, count in counted.items() if count > 1]
    if twice:
        raise UserError(
            f"two columns of predictions would be called {', '.join(twice)}",
            where=model,
            remedy="predict with the models of single groups, or train with other names of tasks",
        )


def columns_of(task: Task) -> dict[str, pa.DataType]:
    """Names and types of a task's columns; see the module's docstring."""
    if task.dense:
        return {task.name: pa.binary()}
    if task.kind == "multiclass":
        names: Sequence[Any] = task.labels or range(task.channels)
        if task.channels > MOST_SHARES:  # Parquet with more columns is slow and large
            names = ("probability",)
        kind = pa.string() if task.labels else pa.int32()
        return {task.name: kind} | {f"{task.name}.{name}": pa.float32() for name in names}
    if task.shares:
        return {task.name: pa.string()} | {f"{task.name}.{name}": pa.float32() for _, name in task.shares}
    if task.channels > 1:
        return {f"{task.name}.{channel}": pa.float32() for channel in range(task.channels)}
    return {task.name: pa.float32()}


def arrays_of(task: Task, decoded: np.ndarray) -> list[pa.Array]:
    """A task's predictions as the columns of `columns_of`.

    Args:
        task: The task.
        decoded: Result of `Task.decode`, `(B, …)`.
    """
    if task.dense:
        pixels = decoded.astype(dense_dtype(task))
        return [pa.array([pixel.tobytes() for pixel in pixels], pa.binary())]
    if task.kind == "multiclass":
        ids = decoded.argmax(1)
        names = pa.array([task.labels[i] for i in ids]) if task.labels else pa.array(ids, pa.int32())
        shares = decoded.max(1, keepdims=True) if task.channels > MOST_SHARES else decoded
        return [names, *(pa.array(column, pa.float32()) for column in shares.T)]
    if task.shares:
        words = pa.array([task.labels[int(share > 0.5)] for share in decoded], pa.string())
        return [words, *(pa.array(share, pa.float32()) for share in task.named_shares(decoded).values())]
    columns = decoded.T if decoded.ndim > 1 else [decoded]
    return [pa.array(column, pa.float32()) for column in columns]


def dense_dtype(task: Task) -> np.dtype[Any]:
    """Type of a pixel's value, little-endian: the narrowest for all class ids, or float32."""
    kind = np.min_scalar_type(task.channels - 1) if task.classes else np.dtype(np.float32)
    return kind.newbyteorder("<")


def described(tasks: Mapping[str, tuple[Task, str]], shape: Sequence[int]) -> dict[str, Any]:
    """Task → description of its columns, and its group.

    Args:
        tasks: Task name → task and group.
        shape: Shape of a stored input; pixels of a dense task have the same height and width.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, (task, group) in tasks.items():
        names = list(columns_of(task))
        entry: dict[str, Any] = {"group": group, "kind": task.kind, "columns": names, "unit": task.unit}
        if task.classes or task.labels:
            entry["labels"] = list(task.labels)
        if task.dense:
            deep = [] if task.classes or task.channels == 1 else [task.channels]
            entry |= {"dtype": dense_dtype(task).name, "shape": [*shape[:2], *deep]}
        found[name] = entry
    return found
