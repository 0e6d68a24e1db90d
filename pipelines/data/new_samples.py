"""New samples for a model: rows of tables, texts and images, prepared as the samples that it was trained on.

A table is CSV, TSV or Parquet, or JSON lines (`.jsonl`, `.ndjson`) with an object on each line. Samples are read
one after another, in the order of the files; a file is not held in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Protocol

import numpy as np
from pydantic import ValidationError

from dmtg_core.input_spec import InputSpec
from dmtg_core.names import listed
from dmtg_core.tables.cells import cell_text, marks_of
from dmtg_core.tables.preparation import TablePreparation, UnseenValues
from pipelines.data.preprocessing import (
    Preparation,
    for_plain_cells,
    load_preparation,
)
from pipelines.data.sources import SOURCES, options_model
from pipelines.data.sources.base import BadSampleError
from pipelines.data.sources.folder import EXTENSIONS, stored_image
from pipelines.data.sources.rows import MOST_NAMES, DialectOptions, read_rows, table_dialect
from pipelines.errors import UserError
from pipelines.storage import Location

JSON_LINES = (".jsonl", ".ndjson")
IMAGE_FORM = ("resize", "interpolation", "crop_share")  # options of the reader of a folder of images
ROW = "row"  # name of the id where the samples have none: the number of the row, from 1


@dataclass(frozen=True)
class Sample:
    """A new sample.

    Args:
        id: Its id, or the number of its row.
        place: File and line, for a message.
        input: Its stored input; None if it cannot be used.
        problem: Why it cannot be used.
    """

    id: str
    place: str
    input: np.ndarray | None
    problem: str = ""


class Samples(Protocol):
    """New samples of one kind."""

    @property
    def id_name(self) -> str:
        """Name of the column of ids in the result."""
        ...

    @property
    def numbered(self) -> bool:
        """Whether the id is the number of the row."""
        ...

    def check(self) -> Sequence[str]:
        """Check the files before anything is predicted.

        Returns:
            Notes for the user, such as columns that are not read.

        Raises:
            UserError: When a file is missing or cannot be read, or a table lacks a column.
        """
        ...

    def __iter__(self) -> Iterator[Sample]:
        """The samples, those that cannot be used included."""
        ...

    def remarks(self) -> Sequence[str]:
        """What was remarkable about the samples so far, such as values that training did not have."""
        ...


def raw_form(source: Mapping[str, Any]) -> dict[str, Any]:
    """What new samples of a data set have to be like, for the record of a model.

    Args:
        source: Kind and options of the raw data, as a manifest or a configuration has them; empty if unknown.

    Returns:
        `kind`, and of the options those that are set of `id_column`, `IMAGE_FORM` and `targets` (the columns of
        the tasks). Empty for an unknown source.
    """
    kind = str(source.get("kind"))
    if kind not in SOURCES:
        return {}
    try:
        options = options_model(kind).model_validate(dict(source.get("options") or {}))
    except ValidationError:  # of another version
        return {"kind": kind}
    tasks = getattr(options, "tasks", ())
    form: dict[str, Any] = {"kind": kind, "targets": [task.column for task in tasks if hasattr(task, "column")]}
    form |= {name: getattr(options, name, None) for name in ("id_column", *IMAGE_FORM)}
    return {key: value for key, value in form.items() if value}


def new_samples(
    files: Sequence[Location],
    spec: InputSpec,
    preparation: Mapping[str, Any] | None,
    form: Mapping[str, Any],
    id_column: str,
) -> Samples:
    """The samples of files.

    Args:
        files: Tables; or images and folders of images.
        spec: Input of the model.
        preparation: Preparation of the model's input; empty or None for stored input.
        form: `raw_form` of the model's data set.
        id_column: Column of ids in place of that of the data set.

    Raises:
        UserError: When the model reads neither rows nor images of a known form.
    """
    if preparation:
        return TableSamples(files, preparation, form, id_column)
    if has_image_form(form):
        return ImageSamples(files, partial(stored_image, **image_form(form, spec.shape[0])))
    raise UserError(
        "the model does not record how its input is prepared from files",
        where=f"input of kind {spec.kind}, shape {spec.shape}",
        remedy="give the run folder in place of the registered model, or write shards and predict them with -c",
    )


class TableSamples:
    """Rows of tables; see `new_samples`."""

    def __init__(
        self, files: Sequence[Location], preparation: Mapping[str, Any], form: Mapping[str, Any], id_column: str
    ) -> None:
        self.files, self.form = files, form
        self.how = load_preparation(preparation)
        self.of_table = load_preparation(for_plain_cells(preparation))  # its cells have numbers as in Python
        self.marks = marks_of(preparation)
        self.unseen = UnseenValues()
        self.asked, self.id_column = id_column, id_column or str(form.get("id_column", ""))

    @property
    def id_name(self) -> str:
        """Name of the column of ids in the result."""
        return self.id_column or ROW

    @property
    def numbered(self) -> bool:
        """Whether there is no column of ids."""
        return not self.id_column

    def check(self) -> Sequence[str]:
        """See `Samples.check`."""
        notes: dict[str, None] = {}
        for file in self.files:
            names = self._columns(file)
            if self.id_column and self.id_column not in names:
                self.id_column = ""
                notes["there is no column of ids: rows are numbered"] = None
            used = {*self.how.columns, self.id_column, *self.form.get("targets", ())}
            ignored = [name for name in names if name not in used]
            if ignored:
                notes[f"not read: {listed(ignored, MOST_NAMES)}"] = None
        return list(notes)

    def _columns(self, file: Location) -> list[str]:
        needed = [*self.how.columns, *([self.asked] if self.asked else [])]
        rows = self._rows(file, list(dict.fromkeys(needed)))
        return list(next((cells for _, cells, problem in rows if not problem), needed))

    def _rows(self, file: Location, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any], str]]:
        """Place, cells and problem of each row."""
        name = file.name.lower()
        if name.endswith(JSON_LINES):
            yield from ((place, values, "") for place, values in json_rows(file, columns))
            return
        # the reader of texts reads tabs without quotes, too
        plain = self.form.get("kind") == "text" and name.endswith(".tsv")
        given = DialectOptions(delimiter="\t", quotes="") if plain else None
        dialect = table_dialect(file, given, columns=columns, usual=self.marks)
        words = [self.id_column, *(() if isinstance(self.how, TablePreparation) else self.how.columns)]
        for row in read_rows(file, columns, dialect=dialect, words=words, ragged=True):
            yield row.place, row.cells, row.problem

    def __iter__(self) -> Iterator[Sample]:
        """See `Samples`."""
        numbers = count(1)
        for file in self.files:
            how = self.how if file.name.lower().endswith(JSON_LINES) else self.of_table
            for line, cells, problem in self._rows(file, self.how.columns):
                name = cell_text(cells.get(self.id_column)) if self.id_column else str(next(numbers))
                place = f"{file.name}, {line}"
                yield Sample(name, place, None, problem) if problem else self._sample(how, name, place, cells)

    def _sample(self, how: Preparation, name: str, place: str, cells: Mapping[str, Any]) -> Sample:
        sample = prepared(how, name, place, cells)
        if sample.input is not None and isinstance(how, TablePreparation):
            self.unseen.add(how, cells, sample.input)
        return sample

    def remarks(self) -> Sequence[str]:
        """See `Samples.remarks`."""
        return self.unseen.remarks()


def prepared(how: Preparation, name: str, place: str, cells: Mapping[str, Any]) -> Sample:
    """The sample of the raw values of a row.

    Args:
        how: Preparation of the model's input.
        name: Id of the sample.
        place: Where it is, for a message.
        cells: Column → raw value; only JSON can lack a column.
    """
    missing = [column for column in how.columns if column not in cells]
    if missing:
        return Sample(name, place, None, f"no column {listed(missing)}")
    try:
        return Sample(name, place, how.row(cells))
    except ValueError as error:
        return Sample(name, place, None, str(error))


def image_form(form: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The arguments of `fitted_image`, from the form of a model; those of earlier versions have `resize` alone."""
    return {"size": size, "how": form["resize"], "interpolation": form.get("interpolation", "bilinear"),
            "share": form.get("crop_share", 1.0)}  # fmt: skip


