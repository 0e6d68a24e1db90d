"""Label columns as tasks, and the conversion of cells to stored values, for all tables."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from dmtg_core.names import by_number, listed
from dmtg_core.tasks import Task, check_names
from pipelines.config.validation import Section
from pipelines.data.preprocessing import cell_number
from pipelines.data.sources.base import BadSampleError, Column
from pipelines.data.sources.columns import Figures, Samples, different_cells, training_figures
from pipelines.data.sources.rows import Row
from pipelines.errors import UserError

logger = logging.getLogger(__name__)

_YES = ("true", "yes", "1", "1.0")
_NO = ("false", "no", "0", "0.0", "-1", "-1.0")


class LabelTask(Section):
    """One column of a table as a task, or as one task for each class.

    `classes` fixes the names and their order (default: those in the file, sorted, numbers by their size). `drop`
    lists values whose rows are left out. `one_vs_rest` ("all" or a list of classes) creates one binary task
    `<name>.<class>` for each class of a class column, for the kinds binary and multiclass. `positive` lists the
    values that count as 1 for a binary task (default: true, yes, 1 against false, no, 0, -1; any other value is a
    bad sample).
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)  # YAML reads the class names of `[1, 2, 3]` as numbers

    column: str
    kind: Literal["binary", "multiclass", "regression"]
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$")
    classes: tuple[str, ...] | None = Field(None, min_length=1)
    drop: tuple[str, ...] = ()
    one_vs_rest: Literal["all"] | tuple[str, ...] | None = None
    positive: tuple[str, ...] | None = Field(None, min_length=1)
    metric: str = ""
    loss: str = ""

    @model_validator(mode="after")
    def _check_use(self) -> Self:
        """Refuse options that the kind would ignore."""
        of_classes = self.kind == "multiclass" or self.one_vs_rest is not None
        for option, used in (
            ("one_vs_rest", self.kind != "regression"),
            ("classes", of_classes and self.kind != "regression"),
            ("positive", self.kind == "binary" and self.one_vs_rest is None),
        ):
            if getattr(self, option) is not None and not used:
                raise ValueError(f"{option} has no meaning for this {self.kind} task of column {self.column}")
        return self

    @property
    def reads_classes(self) -> bool:
        """Whether the classes are those in the file."""
        return self.classes is None and (self.kind == "multiclass" or self.one_vs_rest is not None)

    @property
    def task_name(self) -> str:
        """`name`, or the name of the column without characters that a metric name cannot have."""
        return self.name or safe_name(self.column)


@dataclass(frozen=True)
class Target:
    """A task, and the conversion of cells to stored values.

    `codes` maps cells to values. Any other cell has the value `otherwise`, or is an error if that is None. A
    regression task has no codes. `note` names outliers.
    """

    column: str
    task: Task
    codes: Mapping[str, int] | None = None
    otherwise: int | None = None
    note: str = ""

    @property
    def stored(self) -> Column:
        """Storage of the value."""
        if self.codes is None:
            return Column("float32")
        highest = self.task.channels - 1
        return Column(next(name for name in ("uint8", "uint16", "int32") if highest <= np.iinfo(name).max))

    def value(self, row: Row) -> np.ndarray | None:
        """The stored value of the cell of a row; None if it is empty.

        Raises:
            BadSampleError: For a cell that is not a label of the task.
        """
        cell = row.cells[self.column]
        if not cell:
            return None
        number = cell_number(cell) if self.codes is None else self.codes.get(cell, self.otherwise)
        if number is None:
            raise BadSampleError(f"{self._complaint(cell)} in column {self.column}, {row.place}")
        return np.asarray(number, self.stored.dtype)

    def _complaint(self, cell: str) -> str:
        if self.codes is None:
            return f"{cell!r} is not a finite number"
        if self.codes == FLAGS:
            return f"{cell!r} is neither yes ({', '.join(_YES)}) nor no ({', '.join(_NO)})"
        return f"a label outside its classes: {cell!r}"


FLAGS: Mapping[str, int] = {
    form: value
    for words, value in ((_YES, 1), (_NO, 0))
    for word in words
    for form in (word, word.capitalize(), word.upper())
}


