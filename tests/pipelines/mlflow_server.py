"""A real MLflow server on loopback: SQLite, and a folder or the S3 server of the tests for its files."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.pipelines.s3_server import BUCKET, settings

# without its job workers it starts in a third of the time
QUICK = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


@contextmanager
def serving(port: int, folder: Path, s3_port: int | None = None) -> Iterator[str]:
    """The server's address, for the time of the block."""
    server = begin(port, folder, s3_port)
    try:
        yield address(port)
    finally:
        end(server)


def address(port: int) -> str:
    """The value of `track.uri`."""
    return f"http://127.0.0.1:{port}"


def begin(port: int, folder: Path, s3_port: int | None = None) -> subprocess.Popen[bytes]:
    """Start the server with its former contents, and wait until it answers.

    Args:
        folder: Folder of `mlflow.db` and `server.log`, and of the artifacts without an S3 server.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **QUICK}
    files = str(folder / "artifacts")
    if s3_port is not None:
        environment |= {**settings(s3_port), "MLFLOW_S3_ENDPOINT_URL": address(s3_port)}
        files = f"s3://{BUCKET}/mlflow-{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
               "--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
               "--artifacts-destination", files, "--serve-artifacts"]  # fmt: skip
    return start(command, environment, folder / "server.log", f"{address(port)}/health")


def start(command: list[str], environment: dict[str, str], log: Path, url: str) -> subprocess.Popen[bytes]:
    """Start a server in its own process group, and wait until `url` answers or the process has ended."""
    with log.open("ab") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    while not _answers(url):
        if server.poll() is not None:
            raise RuntimeError(f"{' '.join(command[2:4])} ended at its start:\n{log.read_text()[-3000:]}")
        time.sleep(0.2)
    return server


def end(server: subprocess.Popen[bytes]) -> None:
    """Stop a server and the processes it started; its contents stay."""
    with contextlib.suppress(ProcessLookupError):  # a test may have ended it
        os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - a server of our own
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
