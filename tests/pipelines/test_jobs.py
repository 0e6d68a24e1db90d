"""`ray job submit` on a separate cluster with token authentication: jobs that succeed or fail, and their logs.

The head of a cluster and a job take minutes on two cores. tests/pipelines/execution/test_cluster.py has the token
and the places of a job, tests/pipelines/cli the last line and the exit code of a command that fails.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from tests.pipelines.conftest import config_values
from tests.pipelines.s3_server import free_port

pytestmark = [pytest.mark.ray, pytest.mark.soak]
BIN = Path(sys.executable).parent
WORKER_PORTS = 40


class Head:
    """The head of a cluster, started as an operator would, and its jobs.

    Args:
        folder: Folder for its files. Its path is short, because of sockets.
    """

    def __init__(self, folder: Path) -> None:
        self.port, self.dashboard = free_port(), free_port()
        first = 10000 + self.port % 8000  # different from those of `free_port`
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
        }
        arguments = [
            str(BIN / "ray"), "start", "--head", "--block", f"--port={self.port}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={free_port()}",
            f"--dashboard-agent-listen-port={free_port()}", f"--min-worker-port={first}",
            f"--max-worker-port={first + WORKER_PORTS}", f"--temp-dir={folder}", "--num-cpus=4",
            f"--object-store-memory={128 * 2**20}", "--disable-usage-stats",
        ]  # fmt: skip
        self.log = folder.parent / "head.log"
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                arguments, env=self.environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        while self.ray("job", "list").returncode:
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.5)

    def ray(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A `ray` command of this cluster."""
        return subprocess.run(
            [str(BIN / "ray"), *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def submit(self, folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Submit a command with a working directory by `ray job submit`, and wait for its end."""
        return self.ray(
            "job",
            "submit",
            f"--working-dir={folder}",
            f"--submission-id={name}",
            "--",
            "dmtg",
            *arguments,
            "--local-ok",
        )

    def details(self, name: str) -> tuple[JobDetails, str]:
        """Details of a job, and its log."""
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        client = JobSubmissionClient(self.environment["RAY_API_SERVER_ADDRESS"], headers=headers)
        return client.get_job_info(name), client.get_job_logs(name)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="h") as folder:  # short: the path of a socket has at most 107 bytes
        started = Head(Path(folder) / "r")
        yield started
        started.stop()


@pytest.fixture(scope="module")
def job(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The working directory of the jobs, and the folder of their outputs."""
    folder, work = tmp_path_factory.mktemp("job"), tmp_path_factory.mktemp("made")
    values = config_values(images, work, train={"epochs": 2})
    values.pop("ray")
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (folder / "ray_config.yaml").write_text(yaml.safe_dump({"workers": 1, "data_cpus": 1}))
    return folder, work


def outcome(log: str) -> Mapping[str, object]:
    """The JSON object of a command in a job's log."""
    found: dict[str, object] = json.loads(next(line for line in log.splitlines()[::-1] if line.startswith("{")))
    return found


def is_clean(log: str) -> bool:
    """Whether a log has no traceback, no warning of a library and no progress bar."""
    return not any(word in log for word in ("Traceback", "Warning", "WARNING", "it/s", "\r", "(pid="))


def test_requests_without_the_token_are_refused(head: Head) -> None:
    refused = head.ray("job", "list", RAY_AUTH_TOKEN="0" * 32)
    assert refused.returncode != 0
    assert "401" in refused.stderr or "authenticat" in refused.stderr.lower()


def test_a_training_job_succeeds_and_its_log_is_clean(head: Head, job: tuple[Path, Path]) -> None:
    done = head.submit(job[0], "train", "train", "-c", "config.yaml", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    details, log = head.details("train")
    assert details.status == JobStatus.SUCCEEDED
    found = outcome(log)
    assert found["status"] == "done"
    assert Path(str(found["report"])).exists()
    assert "naive_mtl epoch   1" in log
    assert "Grouping g" in log
    assert is_clean(log), log


def test_the_last_line_of_a_failing_job_is_its_error(head: Head, job: tuple[Path, Path]) -> None:
    done = head.submit(job[0], "fails", "train", "-c", "config.yaml", "data.tasks=[colour, shape]")
    assert done.returncode == 1
    details, log = head.details("fails")
    assert details.status == JobStatus.FAILED
    assert log.strip().splitlines()[-1] == "dmtg train failed: the shards have no task shape"
    assert "the shards have no task shape" in (details.message or "")


def test_a_sweep_job_and_a_nightly_job_succeed(head: Head, job: tuple[Path, Path]) -> None:
    swept = head.submit(job[0], "sweep", "sweep", "-c", "config.yaml", "sweep.groups=[2, 3]", "--json")
    assert swept.returncode == 0, swept.stdout + swept.stderr
    best = str(outcome(head.details("sweep")[1])["best_config"])
    assert yaml.safe_load(Path(best).read_text())["network"]["groups"] in (2, 3)
    night = ("regroup", "-c", best, "--night", "2026-01-01", "--kept-ok", "--json")
    done = head.submit(job[0], "night", *night)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("sweep", "night"):
        details, log = head.details(name)
        assert details.status == JobStatus.SUCCEEDED
        assert is_clean(log), log
    assert outcome(head.details("night")[1])["verdict"] == "promoted"
    again = head.submit(job[0], "again", *night)
    assert again.returncode == 0
    assert outcome(head.details("again")[1])["repeated"] is True
