"""What the readers of tables and of texts share: rows with labels, whose input a preparation makes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from dmtg_core.names import listed
from dmtg_core.tasks import InputSpec, Task
from pipelines.data.preprocessing import Preparation, load_preparation
from pipelines.data.sources.base import INPUT, BadSampleError, Column, Description, Entry
from pipelines.data.sources.rows import Row
from pipelines.errors import UserError


class RowTarget(Protocol):
    """A task with the way from a row to its stored value."""

    @property
    def task(self) -> Task:
        """The task."""
        ...

    @property
    def stored(self) -> Column:
        """How the value is stored."""
        ...

    def value(self, row: Row) -> np.ndarray | None:
        """The stored value, None where it is missing."""
        ...


class PreparedSource(ABC):
    """A reader of rows. The first three properties are for the formats to give.

    What `read` needs travels with a pickled reader. The rows do not: a worker gets those that it reads with their
    entries.
    """

    @property
    @abstractmethod
    def _entries(self) -> list[Entry]:
        """All samples; `fields["row"]` is the `Row` with the cells that are needed."""

    @property
    @abstractmethod
    def _targets(self) -> Sequence[RowTarget]:
        """The tasks, in order."""

    @property
    @abstractmethod
    def _input(self) -> tuple[InputSpec, Mapping[str, Any]]:
        """The stored input and the preparation that makes it, learnt from the training split."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_entries", "_prepared")}

    def prepare_as(self, spec: InputSpec, preparation: Mapping[str, Any]) -> None:
        """Take a preparation that other shards were made with instead of learning one.

        Raises:
            UserError: When the rows lack a column that it needs.
        """
        needed, held = load_preparation(preparation).columns, self._entries[0].fields["row"].cells
        missing = [name for name in needed if name not in held]
        if missing:
            raise UserError(
                f"no column {listed(missing)}, which the earlier shards were made from",
                where="data.like",
                remedy="add it to the table and to source.options.features, or leave data.like out",
            )
        vars(self)["_input"] = (spec, preparation)

    def describe(self) -> Description:
        """The input and one number a task. Reads all rows, for classes and statistics."""
        spec, preparation = self._input
        columns = {INPUT: Column(spec.dtype, spec.shape)}
        columns |= {f"task.{target.task.name}": target.stored for target in self._targets}
        return Description(spec, tuple(target.task for target in self._targets), columns, preparation)

    def entries(self) -> list[Entry]:
        """One sample a row that is not dropped, in the order of the file.

        Raises:
            UserError: For a table that cannot be read, a missing column, a duplicate id, an unknown split.
        """
        return self._entries

    def read(self, entry: Entry) -> dict[str, np.ndarray | None]:
        """The input and the labels of one row.

        Raises:
            BadSampleError: For a cell that does not fit its feature or its task.
        """
        row: Row = entry.fields["row"]
        values = {f"task.{target.task.name}": target.value(row) for target in self._targets}
        try:
            return {INPUT: self._prepared.row(row.cells), **values}
        except ValueError as error:
            raise BadSampleError(f"{error}, {row.place}") from error

    @cached_property
    def _prepared(self) -> Preparation:
        return load_preparation(self._input[1])


def train_cells(entries: Sequence[Entry], column: str) -> list[str]:
    """The cells of a column in the training split."""
    return [entry.fields["row"].cells[column] for entry in entries if entry.split == "train"]