def kept_rows(
    rows: Iterable[tuple[Row, str]], specs: Sequence[LabelTask], where: str, *, log: bool
) -> Iterator[tuple[Row, str]]:
    """The rows, with their ids, that no task drops; the number of dropped rows is logged at the end.

    Raises:
        UserError: When no row is left.
    """
    every, kept = 0, 0
    dropping = [spec for spec in specs if spec.drop]
    absent = {(spec.column, value) for spec in dropping for value in spec.drop}
    for row, name in rows:
        every += 1
        dropped = {(one.column, row.cells[one.column]) for one in dropping if row.cells[one.column] in one.drop}
        absent -= dropped
        if not dropped:
            kept += 1
            yield row, name
    if not kept:
        raise UserError("every row is left out by `drop`", where=where, remedy="drop fewer values")
    for column, value in sorted(absent) if log else ():
        logger.warning("%s: `drop` names %r, which is no value of column %s", where, value, column)
    if log and kept < every:
        logger.info("%s: %d of %d rows left out by `drop`", where, every - kept, every)


def label_targets(specs: Sequence[LabelTask], samples: Samples, where: str) -> tuple[Target, ...]:
    """The tasks of all label columns, with classes from all rows and statistics from the training rows.

    Args:
        specs: The label columns.
        samples: The rows that are kept, with their splits.
        where: The table, for a message.

    Raises:
        UserError: For an invalid task, and for two tasks with the same name.
    """
    numbers = training_figures(samples, [spec.column for spec in specs if spec.kind == "regression"])
    cells = different_cells(samples, [spec.column for spec in specs if spec.reads_classes])
    try:
        targets = [target for spec in specs for target in _targets_of(spec, cells, numbers, where)]
        check_names([target.task for target in targets])
    except ValueError as error:
        raise UserError(
            str(error), where="source.options.tasks", remedy="correct the task", wrong_use=True
        ) from error
    return tuple(targets)


def _targets_of(
    spec: LabelTask, cells: Mapping[str, set[str]], numbers: Mapping[str, Figures], where: str
) -> list[Target]:
    make = partial(Task, metric=spec.metric, loss=spec.loss)
    if spec.kind == "regression":
        figures = numbers[spec.column]
        if not figures.numbers:
            raise UserError(
                f"no number in the train rows of column {spec.column}", where=where, remedy="choose another column"
            )
        offset, scale = (figures.mean,), (figures.deviation or 1.0,)
        note = f"task {spec.task_name} has outliers: {figures.outliers}" if figures.outliers else ""
        return [Target(spec.column, make(spec.task_name, "regression", offset=offset, scale=scale), note=note)]
    classes = spec.classes or in_order(cells.get(spec.column, set()) - {""})
    if spec.one_vs_rest is not None:
        return [
            Target(
                spec.column,
                make(f"{spec.task_name}.{safe_name(one)}", "binary", labels=("rest", one)),
                {name: int(name == one) for name in classes},
            )
            for one in _chosen(spec, classes)
        ]
    if spec.kind == "multiclass":
        task = make(spec.task_name, "multiclass", len(classes), labels=classes)
        return [Target(spec.column, task, {name: i for i, name in enumerate(classes)})]
    task = make(spec.task_name, "binary")
    if spec.positive is None:
        return [Target(spec.column, task, FLAGS)]
    return [Target(spec.column, task, dict.fromkeys(spec.positive, 1), otherwise=0)]


def _chosen(spec: LabelTask, classes: Sequence[str]) -> Sequence[str]:
    """The classes of `one_vs_rest`."""
    if spec.one_vs_rest is None or spec.one_vs_rest == "all":
        return classes
    unknown = [name for name in spec.one_vs_rest if name not in classes]
    if unknown:
        raise ValueError(
            f"one_vs_rest of column {spec.column} names {listed(unknown)}, expected some of {listed(classes)}"
        )
    return spec.one_vs_rest


def in_order(values: Iterable[str]) -> tuple[str, ...]:
    """Cells of a column in order: numbers by size, then words by the numbers in them."""

    def place(value: str) -> tuple[Any, ...]:
        number = cell_number(value)
        return number is None, number or 0.0, by_number(value)

    return tuple(sorted(values, key=place))


def safe_name(name: str) -> str:
    """The name without characters that a column or a metric cannot have."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)
