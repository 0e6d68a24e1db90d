"""A folder of images and a CSV file of their labels.

```
root/labels.csv        image,label,kids,split
root/images/<image>.jpg
```

A task reads one column. An empty cell is a missing label. Rows that a task's `drop` names are left out of the
data set; nothing else is: a row whose image or label cannot be used is a bad sample with its reason.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Any, Literal, Self

import numpy as np
from PIL import Image, ImageOps
from pydantic import ConfigDict, Field, model_validator

from dmtg_core.tasks import Task, check_names
from pipelines.config import Section, checked
from pipelines.errors import UserError
from pipelines.sources import INPUT, BadSampleError, Column, Description, Entry
from pipelines.sources.images import (
    Row,
    check_root,
    check_unique,
    hash_split,
    image_input,
    read_image,
    read_table,
    rgb,
    split_name,
)
from pipelines.storage import Location

log = logging.getLogger(__name__)

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_YES = ("true", "yes", "1", "1.0")
_NO = ("false", "no", "0", "0.0", "-1", "-1.0")
_GREY = (127, 127, 127)
_LARGEST = float(np.finfo(np.float32).max)


class FolderTask(Section):
    """One column of the CSV file as a task, or as one task a class.

    `classes` fixes the names and their order (default: those in the file, sorted). `drop` lists values whose
    rows are left out. `one_vs_rest` ("all" or a list of classes) makes one binary task a class, named
    `<name>.<class>`, of a class column, whether `kind` says binary or multiclass. `positive` lists the values
    that count as 1 for a binary task (default: true, yes, 1 against false, no, 0, -1; anything else is a bad
    sample).
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
        """An option that the kind has no use for would be ignored in silence."""
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
    def task_name(self) -> str:
        """`name`, or the column with what a metric name cannot hold replaced."""
        return self.name or _safe(self.column)


class FolderOptions(Section):
    """Where images and labels are below the root, and what is predicted.

    `suffix` is added to an id without an extension. Images are stored `size` × `size`: `resize` is "pad" (the
    whole image, aspect kept, on mid-grey, which is near zero after normalisation), "crop" (the central square)
    or "stretch" (the whole image, aspect lost). Without a split column the split is by hash of the id.
    """

    labels: str = "labels.csv"
    images: str = "images"
    image_column: str = "image"
    suffix: str = ".jpg"
    size: int = Field(64, ge=1)
    resize: Literal["stretch", "crop", "pad"] = "pad"
    split_column: str | None = "split"
    tasks: tuple[FolderTask, ...] = Field(min_length=1)


@dataclass(frozen=True)
class _Target:
    """A task with the way from a cell to its stored value.

    `codes` maps cell to value; a cell that is not in it has the value `otherwise`, or is wrong where that is
    None. A regression task has no codes.
    """

    column: str
    task: Task
    codes: Mapping[str, int] | None = None
    otherwise: int | None = None

    @property
    def stored(self) -> Column:
        if self.codes is None:
            return Column("float32")
        return Column("uint8" if self.task.channels <= 256 else "uint16")

    def value(self, cell: str, line: int) -> np.ndarray | None:
        """The stored value of a cell; None where it is empty."""
        if not cell:
            return None
        number = _number(cell) if self.codes is None else self.codes.get(cell, self.otherwise)
        if number is None:
            raise BadSampleError(f"{self._complaint(cell)} in column {self.column}, line {line}")
        return np.asarray(number, self.stored.dtype)

    def _complaint(self, cell: str) -> str:
        if self.codes is None:
            return f"{cell!r} is not a finite number"
        if self.codes == _FLAGS:
            return f"{cell!r} is neither yes ({', '.join(_YES)}) nor no ({', '.join(_NO)})"
        return f"a label outside its classes: {cell!r}"


_FLAGS: Mapping[str, int] = {
    form: value
    for words, value in ((_YES, 1), (_NO, 0))
    for word in words
    for form in (word, word.capitalize(), word.upper())
}


