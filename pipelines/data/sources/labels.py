"""Label columns as tasks, and the conversion of cells to stored values, for all tables."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import numpy as np
from pydantic import ConfigDict, Field, field_validator, model_validator

from dmtg_core.names import display_form, listed
from dmtg_core.tables.cells import MISSING, cell_number, has_leading_zero, in_order, normal_form
from dmtg_core.tables.figures import Figures
from dmtg_core.tasks import Task, check_names
from pipelines.config.validation import Section
from pipelines.data.sources.base import BadSampleError, Column
from pipelines.data.sources.columns import Samples, different_cells, training_figures
from pipelines.data.sources.rows import Row
from pipelines.data.sources.tables.flags import FLAGS
from pipelines.data.sources.tables.row import AnyRow
from pipelines.errors import UserError

logger = logging.getLogger(__name__)

DASHES = ("-", "--")  # missing, but a class beside "+"
METRIC = {"binary": "auroc", "multiclass": "balanced_accuracy", "regression": "rmse"}  # of metric=auto
NAME_THEM = "write a name for each of them in source.options.tasks: {column: …, kind: …, name: …}"


class LabelTask(Section):
    """One column of a table as a task, or as one task for each class.

    `name` is the name of the task (default: that of the column). `classes` fixes the names and their order
    (default: those in the file, sorted, numbers by their size). `drop` lists values whose rows are left out.
    `one_vs_rest` ("all" or a list of classes) creates one binary task `<name>.<class>` for each class of a class
    column, for the kinds binary and multiclass. `positive` lists the values that count as 1 for a binary task
    (default: true, yes, 1 against false, no, 0, -1, also ja and nein, oui and non, да and нет, 是 and 否, …; any
    other value is a bad sample); other kinds do not read it, so that `kind` can be changed alone. `missing` lists
    markers of a missing label besides the usual ones (NA, N/A, ?, -, …), such as -1 beside 0 and 1. The metric
    `auto` is auroc for a binary task, balanced_accuracy for a multiclass task and rmse for a regression task.
    `loss_options` are those of `loss`, such as {pos_weight: balanced} or {gamma: 2}.
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)  # YAML reads the class names of `[1, 2, 3]` as numbers

    column: str
    kind: Literal["binary", "multiclass", "regression"]
    name: str | None = None
    classes: tuple[str, ...] | None = Field(None, min_length=1)
    drop: tuple[str, ...] = ()
    one_vs_rest: Literal["all"] | tuple[str, ...] | None = None
    positive: tuple[str, ...] | None = Field(None, min_length=1)
    missing: tuple[str, ...] = ()
    metric: str = ""
    loss: str = ""
    loss_options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        if name is not None and not display_form(name):
            raise ValueError("a name needs at least one character that is not a space")
        return name

    @model_validator(mode="after")
    def _check_use(self) -> Self:
        """Refuse options that the kind would ignore."""
        of_classes = self.kind == "multiclass" or self.one_vs_rest is not None
        for option, used in (
            ("one_vs_rest", self.kind != "regression"),
            ("classes", of_classes and self.kind != "regression"),
            ("positive", self.one_vs_rest is None),
        ):
            if getattr(self, option) is not None and not used:
                raise ValueError(f"{option} has no meaning for this {self.kind} task of column {self.column}")
        return self

    @property
    def reads_classes(self) -> bool:
        """Whether the classes are those in the file."""
        return self.classes is None and (self.kind == "multiclass" or self.one_vs_rest is not None)

    @property
    def reads_words(self) -> bool:
        """Whether the names of the two values are those in the file."""
        return self.kind == "binary" and self.one_vs_rest is None

    @property
    def words(self) -> set[str]:
        """The values that the options name."""
        chosen = self.one_vs_rest if isinstance(self.one_vs_rest, tuple) else ()
        return {*(self.classes or ()), *(self.positive or ()), *self.drop, *chosen}

    @property
    def headline(self) -> str:
        """The metric of the tasks."""
        return (
            METRIC[self.kind if self.one_vs_rest is None else "binary"] if self.metric == "auto" else self.metric
        )

    @property
    def task_name(self) -> str:
        """`name`, or the name of the column."""
        return self.column if self.name is None else self.name


