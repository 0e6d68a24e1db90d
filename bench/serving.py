"""Requests of one row each to `dmtg serve`, beside `mlflow models serve`, with one model and one process each.

`python -m bench.serving [REQUESTS]` measures once, and prints throughput and latency of both.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.processes import environment
from dmtg_core import EncoderSpec, GroupingNetwork, NetworkSpec
from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.data.manifest import Manifest
from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT
from pipelines.registry.models import register
from pipelines.registry.tracking import connect
from pipelines.runs.models import write_models
from pipelines.storage import locate

REQUESTS, AT_ONCE = 2000, 16
NUMBERS, WORDS, GROUPS = 12, 4, 2
TARGETS = [{"column": "churn", "kind": "binary"}, {"column": "spend", "kind": "regression"},
           {"column": "visits", "kind": "regression"}, {"column": "segment", "kind": "multiclass"}]  # fmt: skip
COLUMNS = [*(f"number_{n}" for n in range(NUMBERS)), *(f"word_{n}" for n in range(WORDS))]
Row = dict[str, Any]


def _rows(count: int, seed: int) -> list[Row]:
    """Rows of a table with numbers and words."""
    rng = np.random.default_rng(seed)
    return [
        {name: round(float(rng.normal()), 3) if name.startswith("number") else str(rng.choice(list("abcdefgh")))
         for name in COLUMNS}
        for _ in range(count)
    ]  # fmt: skip


def _registered(root: Path) -> str:
    """Register an untrained model of a table; its address."""
    rng = np.random.default_rng(0)
    with (root / "table.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [*COLUMNS, *(target["column"] for target in TARGETS), "split"])
        table.writeheader()
        for number, row in enumerate(_rows(200, 0)):
            targets = {"churn": int(rng.integers(2)), "spend": rng.random(), "visits": rng.random(),
                       "segment": rng.choice(["new", "old", "gone"])}  # fmt: skip
            table.writerow(row | targets | {"split": "val" if number % 5 == 0 else "train"})
    options = {"file": "table.csv", "features": COLUMNS, "tasks": TARGETS}
    source = build_source("table", str(root), options)
    description = source.describe()
    spec = NetworkSpec(description.input, description.tasks, EncoderSpec("mlp"), GROUPS, initial="diagonal",
                       initial_scale=1.0)  # fmt: skip
    network, run = GroupingNetwork(spec), root / "run"
    write_models(locate(str(run / "models")), network.specialise())
    track = {"uri": f"sqlite:///{root / 'mlflow.db'}", "experiment": "bench"}
    config = checked(Config, {"name": "bench", "data": {"shards": str(run)}, "network": {"groups": GROUPS},
                              "track": track})  # fmt: skip
    client = connect(config.track)
    run_id = client.create_run(client.create_experiment("bench", str(root / "artifacts"))).info.run_id
    metrics = {task.name: {task.metric: 0.5} for task in description.tasks}
    result = {"grouping": network.grouping().to_dict(), "grouping_name": network.grouping().name, "split": "test",
              "metrics": metrics}  # fmt: skip
    manifest = Manifest(description, {}, {}, source={"kind": "table", "options": options})
    example = np.stack([source.read(entry)[INPUT] for entry in list(source.entries())[:4]])
    return register(config, locate(str(run)), run_id, manifest, example, result)[0].uri


@dataclass
class Server:
    """A server, and the latencies of its requests.

    Args:
        port: Its port on this machine.
        path: Path of the requests.
        process: The process.
    """

    port: int
    path: str
    process: psutil.Popen
    latencies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def measured(self, requests: int) -> float:
        """Send requests, and return the seconds of all.

        Raises:
            RuntimeError: For an answer that is no success.
        """
        bodies = [json.dumps({"dataframe_records": [row]}).encode() for row in _rows(requests, 1)]
        shares = [bodies[n::AT_ONCE] for n in range(AT_ONCE)]
        started = time.perf_counter()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = [one for part in pool.map(self._send, shares) for one in part]
        seconds = time.perf_counter() - started
        self.latencies, self.seconds = found, [*self.seconds, seconds]
        return seconds

    def _send(self, bodies: list[bytes]) -> list[float]:
        """Send requests one after another on one connection; the seconds of each."""
        found = []
        with contextlib.closing(HTTPConnection("127.0.0.1", self.port)) as connection:
            for body in bodies:
                started = time.perf_counter()
                connection.request("POST", self.path, body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                text = answer.read()
                if answer.status != 200:
                    raise RuntimeError(f"status {answer.status}: {text[:200]!r}")
                found.append(time.perf_counter() - started)
        return found

    def figures(self) -> dict[str, float]:
        """Requests a second, and the 95th percentile of the latency in milliseconds, of the last requests."""
        return {
            "per_second": round(len(self.latencies) / self.seconds[-1], 1),
            "p95_ms": round(1000 * statistics.quantiles(self.latencies, n=20)[-1], 1),
        }


@contextlib.contextmanager
def _server(command: list[str], port: int, health: str, path: str, folder: Path, **more: str) -> Iterator[Server]:
    """A server that accepts requests; it ends with the block."""
    with (folder / f"{port}.log").open("wb") as log:
        process = psutil.Popen(command, cwd=folder, env=environment(**more), stdout=log, stderr=log)
    try:
        while not _answers(port, health):
            if process.poll() is not None:
                raise RuntimeError((folder / f"{port}.log").read_text(errors="replace")[-2000:])
            time.sleep(0.2)
        yield Server(port, path, process)
    finally:
        process.terminate()
        process.wait(60)


def _answers(port: int, path: str) -> bool:
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except OSError:
            return False


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@contextlib.contextmanager
def _both(root: Path) -> Iterator[tuple[Server, Server]]:
    """MLflow's server and ours, for one model."""
    model, uri = _registered(root), f"sqlite:///{root / 'mlflow.db'}"
    ports = _free_port(), _free_port()
    theirs = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local",
              "--host", "127.0.0.1", "--port", str(ports[0]), "--workers", "1"]  # fmt: skip
    ours = [sys.executable, "-m", "pipelines.cli", "serve", model, "--port", str(ports[1]), "--uri", uri]
    more = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # MLflow looks for uvicorn there
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # fmt: skip
    with (
        _server(theirs, ports[0], "/ping", "/invocations", root, **more) as mlflow,
        _server(ours, ports[1], "/healthz", "/predict", root, **more) as dmtg,
    ):
        yield mlflow, dmtg