class FolderSource:
    """Reads an image folder with a CSV of labels. See `FolderOptions` for the options.

    Raises:
        UserError: For a wrong option, and for a root or a folder of images that does not exist.
    """

    def __init__(self, root: Location, options: Mapping[str, Any]) -> None:
        self._options = checked(FolderOptions, options, "source.options")
        self._root = root
        layout = f"{self._options.labels} and the folder {self._options.images}/"
        check_root(root, layout)
        check_root(root / self._options.images, "the images")

    def describe(self) -> Description:
        """The image and one number a task. Reads the CSV file, for its classes and statistics."""
        size = self._options.size
        columns = {INPUT: Column("uint8", (size, size, 3))}
        columns |= {f"task.{target.task.name}": target.stored for target in self._targets}
        return Description(image_input(size), tuple(target.task for target in self._targets), columns)

    def entries(self) -> list[Entry]:
        """One sample a row that is not dropped, in the order of the file.

        Raises:
            UserError: For a missing column, an id that is empty or occurs twice, an unknown split.
        """
        rows = self._rows()
        kept = self._kept(rows)
        if len(kept) < len(rows):
            log.info("%s: %d of %d rows left out by `drop`", self._table, len(rows) - len(kept), len(rows))
        return [self._entry(row) for row in kept]

    def read(self, entry: Entry) -> dict[str, np.ndarray | None]:
        """The image and the labels of one row.

        Raises:
            BadSampleError: For an image that is missing or damaged, and for a label that does not fit its task.
        """
        cells, line = entry.fields["cells"], entry.fields["line"]
        values = {f"task.{t.task.name}": t.value(cells[t.column], line) for t in self._targets}
        location = self._root / self._options.images / entry.fields["file"]
        image = rgb(read_image(location), str(location))
        return {INPUT: _square(image, self._options.size, self._options.resize), **values}

    @property
    def _table(self) -> Location:
        return self._root / self._options.labels

    def _rows(self) -> list[Row]:
        options = self._options
        needed = [options.image_column, *(task.column for task in options.tasks)]
        if options.split_column not in (None, FolderOptions.model_fields["split_column"].default):
            needed.append(str(options.split_column))  # asked for by name, so it must be there
        rows = read_table(self._table, list(dict.fromkeys(needed)))
        self._check(rows)
        return rows

    def _check(self, rows: Sequence[Row]) -> None:
        empty = [row.line for row in rows if not row.cells[self._options.image_column]]
        if empty:
            raise UserError(
                f"no image id in line {', '.join(map(str, empty[:5]))}",
                where=str(self._table),
                remedy=f"fill the column {self._options.image_column}",
            )
        check_unique([row.cells[self._options.image_column] for row in rows], str(self._table))

    def _kept(self, rows: Sequence[Row]) -> list[Row]:
        kept = [row for row in rows if not any(row.cells[t.column] in t.drop for t in self._options.tasks)]
        if not kept:
            raise UserError("every row is left out by `drop`", where=str(self._table), remedy="drop fewer values")
        return kept

    def _entry(self, row: Row) -> Entry:
        name = row.cells[self._options.image_column]
        has_extension = PurePosixPath(name).suffix.lower() in _EXTENSIONS
        cells = {task.column: row.cells[task.column] for task in self._options.tasks}
        file = name if has_extension else name + self._options.suffix
        return Entry(name, self._split(row), {"file": file, "line": row.line, "cells": cells})

    def _split(self, row: Row) -> str:
        column = self._options.split_column
        if column is None or column not in row.cells:
            return hash_split(row.cells[self._options.image_column])
        split = split_name(row.cells[column])
        if split is None:
            raise UserError(
                f"unknown split {row.cells[column]!r} in column {column}, line {row.line}",
                where=str(self._table),
                remedy="use train, val (valid, validation, dev) or test",
            )
        return split

    @cached_property
    def _targets(self) -> tuple[_Target, ...]:
        # cached, because it travels with a pickled reader and spares each worker the table
        rows = self._kept(self._rows())
        try:
            targets = [target for spec in self._options.tasks for target in self._targets_of(spec, rows)]
            check_names([target.task for target in targets])
        except ValueError as error:
            raise UserError(
                str(error), where="source.options.tasks", remedy="correct the task", wrong_use=True
            ) from error
        return tuple(targets)

    def _targets_of(self, spec: FolderTask, rows: Sequence[Row]) -> list[_Target]:
        make = partial(Task, metric=spec.metric, loss=spec.loss)
        if spec.kind == "regression":
            train = [row.cells[spec.column] for row in rows if self._split(row) == "train"]
            offset, scale = _statistics(train, spec.column, str(self._table))
            return [_Target(spec.column, make(spec.task_name, "regression", offset=(offset,), scale=(scale,)))]
        classes = spec.classes or tuple(sorted({row.cells[spec.column] for row in rows} - {""}))
        if spec.one_vs_rest is not None:
            return [
                _Target(
                    spec.column,
                    make(f"{spec.task_name}.{_safe(one)}", "binary", labels=("rest", one)),
                    {name: int(name == one) for name in classes},
                )
                for one in _chosen(spec, classes)
            ]
        if spec.kind == "multiclass":
            task = make(spec.task_name, "multiclass", len(classes), labels=classes)
            return [_Target(spec.column, task, {name: i for i, name in enumerate(classes)})]
        task = make(spec.task_name, "binary")
        if spec.positive is None:
            return [_Target(spec.column, task, _FLAGS)]
        return [_Target(spec.column, task, dict.fromkeys(spec.positive, 1), otherwise=0)]


def _chosen(spec: FolderTask, classes: Sequence[str]) -> Sequence[str]:
    """The classes of `one_vs_rest`."""
    if spec.one_vs_rest is None or spec.one_vs_rest == "all":
        return classes
    unknown = [name for name in spec.one_vs_rest if name not in classes]
    if unknown:
        raise ValueError(
            f"one_vs_rest of column {spec.column} names {', '.join(unknown)}, expected of {', '.join(classes)}"
        )
    return spec.one_vs_rest


def _safe(name: str) -> str:
    """A name that a column and a metric may have."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def _number(cell: str) -> float | None:
    """A finite number that float32 can hold, or None."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if abs(number) <= _LARGEST else None


def _statistics(cells: Sequence[str], column: str, where: str) -> tuple[float, float]:
    """Mean and standard deviation of the cells that are numbers (1 where they are all the same)."""
    numbers = [number for cell in cells if (number := _number(cell)) is not None]
    if not numbers:
        raise UserError(
            f"no number in the train rows of column {column}", where=where, remedy="choose another column"
        )
    mean = math.fsum(numbers) / len(numbers)
    deviation = math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / len(numbers))
    return mean, deviation or 1.0


def _square(image: Image.Image, size: int, how: str) -> np.ndarray:
    """An RGB image as uint8 (size, size, 3)."""
    box, smooth = (size, size), Image.Resampling.BILINEAR
    if how == "pad":
        image = ImageOps.pad(image, box, smooth, color=_GREY)
    elif how == "crop":
        image = ImageOps.fit(image, box, smooth)
    else:
        image = image.resize(box, smooth)
    return np.asarray(image)