@dataclass(frozen=True)
class Target:
    """A task, and the conversion of cells to stored values.

    `codes` maps cells, or their `normal_form`, to values. Any other cell has the value `otherwise`, or is an
    error if that is None. A regression task has no codes. Cells in `missing` have no value. `note` says what is
    remarkable.
    """

    column: str
    task: Task
    codes: Mapping[str, int] | None = None
    otherwise: int | None = None
    note: str = ""
    missing: frozenset[str] = frozenset()

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
        if not cell or cell in self.missing:
            return None
        number = cell_number(cell) if self.codes is None else self._code(cell, self.codes)
        if number is None:
            raise BadSampleError(f"{self._complaint(cell)} in column {self.column}, {row.place}")
        return np.asarray(number, self.stored.dtype)

    def _code(self, cell: str, codes: Mapping[str, int]) -> int | None:
        code = codes.get(cell)
        return codes.get(normal_form(cell), self.otherwise) if code is None else code

    def _complaint(self, cell: str) -> str:
        if self.codes is None:
            return f"{cell!r} is not a finite number"
        if self.codes == FLAGS:
            return f"{cell!r} is neither yes (true, yes, 1, ja, …) nor no (false, no, 0, -1, nein, …)"
        return f"a label outside its classes: {cell!r}"


def kept_rows(
    rows: Iterable[tuple[AnyRow, str]], specs: Sequence[LabelTask], where: str, *, log: bool
) -> Iterator[tuple[AnyRow, str]]:
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


def label_markers(specs: Sequence[LabelTask], missing: Sequence[str] | None = None) -> dict[str, frozenset[str]]:
    """Column → markers of a missing label in it, which are emptied before the labels are read.

    Args:
        specs: The label columns.
        missing: Markers that are given for all columns; None for the usual ones. Of these a dash is left out,
            because it can be a class beside "+", and so are words that a task names.
    """
    found: dict[str, frozenset[str]] = {}
    for spec in specs:
        named = {word for one in specs if one.column == spec.column for word in one.words}
        usual = set(MISSING) - set(DASHES) - named if missing is None else set(missing)
        found[spec.column] = found.get(spec.column, frozenset()) | usual | set(spec.missing)
    return found


def without_markers(
    rows: Iterable[AnyRow], of_columns: Mapping[str, frozenset[str]], others: frozenset[str] = frozenset()
) -> Iterator[AnyRow]:
    """The rows, with empty cells in place of markers of missing values.

    Args:
        rows: The rows.
        of_columns: Column → its markers.
        others: Markers of the columns that are not in `of_columns`.
    """
    every = others.union(*of_columns.values())
    for row in rows:
        held = [name for name, cell in row.cells.items() if cell in every and cell in of_columns.get(name, others)]
        row.cells.update(dict.fromkeys(held, ""))
        yield row


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
    cells = different_cells(samples, [spec.column for spec in specs if spec.reads_classes or spec.reads_words])
    try:
        targets = [target for spec in specs for target in _targets_of(spec, cells, numbers, where)]
        _check_display_forms(targets)
        check_names([target.task for target in targets])
    except ValueError as error:
        raise UserError(
            str(error), where="source.options.tasks", remedy="correct the task", wrong_use=True
        ) from error
    return tuple(targets)


def _check_display_forms(targets: Sequence[Target]) -> None:
    """Raise UserError for a task without a name, and for tasks whose names look the same."""
    by_form: dict[str, list[Target]] = defaultdict(list)
    for target in targets:
        by_form[display_form(target.task.name)].append(target)
    for form, same in by_form.items():
        forms = "" if len({target.task.name for target in same}) == 1 else ", in different forms"
        if len(same) > 1 or not form:
            unique = f"task names must be unique, got {form} more than once{forms}"
            what = unique if form else "a task has no name"
            raise UserError(
                f"{what}: {_columns(same)}", where="source.options.tasks", wrong_use=True,
                remedy=NAME_THEM,
            )  # fmt: skip
    _warn_of_clashes([target.task for target in targets])


def _warn_of_clashes(tasks: Sequence[Task]) -> None:
    by_case = defaultdict(list)
    for task in tasks:
        by_case[display_form(task.name).casefold()].append(task.name)
    for same in by_case.values():
        if len(same) > 1:
            logger.warning("task names that differ only in case, which some databases take for one: %s; %s",
                           listed(same), NAME_THEM)  # fmt: skip
    names = {"id", *(task.name for task in tasks)}
    columns = [f"{task.name}.{label}" for task in tasks for _, label in task.shares]
    both = [*(task.name for task in tasks if task.name == "id"), *(name for name in columns if name in names)]
    if both:
        logger.warning("a file of predictions would have two columns %s; %s", listed(both), NAME_THEM)


def _columns(targets: Iterable[Target]) -> str:
    return "column " + listed(dict.fromkeys(repr(target.column) for target in targets))


