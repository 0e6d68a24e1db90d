"""Requests of `dmtg serve`: rows of JSON become samples, predictions become records.

A request is a list of rows, or one of the objects of MLflow's scoring server: `dataframe_records`,
`dataframe_split`, `inputs` and `instances`. A row is

- of a table, a text or a molecule: an object with the columns that the model reads; of a model with one column
  also its value;
- of photographs: the file as base64, or the pixels as stored in the shards;
- of any other model: the stored input as nested lists.

A record has the columns of `dmtg predict`, see `pipelines.serving.columns`; a dense task has its pixels as nested
lists.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmtg_core.input_spec import InputSpec
from dmtg_core.names import listed
from dmtg_core.tables.cells import cell_text
from dmtg_core.tables.preparation import TablePreparation, UnseenValues
from dmtg_core.tasks import Task
from pipelines.data.new_samples import ROW, Sample, has_image_form, image_form, prepared
from pipelines.data.preprocessing import load_preparation
from pipelines.data.sources.base import BadSampleError
from pipelines.data.sources.folder import fitted_image
from pipelines.data.sources.images import decode_image
from pipelines.errors import UserError
from pipelines.serving.columns import arrays_of, check_names, columns_of, dense_dtype
from pipelines.serving.fitting import Served
from pipelines.serving.new_rows import BadRows
from pipelines.serving.writers import json_values

FORMS = ("dataframe_records", "dataframe_split", "inputs", "instances")
MOST_BYTES = 64 * 2**20  # of a request
WHERE = "POST /predict"
REMEDY = "send a list of rows, or an object with dataframe_records, dataframe_split or inputs; see /docs"


def rows_of(body: bytes) -> list[Any]:
    """The rows of a request.

    Raises:
        UserError: For a request of none of the forms, with `wrong_use`.
    """
    if len(body) > MOST_BYTES:
        raise _malformed(f"a request of {len(body)} bytes, at most {MOST_BYTES} are read")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"not JSON: {error}") from error
    if isinstance(found, Mapping):
        form = next((name for name in FORMS if name in found), "")
        if len(found) != 1 or not form:
            raise _malformed(f"expected an object with one of {listed(FORMS)}, got {listed(found) or 'none'}")
        found = _split(found[form]) if form == "dataframe_split" else found[form]
    if not isinstance(found, list):
        raise _malformed(f"expected a list of rows, got {type(found).__name__}")
    if not found:
        raise _malformed("the request has no rows")
    return found


def _split(table: Any) -> list[dict[str, Any]]:
    """The rows of a table whose columns and cells are apart."""
    columns, data = (table.get(key) if isinstance(table, Mapping) else None for key in ("columns", "data"))
    if not isinstance(columns, list) or not isinstance(data, list):
        raise _malformed("dataframe_split needs the lists columns and data")
    for number, cells in enumerate(data, start=1):
        if not isinstance(cells, list) or len(cells) != len(columns):
            raise _malformed(f"row {number} of dataframe_split has not {len(columns)} cells")
    return [dict(zip(map(str, columns), cells, strict=True)) for cells in data]


def _malformed(what: str) -> UserError:
    return UserError(what, where=WHERE, remedy=REMEDY, wrong_use=True)


class RowReader:
    """Reads the rows of requests for a model.

    Args:
        served: The model.

    Raises:
        UserError: When two columns of predictions would have the same name.
    """

    def __init__(self, served: Served) -> None:
        self.address, self.digest = served.address, served.digest
        self.tasks = [task for task, _ in served.tasks.values()]
        self.spec = next(iter(served.groups.values())).spec.input
        self.how = load_preparation(served.preparation) if served.preparation else None
        self.images = image_form(served.source, self.spec.shape[0]) if has_image_form(served.source) else None
        self.id_column = str(served.source.get("id_column", ""))
        check_names(self.tasks, self.id_column or ROW, self.address)

    def read(self, rows: Sequence[Any]) -> tuple[list[dict[str, Any]], np.ndarray, list[str]]:
        """The ids, the stored inputs and notes of rows.

        Returns:
            A record with the id of each row; `(B, …)`; remarks such as values that training did not have.

        Raises:
            UserError: For rows that cannot be used, with their numbers from 1.
        """
        bad, unseen, samples = BadRows(), UnseenValues(), []
        for number, row in enumerate(rows, start=1):
            sample = self._sample(row, str(number))
            samples.append(sample)
            if sample.input is None:
                bad.add(sample)
            elif isinstance(self.how, TablePreparation):
                unseen.add(self.how, self._cells(row), sample.input)
        if bad.count:
            raise UserError(str(bad), where=WHERE, remedy="correct them: no row is predicted")
        stored = np.stack([sample.input for sample in samples if sample.input is not None])
        return self._ids(rows), stored, unseen.remarks()

    def _sample(self, row: Any, number: str) -> Sample:
        place = f"row {number}"
        if self.how is not None:
            cells = self._cells(row)
            if not isinstance(cells, Mapping):
                expected = f"expected an object with the columns {listed(self.how.columns)}"
                return Sample(number, place, None, f"{expected}, got {type(row).__name__}")
            return prepared(self.how, number, place, cells)
        try:
            if self.images is not None and isinstance(row, str):
                return Sample(number, place, _pixels(row, self.images))
            return Sample(number, place, _stored(row, self.spec))
        except (ValueError, BadSampleError) as error:
            return Sample(number, place, None, str(error))

    def _cells(self, row: Any) -> Any:
        """The columns of a row; the value alone is enough for a model with one column."""
        single = self.how is not None and len(self.how.columns) == 1 and isinstance(row, str | int | float)
        return {self.how.columns[0]: row} if self.how is not None and single else row

    def _ids(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """The id of each row, as `dmtg predict` names it: its number if the first row has no id."""
        if isinstance(rows[0], Mapping) and self.id_column in rows[0]:
            return [{self.id_column: cell_text(row.get(self.id_column))} for row in rows]
        return [{ROW: number} for number in range(1, len(rows) + 1)]


def _pixels(text: str, form: Mapping[str, Any]) -> np.ndarray:
    """The stored input of the file of a photograph, as base64.

    Raises:
        BadSampleError: For a text that is no such file.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise BadSampleError(f"expected a file as base64: {error}") from error
    return fitted_image(decode_image(data, "the file"), "the file", **form)


