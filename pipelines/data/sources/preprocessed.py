"""Base of the readers of tables and texts: rows with labels, and a preparation that creates the input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from dmtg_core.input_spec import InputSpec
from dmtg_core.names import listed
from dmtg_core.tasks import Task
from pipelines.data.preprocessing import Preparation, for_plain_cells, load_preparation
from pipelines.data.sources.base import INPUT, BadSampleError, Column, Description, Entry
from pipelines.data.sources.rows import Row
from pipelines.errors import UserError


class RowTarget(Protocol):
    """A task, and the conversion of rows to stored values."""

    @property
    def task(self) -> Task:
        """The task."""
        ...

    @property
    def stored(self) -> Column:
        """Storage of the value."""
        ...

    def value(self, row: Row) -> np.ndarray | None:
        """The stored value; None if it is missing."""
        ...


class PreparedSource(ABC):
    """A reader of rows. Subclasses implement the first three properties.

    A pickled reader carries the values that `read` needs. It does not carry the rows: a worker receives its rows
    with their entries.
    """

    @property
    @abstractmethod
    def _entries(self) -> Iterable[Entry]:
        """All samples, for several passes; `fields["row"]` is the `Row` with the cells that are needed."""

    @property
    @abstractmethod
    def _targets(self) -> Sequence[RowTarget]:
        """The tasks, in order."""

    @property
    @abstractmethod
    def _input(self) -> tuple[InputSpec, Mapping[str, Any]]:
        """The stored input and the preparation that creates it, from the training split."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_entries", "_prepared")}

    @property
    def _remarks(self) -> Sequence[str]:
        """Notes about the input, once it has been read."""
        return ()

    def prepare_as(self, spec: InputSpec, preparation: Mapping[str, Any]) -> None:
        """Use the preparation of other shards in place of one from the training split.

        Raises:
            UserError: When the rows lack a column of the preparation.
        """
        needed, held = load_preparation(preparation).columns, next(iter(self._entries)).fields["row"].cells
        missing = [name for name in needed if name not in held]
        if missing:
            raise UserError(
                f"no column {listed(missing)}, which is an input of the earlier shards",
                where="data.like",
                remedy="add it to the table and to source.options.features, or remove data.like",
            )
        vars(self)["_input"] = (spec, preparation)

    def describe(self) -> Description:
        """The input and one number for each task. Reads all rows, for classes and statistics."""
        spec, preparation = self._input
        columns = {INPUT: Column(spec.dtype, spec.shape)}
        columns |= {f"task.{target.task.name}": target.stored for target in self._targets}
        notes = (*(getattr(target, "note", "") for target in self._targets), *self._remarks)
        tasks = tuple(target.task for target in self._targets)
        return Description(spec, tasks, columns, preparation, tuple(filter(None, notes)))

    def entries(self) -> Iterator[Entry]:
        """One sample for each row that is not dropped, in the order of the file.

        Raises:
            UserError: For a table that cannot be read, a missing column, an empty id, an unknown split.
        """
        return iter(self._entries)

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
        return load_preparation(for_plain_cells(self._input[1]))


def train_cells(entries: Iterable[Entry], column: str) -> Iterator[str]:
    """The cells of a column in the training split."""
    return (entry.fields["row"].cells[column] for entry in entries if entry.split == "train")