def _targets_of(
    spec: LabelTask, cells: Mapping[str, set[str]], numbers: Mapping[str, Figures], where: str
) -> list[Target]:
    options: Any = spec.loss_options
    make = partial(Task, metric=spec.headline, loss=spec.loss, loss_options=options)
    if spec.kind == "regression":
        figures = numbers[spec.column]
        if not figures.numbers:
            raise UserError(
                f"no number in the train rows of column {spec.column}", where=where, remedy="choose another column"
            )
        offset, scale = (figures.mean,), (figures.deviation or 1.0,)
        note = f"task {spec.task_name} has outliers: {figures.outliers}" if figures.outliers else ""
        task = make(spec.task_name, "regression", offset=offset, scale=scale)
        return [Target(spec.column, task, note=note, missing=frozenset(DASHES))]
    held = cells.get(spec.column, set()) - {""}
    gaps = frozenset(DASHES) - ({*DASHES} if "+" in {*held, *spec.words} else spec.words)
    classes, codes = (spec.classes, _codes(spec.classes)) if spec.classes else _classes(held - gaps)
    if spec.one_vs_rest is not None:
        return [
            Target(
                spec.column,
                make(f"{spec.task_name}.{one}", "binary", labels=("rest", one)),
                {cell: int(classes[code] == one) for cell, code in codes.items()},
                missing=gaps,
            )
            for one in _chosen(spec, classes)
        ]
    if spec.kind == "multiclass":
        task = make(spec.task_name, "multiclass", len(classes), labels=classes)
        return [Target(spec.column, task, codes, missing=gaps)]
    task = make(spec.task_name, "binary", labels=_words(spec, held - gaps))
    if spec.positive is not None:
        codes = dict.fromkeys(_codes(spec.positive), 1)
        return [Target(spec.column, task, codes, otherwise=0, note=_absent(spec, held - gaps), missing=gaps)]
    odd = _minus_ones(held)
    note = ""
    if odd:
        note = (
            f"column {spec.column} has {listed(odd)} beside 0 and 1, which is read as a missing label; if it "
            "means no, write positive: ['1']"
        )
        logger.warning("%s: %s", where, note)
    return [Target(spec.column, task, FLAGS, note=note, missing=gaps.union(odd))]


def _absent(spec: LabelTask, cells: set[str]) -> str:
    """A note of the values of `positive` that the column does not have.

    Raises:
        ValueError: If the column has none of them: a spelling that is not in the file would give a task without
            a positive label.
    """
    assert spec.positive is not None
    forms = {*cells, *map(normal_form, cells)}
    absent = [value for value in spec.positive if not {value, normal_form(value)} & forms]
    what = f"positive of column {spec.column} names {listed(absent)}"
    if len(absent) == len(spec.positive):
        raise ValueError(f"{what}, expected some of {listed(in_order(cells))}")
    return f"{what}, which is not in the data" if absent else ""


def _codes(names: Sequence[str]) -> dict[str, int]:
    """Name and its normal form → place of the name. A normal form of several names is not in it."""
    of_name = {name: place for place, name in enumerate(names)}
    if any(map(has_leading_zero, names)):
        return of_name
    forms = Counter(map(normal_form, names))
    of_form = {normal_form(name): place for name, place in of_name.items() if forms[normal_form(name)] == 1}
    return of_form | of_name


def _classes(cells: set[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """The classes of a column, and cell → its class. Cells of one value, such as 1 and 1.0, are one class."""
    if any(map(has_leading_zero, cells)):
        names = in_order(cells)
        return names, _codes(names)
    forms: dict[str, list[str]] = {}
    for cell in cells:
        forms.setdefault(normal_form(cell), []).append(cell)
    names = in_order(same[0] if len(same) == 1 else form for form, same in forms.items())
    return names, _codes(names)


def _minus_ones(cells: set[str]) -> list[str]:
    """The cells that are -1 in a column that has 0 and 1 as well."""
    forms = {cell: normal_form(cell) for cell in cells}
    return sorted(cell for cell, form in forms.items() if form == "-1") if {"0", "1"} <= {*forms.values()} else []


def _words(spec: LabelTask, cells: set[str]) -> tuple[str, ...]:
    """The names of the negative and the positive value of a binary task; none for numbers and mixed words."""
    if spec.positive is not None:
        negative = in_order(cells.difference(spec.positive))
        positive = spec.positive[0] if len(spec.positive) == 1 else listed(spec.positive)
        return negative[0] if len(negative) == 1 else "rest", positive
    found = ([cell for cell in in_order(cells) if FLAGS.get(cell) == value] for value in (0, 1))
    pair = [some[0] for some in found if len({cell.casefold() for cell in some}) == 1]
    return tuple(pair) if len(pair) == 2 and all(cell_number(word) is None for word in pair) else ()


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