def has_image_form(form: Mapping[str, Any]) -> bool:
    """Whether the form of a model says how images are resized."""
    return "resize" in form


class ImageSamples:
    """Image files, and the image files of folders; see `new_samples`. The id is the path in the folder."""

    id_name, numbered = "image", False

    def __init__(self, files: Sequence[Location], stored: Callable[[Location], np.ndarray]) -> None:
        self.files, self.stored = files, stored

    def check(self) -> Sequence[str]:
        """See `Samples.check`."""
        for file in self.files:
            if not file.exists():
                raise UserError("there is no such file or folder", where=str(file), remedy="correct the path")
        if not any(True for _ in self._images()):
            raise UserError(
                "the folder has no images",
                where=listed(map(str, self.files)),
                remedy=f"give files that end with {', '.join(EXTENSIONS)}",
            )
        return ()

    def _images(self) -> Iterator[tuple[str, Location]]:
        for file in self.files:
            if file.is_dir():
                names = (name for name in file.files() if name.lower().endswith(EXTENSIONS))
                yield from ((name, file / name) for name in names)
            else:
                yield file.name, file

    def __iter__(self) -> Iterator[Sample]:
        """See `Samples`."""
        for name, place in self._images():
            try:
                yield Sample(name, name, self.stored(place))
            except BadSampleError as error:
                yield Sample(name, name, None, str(error))

    def remarks(self) -> Sequence[str]:
        """See `Samples.remarks`."""
        return ()


def json_rows(file: Location, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and values of the rows of a file with a JSON object on each line.

    Args:
        file: The file.
        columns: Columns that the first object must have.

    Raises:
        UserError: When the file does not exist, a line is no JSON object, or the first one lacks a column.
    """
    try:
        with file.filesystem.open_input_stream(file.path) as opened:
            needed, number = list(columns), 0
            for number, text in enumerate(_lines(opened), start=1):
                if not text.strip():
                    continue
                values = _object(text, f"{file}, line {number}")
                missing, needed = [name for name in needed if name not in values], []
                if missing:
                    raise UserError(
                        f"no column {listed(missing)}",
                        where=f"{file}, line {number}",
                        remedy=f"there are {listed(values, MOST_NAMES)}",
                    )
                yield f"line {number}", values
        if not number or list(columns) == needed != []:
            raise UserError("the file has no rows", where=str(file), remedy="write one object on each line")
    except FileNotFoundError as error:
        raise UserError("the file does not exist", where=str(file), remedy="correct its path") from error


def _lines(opened: Any) -> Iterator[bytes]:
    """The lines of an Arrow stream, a block at a time."""
    rest = b""
    while block := opened.read(2**20):
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
    yield rest


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=where, remedy="write one object on each line") from error
    if not isinstance(values, dict):
        raise UserError(
            f"expected an object, got {type(values).__name__}", where=where, remedy="write one object on each line"
        )
    return values
