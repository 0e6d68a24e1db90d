"""The HTTP interface of `dmtg serve`, as an application of FastAPI. It needs the extra `serve`, but not Ray."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response

from dmtg_core.tasks import Task
from pipelines.data.new_samples import ROW
from pipelines.errors import UserError
from pipelines.serving.columns import columns_of
from pipelines.serving.records import RowReader, rows_of
from pipelines.storage import finite

MALFORMED, UNUSABLE = 400, 422  # status of a request that cannot be read, and of rows that cannot be used
Predict = Callable[[np.ndarray], Awaitable[list[dict[str, Any]]]]  # stored inputs → a record for each

DESCRIPTION = """Predictions for the rows of a request, in their order.

The columns are those of `dmtg predict`: a multiclass task has its most probable class, and `<task>.<class>` with
the probability of each class; a binary task has its more probable word, and `<task>.<positive>`; a task of 0 and 1
has the probability of 1; a regression task has its value.

A request is a list of rows, or an object with `dataframe_records`, `dataframe_split` or `inputs` as for the
scoring server of MLflow. Rows that cannot be used are named, and no row is predicted then."""


def application(reader: RowReader, predict: Predict) -> FastAPI:
    """The application of a model: `/predict`, `/healthz`, `/docs` and `/openapi.json`.

    Args:
        reader: Reads the rows of requests.
        predict: Predicts their stored inputs.
    """
    app = FastAPI(title=f"Predictions of {reader.address}", version=version("dmtg"), redoc_url=None)

    @app.post("/predict", summary="Predict rows", description=DESCRIPTION, openapi_extra=_request(reader),
              responses=_responses(reader))  # fmt: skip
    async def predict_rows(request: Request) -> Response:
        ids, stored, notes = reader.read(rows_of(await request.body()))
        found = await predict(stored)
        predictions = [name | record for name, record in zip(ids, found, strict=True)]
        return _json({"model": reader.address, "predictions": predictions, "notes": notes})

    @app.get("/healthz", summary="Whether the model is loaded")
    async def healthz() -> Response:
        return _json({"status": "ok", "model": reader.address, "digest": reader.digest})

    @app.exception_handler(UserError)
    async def refuse(_: Request, error: UserError) -> Response:
        return _json({"error": error.to_dict()}, MALFORMED if error.wrong_use else UNUSABLE)

    return app


def _json(body: Mapping[str, Any], status: int = 200) -> Response:
    text = json.dumps(finite(body), ensure_ascii=False, allow_nan=False)
    return Response(text.encode("utf-8", "replace"), status, media_type="application/json")


def _request(reader: RowReader) -> dict[str, Any]:
    """The schema of a request, with a row that can be sent if the model reads columns."""
    rows = {"type": "array", "items": {"description": _row(reader)}, "minItems": 1}
    split = {"type": "object", "properties": {name: {"type": "array"} for name in ("columns", "data")}}
    lists = [_object({name: rows}) for name in ("dataframe_records", "inputs", "instances")]
    forms = [rows, *lists, _object({"dataframe_split": split})]
    content: dict[str, Any] = {"schema": {"oneOf": forms}}
    if reader.how is not None:  # it is none of the data set
        content["example"] = [reader.how.example()]
    content = {"application/json": content}
    return {"requestBody": {"required": True, "content": content}}


def _row(reader: RowReader) -> str:
    """What a row of a request is."""
    if reader.how is not None:
        return f"An object with the columns {', '.join(reader.how.columns)}"
    pixels = "The file of a photograph as base64, or " if reader.images is not None else ""
    return f"{pixels}nested lists of shape {tuple(reader.spec.shape)}, {reader.spec.dtype}"


def _responses(reader: RowReader) -> dict[int | str, dict[str, Any]]:
    """The schemas of the answers, by status."""
    record = {reader.id_column or ROW: {"description": "The id of the row, or its number from 1"}}
    for task in reader.tasks:
        record |= _columns(task)
    listed = {"type": "array", "items": {"type": "object", "properties": record}}
    texts = {"type": "array", "items": {"type": "string"}}
    fields = {"model": {"type": "string"}, "predictions": listed, "notes": texts}
    error = {
        "error": {"type": "object", "properties": {k: {"type": "string"} for k in ("what", "where", "remedy")}}
    }
    return {
        200: _answer("The predictions", fields),
        MALFORMED: _answer("The request cannot be read", error),
        UNUSABLE: _answer("Rows cannot be used", error),
    }


def _answer(description: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _object(fields)}}}


def _object(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object that has all of the fields."""
    return {"type": "object", "properties": dict(fields), "required": list(fields)}


def _columns(task: Task) -> dict[str, Any]:
    """The schemas of the columns of a task; the first one has the names of its classes."""
    if task.dense:
        return {task.name: {"type": "array", "description": "The pixels as nested lists"}}
    found: dict[str, dict[str, Any]] = {name: {"type": "number"} for name in columns_of(task)}
    if task.labels and task.name in found and (task.kind == "multiclass" or task.shares):
        found[task.name] = {"type": "string", "enum": list(task.labels)}
    elif task.unit:
        found[task.name] = {"type": "number", "description": f"In {task.unit}"}
    return found
