"""`dmtg serve` with Ray Serve: the real server on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner

from pipelines.cli.app import app
from pipelines.errors import UserError
from pipelines.serving.server import serving
from tests.pipelines.mlflow_server import start
from tests.pipelines.s3_server import free_port
from tests.pipelines.serving.registered import NEW, Model, register, write_data
from tests.pipelines.serving.test_api import close, predicted

ROWS = NEW.to_dict("records")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def uri(root: Path) -> str:
    return f"sqlite:///{root / 'mlflow.db'}"


@pytest.fixture(scope="module")
def model(root: Path, uri: str) -> Model:
    return register(root, {"uri": uri}, "rows")["rows"]


def ask(url: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer; a request with a body is a POST."""
    place = urlsplit(url)
    with contextlib.closing(HTTPConnection(str(place.hostname), place.port, timeout=60)) as connection:
        data = None if body is None else json.dumps(body).encode()
        connection.request("GET" if data is None else "POST", place.path, data)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


@pytest.fixture(scope="module")
def served(ray_session: None, model: Model, uri: str) -> Iterator[str]:
    """The address of a running server with one replica."""
    values = {"model": model.uri, "uri": uri, "cpus": 0.1}
    with serving(values, "127.0.0.1", free_port()) as (_, url):
        yield url


@pytest.mark.ray
def test_answers_equal_predictions_and_bad_rows_are_refused(served, model, root, tmp_path) -> None:
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    expected = predicted(root, tmp_path, model.uri, str(tmp_path / "new.jsonl"))
    status, found = ask(f"{served}/predict", ROWS)
    assert (status, found["model"]) == (200, "models:/rows/1")
    close(found["predictions"], expected)

    with ThreadPoolExecutor(8) as pool:  # each gets the records of its own row, whatever is in the batch
        singles = list(pool.map(lambda row: ask(f"{served}/predict", [row]), ROWS * 4))
    close([answer["predictions"][0] for _, answer in singles], expected * 4)

    status, found = ask(f"{served}/predict", [{**ROWS[0], "age": "old"}])
    assert status == 422
    assert "row 1: 'old' in column age" in found["error"]["what"]
    assert ask(f"{served}/healthz")[1]["status"] == "ok"
    assert ask(f"{served}/openapi.json")[0] == 200


@pytest.mark.parametrize("per_group", [False, True])
def test_a_configuration_of_ray_serve_builds_the_application(per_group, model, uri) -> None:
    from ray import serve

    from pipelines.serving.ray_serve import build

    values = {"model": "models:/rows@challenger", "uri": uri, "per_group": per_group}
    assert isinstance(build(values), serve.Application)
    with pytest.raises(UserError, match=r"(?s)unknown key args\.replica\b.*did you mean replicas"):
        build(values | {"replica": 2})
    with pytest.raises(UserError, match="has no alias 'champion'"):
        build(values | {"model": "models:/rows@champion"})


def test_replicas_get_the_version_and_places_that_are_right_in_any_folder(model, uri, monkeypatch) -> None:
    from pipelines.serving.ray_serve import ServeOptions

    options = ServeOptions(model="models:/rows@challenger", uri=uri)
    pinned = options.pinned(options.open())
    assert (pinned.model, pinned.uri) == ("models:/rows/1", uri)
    run = model.run.run
    monkeypatch.chdir(run.parent)
    options = ServeOptions(model=run.name, replicas=3)
    pinned = options.pinned(options.open())
    assert (pinned.model, pinned.uri) == (str(run), uri), "the registry is that of the folder of the command"
    assert pinned.replicas == 3


def test_a_port_that_is_taken_is_refused_before_anything_starts(model, uri) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{port}") as caught,
            serving({"model": model.uri, "uri": uri}, "127.0.0.1", port),
        ):
            pass
    assert caught.value.wrong_use


def test_without_the_extra_the_command_names_it(model, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("ray.serve", "pipelines.serving.ray_serve"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("ray.serve", raising=False)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    done = CliRunner().invoke(app, ["serve", model.uri])
    assert done.exit_code == 1
    assert "pip install 'dmtg[serve]'" in done.stderr


@pytest.mark.soak
def test_the_command_serves_with_replicas_of_each_group_until_it_is_terminated(model, uri, root, tmp_path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "pipelines.cli", "serve", "models:/rows@challenger", "--port", str(port),
               "--uri", uri, "--per-group", "--cpus", "0.5", "--json"]  # fmt: skip
    server = start(command, dict(os.environ), tmp_path / "log", f"http://127.0.0.1:{port}/healthz")
    try:
        (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        expected = predicted(root, tmp_path, model.uri, str(tmp_path / "new.jsonl"))
        close(ask(f"http://127.0.0.1:{port}/predict", ROWS)[1]["predictions"], expected)
        served = f"models:/rows/1 is served at http://127.0.0.1:{port}"  # when all replicas have started
        while served not in (tmp_path / "log").read_text() and server.poll() is None:
            time.sleep(0.2)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
    text = (tmp_path / "log").read_text()
    assert served in text
    assert json.loads(text.splitlines()[-1])["status"] == "done"
    with pytest.raises(OSError, match="refused"):
        ask(f"http://127.0.0.1:{port}/healthz")