def _stored(row: Any, spec: InputSpec) -> np.ndarray:
    """Nested lists as stored input.

    Raises:
        ValueError: For another shape, and for values that the type of the input does not have.
    """
    found = np.array(row)
    if found.dtype.kind not in "biuf":
        raise ValueError("expected nested lists of numbers")
    if found.shape != tuple(spec.shape):
        raise ValueError(f"expected numbers of shape {tuple(spec.shape)}, got {found.shape}")
    kind = np.dtype(spec.dtype)
    low, high = (-np.inf, np.inf) if kind.kind == "f" else (np.iinfo(kind).min, np.iinfo(kind).max)
    if spec.vocabulary:
        low, high = 0, spec.vocabulary - 1
    if not (np.isfinite(found).all() and (found >= low).all() and (found <= high).all()):
        raise ValueError(f"expected finite numbers from {low} to {high}")
    if kind.kind != "f" and (found != np.floor(found)).any():
        raise ValueError("expected whole numbers")
    return found.astype(kind)


def records(tasks: Sequence[Task], decoded: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A record for each sample.

    Args:
        tasks: The tasks.
        decoded: Task name → result of `Task.decode`, `(B, …)`.
    """
    columns: dict[str, list[Any]] = {}
    for task in tasks:
        values = decoded[task.name]
        if task.dense:
            columns[task.name] = values.astype(dense_dtype(task)).tolist()
            continue
        for name, array in zip(columns_of(task), arrays_of(task, values), strict=True):
            columns[name] = json_values(array)
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
