"""The HTTP interface of `dmtg serve` without Ray: its answers and errors are those of `dmtg predict`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from dmtg_core.input_spec import InputSpec
from dmtg_core.network.composite import Composite
from dmtg_core.tasks import Task
from pipelines.cli.app import app
from pipelines.config.sections import TrackSection
from pipelines.data.sources.base import INPUT
from pipelines.serving import records as module
from pipelines.serving.api import application
from pipelines.serving.fitting import open_model
from pipelines.serving.records import RowReader, records
from tests.pipelines.serving.registered import NEW, Model, register, write_data

ROWS = NEW.to_dict("records")
Client = Callable[[str], TestClient]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def models(root: Path) -> dict[str, Model]:
    return register(root, {"uri": f"sqlite:///{root / 'mlflow.db'}"})


@pytest.fixture(scope="module")
def client(root: Path, models: dict[str, Model]) -> Client:
    """A client of the application of a model, or of a run folder."""

    def make(address: str) -> TestClient:
        served = open_model(address, TrackSection(uri=f"sqlite:///{root / 'mlflow.db'}"))
        composite = Composite(served.groups.values())

        async def predict(stored: np.ndarray) -> list[dict[str, Any]]:
            decoded = composite.predict(torch.from_numpy(stored))
            return records(composite.tasks, {name: values.numpy() for name, values in decoded.items()})

        return TestClient(application(RowReader(served), predict))

    return make


def predicted(root: Path, folder: Path, model: str, *inputs: str) -> list[dict[str, Any]]:
    """The records that `dmtg predict` writes as JSON lines."""
    out = folder / "out.jsonl"
    uri = f"sqlite:///{root / 'mlflow.db'}"
    done = CliRunner().invoke(app, ["predict", model, *inputs, "-o", str(out), "--uri", uri])
    assert done.exit_code == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Records are equal, numbers up to rounding."""
    assert [list(one) for one in found] == [list(one) for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == {k: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for k, v in other.items()}


def split(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}


@pytest.mark.parametrize(
    "form",
    [lambda rows: rows, lambda rows: {"dataframe_records": rows}, lambda rows: {"inputs": rows},
     lambda rows: {"instances": rows}, lambda rows: {"dataframe_split": split(rows)}],
    ids=["list", "records", "inputs", "instances", "split"],
)  # fmt: skip
def test_each_form_of_a_request_is_answered_as_by_predict(form, root, models, client, tmp_path) -> None:
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    expected = predicted(root, tmp_path, models["rows"].uri, str(tmp_path / "new.jsonl"))
    assert [record["key"] for record in expected] == ["s", "r", "q", "p"]
    answer = client(models["rows"].uri).post("/predict", json=form(ROWS))
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "models:/rows/1"
    close(answer.json()["predictions"], expected)


def test_rows_without_an_id_are_numbered_and_texts_need_no_column(root, models, client) -> None:
    texts = [row["note"] for row in ROWS]
    found = client(models["texts"].uri).post("/predict", json={"inputs": texts}).json()["predictions"]
    again = client(models["texts"].uri).post("/predict", json=[{"note": text} for text in texts]).json()
    assert found == again["predictions"]
    assert [record["row"] for record in found] == [1, 2, 3, 4]
    assert set(found[0]) == {"row", "sick", "cost"}


def test_photographs_are_sent_as_files_or_as_pixels(root, models, client, tmp_path) -> None:
    folder = root / "images"
    names = sorted(file.name for file in folder.iterdir())
    expected = predicted(root, tmp_path, models["pictures"].uri, str(folder))
    asked = client(models["pictures"].uri)
    files = [base64.b64encode((folder / name).read_bytes()).decode() for name in names]
    source = models["pictures"].source
    pixels = [source.read(entry)[INPUT].tolist() for entry in source.entries()]
    for inputs in (files, pixels):
        found = asked.post("/predict", json={"inputs": inputs}).json()["predictions"]
        close([{k: v for k, v in one.items() if k != "row"} for one in found],
              [{k: v for k, v in one.items() if k != "image"} for one in expected])  # fmt: skip


def test_a_run_folder_is_served_too(models, client) -> None:
    asked = client(str(models["rows"].run.run))
    found = asked.post("/predict", json=ROWS).json()
    registered = client(models["rows"].uri).post("/predict", json=ROWS).json()
    named = [{"key": row["key"], **record} for row, record in zip(ROWS, found["predictions"], strict=True)]
    assert [record.pop("row") for record in named] == [1, 2, 3, 4], "the run does not say which column is the id"
    assert named == registered["predictions"]
    assert found["model"] == str(models["rows"].run.run)


def test_values_that_training_did_not_have_are_noted(models, client) -> None:
    known = {"age": 20, "plant": "001", "smoker": "TRUE"}
    found = client(models["rows"].uri).post("/predict", json=[known | {"plant": "999"}, known]).json()
    assert found["notes"] == ["column plant: 1 of 2 cells have a value that training did not have: '999'"]
    assert client(models["rows"].uri).post("/predict", json=[known]).json()["notes"] == []


@pytest.mark.parametrize(
    ("kind", "body", "status", "what"),
    [
        ("rows", b"{", 400, "not JSON: "),
        ("rows", b"[" * 100_000, 400, "not JSON: "),
        ("rows", b"\xff", 400, "not JSON: "),
        ("rows", b"3", 400, "expected a list of rows, got int"),
        ("rows", b"[]", 400, "the request has no rows"),
        ("rows", b'{"rows": []}', 400, "expected an object with one of dataframe_records"),
        ("rows", b'{"inputs": [], "instances": []}', 400, "expected an object with one of"),
        ("rows", b'{"dataframe_split": {"columns": ["age"]}}', 400, "needs the lists columns and data"),
        ("rows", b'{"dataframe_split": {"columns": ["age"], "data": [[1, 2]]}}', 400, "row 1 of dataframe_split"),
        ("rows", b'[{"age": 1, "plant": "1", "smoker": "TRUE"}, {"age": "old", "plant": "1", "smoker": ""}]', 422,
         "1 rows cannot be used: row 2: 'old' in column age is not a"),
        ("rows", b'[{"age": 1}]', 422, "row 1: no column plant, smoker"),
        ("rows", b"[[1, 2, 3]]", 422, "row 1: expected an object with the columns age, plant, smoker, got list"),
        ("texts", b'["a", ""]', 422, "row 2: expected a text in column note, got ''"),
        ("texts", b'[{"note": {"a": 1}}]', 422, "row 1: expected a text in column note"),
        ("pictures", b'["%%%"]', 422, "row 1: expected a file as base64"),
        ("pictures", b'["aGVsbG8="]', 422, "row 1: not an image"),
        ("pictures", b"[[[1, 2]]]", 422, "row 1: expected numbers of shape (16, 16, 3), got (1, 2)"),
        ("pictures", b"[null]", 422, "row 1: expected nested lists of numbers"),
        ("pictures", b"[[[1], [1, 2]]]", 422, "row 1: "),
    ],
)  # fmt: skip
def test_what_cannot_be_predicted_is_refused_with_its_reason(kind, body, status, what, models, client) -> None:
    answer = client(models[kind].uri).post("/predict", content=body)
    error = answer.json()["error"]
    assert answer.status_code == status
    assert what in error["what"]
    assert error["where"] == "POST /predict"
    assert error["remedy"]


def test_a_request_that_is_too_large_is_refused(models, client, monkeypatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    answer = client(models["rows"].uri).post("/predict", json=ROWS)
    assert answer.status_code == 400
    assert "at most 100 are read" in answer.json()["error"]["what"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [([1, 2, 300], "from 0 to 255"), ([1, 2, -1], "from 0 to 255"), ([1, 2, 2.5], "whole numbers"),
     ([1, 2, float("nan")], "finite")],
)  # fmt: skip
def test_stored_inputs_have_values_of_their_type(row, problem) -> None:
    spec = InputSpec("features", (3,), "uint8")
    with pytest.raises(ValueError, match=problem):
        module._stored(row, spec)
    assert module._stored([1, 2, 255], spec).dtype == np.uint8
    with pytest.raises(ValueError, match="from 0 to 9"):
        module._stored([1, 2, 10], InputSpec("tokens", (3,), "int32", vocabulary=10))


def test_pixels_of_dense_tasks_are_nested_lists() -> None:
    depth, kind = Task("depth", "dense_regression"), Task("kind", "dense_classification", channels=3)
    decoded = {"depth": np.ones((2, 2, 2), np.float32), "kind": np.full((2, 2, 2), 2)}
    found = records([depth, kind], decoded)
    assert found == [{"depth": [[1.0, 1.0]] * 2, "kind": [[2, 2]] * 2}] * 2


def test_health_and_description(models, client) -> None:
    asked = client(models["rows"].uri)
    health = asked.get("/healthz")
    assert health.status_code == 200
    assert {"status": "ok", "model": "models:/rows/1"}.items() <= health.json().items()
    assert asked.get("/docs").status_code == 200
    described = asked.get("/openapi.json").json()
    assert set(described["paths"]) == {"/predict", "/healthz"}
    posted = described["paths"]["/predict"]["post"]
    answer = posted["responses"]["200"]["content"]["application/json"]["schema"]["properties"]
    columns = answer["predictions"]["items"]["properties"]
    assert columns["grade"]["enum"] == ["nah", "fern, weit"]
    assert columns["krank"]["enum"] == ["nein", "ja"]
    assert columns["krank.ja"] == columns["sick"] == {"type": "number"}
    assert set(posted["responses"]) == {"200", "400", "422"}
    example = posted["requestBody"]["content"]["application/json"]["example"]
    assert asked.post("/predict", json=example).status_code == 200, "the example of the description can be sent"