def serve_over_mlflow() -> tuple[Callable[[], float], Callable[[], float], Callable[[], dict[str, Any]]]:
    """Seconds of all requests to MLflow's server and to ours; both run until the notes are read."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)  # also after a request that fails
    root = stack.enter_context(tempfile.TemporaryDirectory())
    mlflow, dmtg = stack.enter_context(_both(Path(root)))

    def notes() -> dict[str, Any]:
        found = {"mlflow": mlflow.figures(), "dmtg": dmtg.figures(), "requests": REQUESTS, "at_once": AT_ONCE}
        stack.close()
        return found

    return lambda: mlflow.measured(REQUESTS), lambda: dmtg.measured(REQUESTS), notes


# name → (bound, value, function that returns numerator and denominator of the ratio, and notes)
ROWS: dict[str, tuple[str, float, Callable[[], Any]]] = {
    "serve_over_mlflow": ("at_least", 3, serve_over_mlflow),
}


if __name__ == "__main__":
    count = int(sys.argv[1]) if sys.argv[1:] else REQUESTS
    with tempfile.TemporaryDirectory() as place, _both(Path(place)) as servers:
        for server in servers:
            server.measured(max(count // 10, AT_ONCE))
            server.measured(count)
            print(server.path, json.dumps(server.figures()), flush=True)
