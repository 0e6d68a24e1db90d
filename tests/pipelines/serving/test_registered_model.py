"""Registered models: predictions for images, texts and rows of a table equal those for stored input, when loaded,
without Ray, and over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server

from dmtg_core.network.encoders import EncoderSpec
from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT, Source
from pipelines.registry.aliases import promote
from pipelines.registry.models import load_groups
from tests.pipelines.conftest import TASKS, write_images
from tests.pipelines.mlflow_server import address, end, start
from tests.pipelines.s3_server import free_port
from tests.pipelines.untrained import finish
from tests.soak import others_in_soak

TABLE = {
    "file": "t.csv",
    "id_column": "id",
    "features": ["age", "work"],
    "tasks": [{"column": "sick", "kind": "binary"}, {"column": "cost", "kind": "regression"}],
}
PICTURES = {"suffix": ".png", "size": 16, "tasks": TASKS}
KINDS: dict[str, tuple[str, dict[str, Any], EncoderSpec]] = {
    "rows": ("table", TABLE, EncoderSpec("mlp")),
    "texts": (
        "text",
        {"file": "t.csv", "id_column": "id", "tasks": TABLE["tasks"], "text_column": "note", "length": 8},
        EncoderSpec("embedding_bag"),
    ),
    "pictures": ("folder", PICTURES, EncoderSpec("convnet", options={"widths": [8, 16]})),
}
RAW = ("rows", "texts")  # kinds with a preparation
FRAME = pd.DataFrame(
    {
        "id": list("abcd"),
        "age": [20.5, 40, None, 30],
        "work": ["sea", "land", None, "air"],
        "note": ["a day at sea", "[PAD] or not", "“no”, she said", "zzz"],
        "sick": [1, 0, 1, 0],
        "cost": [3.0, 5.5, 4.0, 1.0],
        "split": ["train", "train", "train", "val"],
    }
)


@dataclass
class Served:
    """The source of a kind, its loaded composite and group models, and the address of the composite."""

    source: Source
    composite: Any
    singles: list[Any]
    uri: str


def save_and_register(kind: str, root: Path, store: dict[str, str]) -> Served:
    """Register an untrained network as training does: images in two groups, the others in one."""
    source_kind, options, encoder = KINDS[kind]
    source = build_source(source_kind, str(root), options)
    run = finish(source, encoder, root, store, name=kind, groups=2 if kind == "pictures" else 1)
    composite, *singles = run.register()
    promote(run.config.track, kind)
    loaded = load_groups(f"models:/{kind}@champion", run.config.track)
    assert {name: model.tasks for name, model in loaded.items()} == {n: m.tasks for n, m in run.models.items()}
    models = [mlflow.pyfunc.load_model(model.uri) for model in singles]
    return Served(source, mlflow.pyfunc.load_model(composite.uri), models, composite.uri)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The store of the registered models of this file."""
    return {"uri": f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"}


@pytest.fixture(scope="module")
def served(store: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """The registered models of each kind."""
    root = tmp_path_factory.mktemp("served")
    write_images(root, rows=12)
    FRAME.to_csv(root / "t.csv", index=False)
    return {kind: save_and_register(kind, root, store) for kind in KINDS}


def stored(source: Source) -> np.ndarray:
    """The first four stored inputs."""
    return np.stack([source.read(entry)[INPUT] for entry in list(source.entries())[:4]])


def predictions(source: Source, model: Any) -> dict[str, np.ndarray]:
    """Predictions of the networks for the stored input."""
    found: dict[str, np.ndarray] = {}
    for network in model.unwrap_python_model().models:
        predicted = network.predict(torch.from_numpy(stored(source)))
        found |= {task: value.numpy() for task, value in predicted.items()}
    return found


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return set(found) == set(expected) and all(np.array_equal(found[task], expected[task]) for task in expected)


@pytest.mark.parametrize("kind", RAW)
def test_predictions_for_a_frame_equal_those_for_stored_input(served, kind) -> None:
    source, composite, (single,) = served[kind].source, served[kind].composite, served[kind].singles
    column = {"rows": ["age", "work"], "texts": ["note"]}[kind]
    expected = predictions(source, composite)
    assert len({value.tobytes() for value in expected["cost"]}) == 4
    for model in (composite, single):
        assert same(model.predict(FRAME[column]), expected)
        assert same(model.predict(FRAME[column].to_dict("records")), expected)


def test_the_composite_predicts_what_its_groups_predict(served) -> None:
    pictures = served["pictures"]
    images = stored(pictures.source)
    expected = predictions(pictures.source, pictures.composite)
    assert set(expected) == {"colour", "bright", "level"}
    shares = {"colour": ["colour.blue", "colour.green", "colour.red"], "bright": ["bright.True"], "level": []}
    answers = pictures.composite.predict(images)
    assert same({task: answers[task] for task in expected}, expected)
    assert np.array_equal(np.stack([answers[name] for name in shares["colour"]], 1), expected["colour"])
    assert np.array_equal(answers["bright.True"], expected["bright"])
    found: dict[str, np.ndarray] = {}
    for group, model in zip((["colour", "level"], ["bright"]), pictures.singles, strict=True):
        names = [*group, *(name for task in group for name in shares[task])]
        assert list(model.predict(images)) == names
        assert model.metadata.signature.outputs.input_names() == names
        found |= model.predict(images)
    assert same(found, answers)


def test_plain_strings_are_accepted_for_one_column(served) -> None:
    source, composite = served["texts"].source, served["texts"].composite
    expected = predictions(source, composite)
    texts = list(FRAME["note"])
    for raw in (texts, np.array(texts), np.array(texts, object)):
        assert same(composite.predict(raw), expected)
    assert composite.predict(texts[0])["sick"].shape == (1,)


def test_rows_may_have_other_columns_and_whole_numbers(served) -> None:
    source, composite = served["rows"].source, served["rows"].composite
    whole = FRAME.assign(age=[20, 40, 30, 30])[["split", "work", "age"]]
    found = composite.predict(whole)
    expected = predictions(source, composite)
    assert found["cost"][3] == expected["cost"][3]
    assert found["cost"][0] != expected["cost"][0]


def test_errors_name_column_and_row(served) -> None:
    rows, texts = (served[kind].composite for kind in RAW)
    with pytest.raises(MlflowException, match=r"missing inputs \['work'\]"):
        rows.predict(FRAME[["age"]])
    with pytest.raises(ValueError, match="row 1: 'old' in column age is not a finite number"):
        rows.predict(FRAME[:2].assign(age=["20", "old"]))
    with pytest.raises(ValueError, match="row 0: no column note; there are comment"):
        texts.predict(pd.DataFrame({"comment": ["a"]}))
    with pytest.raises(ValueError, match="row 1: expected a text in column note, got ''"):
        texts.predict(["a", ""])
    with pytest.raises(ValueError, match="row 0: expected a text in column note, got None"):
        texts.predict(pd.DataFrame({"note": [None]}))


def test_signature_requirements_and_preparation_travel_with_the_model(served) -> None:
    for kind, columns in (("rows", ["age", "work"]), ("texts", [0])):
        source, uri = served[kind].source, served[kind].uri
        signature = served[kind].composite.metadata.signature
        assert signature.inputs.input_names() == columns
        assert signature.outputs.input_names() == ["sick", "cost"]
        folder = Path(mlflow.artifacts.download_artifacts(uri))
        held = json.loads((folder / "artifacts" / "preparation.json").read_text())
        assert held == json.loads(json.dumps(source.describe().preparation))
        assert ("tokenizers==" in (folder / "requirements.txt").read_text()) == (kind == "texts")


WITHOUT_RAY = """
import json, sys
sys.modules |= dict.fromkeys(("ray", "typer", "boto3", "pydantic_settings"))  # None: cannot be imported
import mlflow, numpy as np
for name, images in json.load(sys.stdin).items():
    found = mlflow.pyfunc.load_model(name).predict(np.array(images, "uint8"))
    print(json.dumps({task: values.tolist() for task, values in found.items()}))
print(json.dumps(sorted(name for name in sys.modules if name.partition(".")[0] in ("pipelines", "ray"))))
"""


def test_loading_needs_neither_ray_nor_pickles(served, store) -> None:
    pictures = served["pictures"]
    images = stored(pictures.source)
    environment = {
        **os.environ, "MLFLOW_TRACKING_URI": store["uri"], "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }  # fmt: skip
    requests = dict.fromkeys(("models:/pictures@champion", "models:/pictures.group_1@champion"), images.tolist())
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY], input=json.dumps(requests), env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *found, modules = (json.loads(line) for line in done.stdout.splitlines())
    expected = predictions(pictures.source, pictures.composite)
    for answered, tasks in zip(found, (set(expected), {"bright"}), strict=True):
        assert {name for name in answered if "." not in name} == tasks
        for task in tasks:
            np.testing.assert_allclose(answered[task], expected[task], rtol=1e-6, atol=1e-7)
    assert modules == [
        "pipelines", "pipelines.data", "pipelines.data.preprocessing", "pipelines.errors", "pipelines.registry",
        "pipelines.registry.bases", "pipelines.scratch", "ray",
    ]  # fmt: skip


Post = Callable[[bytes, dict[str, str]], tuple[int, bytes]]  # body and headers → status and body of the answer


Post = Callable[[bytes, dict[str, str]], tuple[int, bytes]]  # body and headers → status and body of the answer


@contextlib.contextmanager
def process(uri: str, store: dict[str, str], folder: Path) -> Iterator[Post]:
    """`mlflow models serve` for a registered model; yields what sends it requests when it answers."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local",
               "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]  # fmt: skip
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": store["uri"],
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # it looks for uvicorn there
    }

    def post(body: bytes, heads: dict[str, str]) -> tuple[int, bytes]:
        with contextlib.closing(HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("POST", "/invocations", body, heads)
            answer = connection.getresponse()
            return answer.status, answer.read()

    server = start(command, environment, folder / f"{port}.log", f"{address(port)}/ping")
    try:
        yield post
    finally:
        end(server)


def application(model: Any) -> Post:
    """What sends requests to MLflow's application for a loaded model, in this process."""
    server = TestClient(scoring_server.init(model))

    def post(body: bytes, heads: dict[str, str]) -> tuple[int, bytes]:
        answer = server.post("/invocations", content=body, headers=heads)
        return answer.status_code, answer.content

    return post


def ask(post: Post, body: dict[str, Any] | str) -> dict[str, np.ndarray]:
    """The predictions for a body of JSON, or for a text of CSV."""
    heads = {"Content-Type": "text/csv" if isinstance(body, str) else "application/json"}
    text = body if isinstance(body, str) else json.dumps(body)
    status, answer = post(text.encode(), heads)
    assert status == HTTPStatus.OK, answer
    return {task: np.array(values) for task, values in json.loads(answer)["predictions"].items()}


def test_the_server_of_mlflow_predicts_for_images(served) -> None:
    pictures = served["pictures"]
    found = ask(application(pictures.composite), {"inputs": stored(pictures.source).tolist()})
    expected = predictions(pictures.source, pictures.composite)
    assert {name for name in found if "." not in name} == set(expected)
    np.testing.assert_array_equal(found["bright.True"], found["bright"])
    for task, values in expected.items():
        np.testing.assert_allclose(found[task], values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("place", others_in_soak(["application", "process"], "application"))
def test_mlflow_serves_rows_over_http(served, store, tmp_path, place) -> None:
    rows = served["rows"]
    with (
        process("models:/rows@champion", store, tmp_path)
        if place == "process"
        else contextlib.nullcontext(application(rows.composite))
    ) as post:
        cells = FRAME[["age", "work"]].astype(object).where(FRAME[["age", "work"]].notna(), None)
        found = ask(post, {"dataframe_split": cells.to_dict("split")})
        again = ask(post, {"dataframe_records": cells.to_dict("records")})
        table = ask(post, FRAME[["work", "age", "split"]].to_csv(index=False))
    for task, values in predictions(rows.source, rows.composite).items():
        np.testing.assert_allclose(found[task], values, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(again[task], found[task])
        np.testing.assert_array_equal(table[task], found[task])
