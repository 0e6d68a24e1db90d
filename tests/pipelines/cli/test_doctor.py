"""`dmtg doctor` on this machine, and where something is wrong. Ray itself is asked in one test only."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.cli import checks as doctor
from pipelines.cli.app import app
from pipelines.cli.checks import FAIL, OK, WARN, Finding
from pipelines.config.ray_section import RaySection
from pipelines.config.sections import TrackSection
from tests.pipelines.s3_server import BUCKET, free_port


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that takes connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def found(probes: list[doctor.Probe], wait_s: float = 60) -> list[Finding]:
    return list(doctor._asked(probes, wait_s))


def test_python_and_packages_of_this_installation_are_as_asked_for() -> None:
    assert doctor.python().verdict == OK
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in doctor.python().found
    assert doctor.packages(["text"]).verdict in (OK, WARN)  # a warning where it is not installed at all


def test_a_version_that_is_not_asked_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        "torch<1",
        "no-such-package",
        "numpy>=2",
        "kfp>=2; extra == 'kubeflow'",
        "rdkit<1; extra == 'molecules'",
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: asked)
    torch = doctor.metadata.version("torch")
    told = doctor.packages(["molecules"])
    assert told.verdict == FAIL
    assert f"torch {torch} is not <1" in told.found
    assert "no-such-package is missing" in told.found
    assert "rdkit" in told.found
    assert "kfp" not in told.found  # its extra is not needed
    assert "pip install 'dmtg[pipelines,molecules]'" in told.remedy


def test_that_every_process_would_compile_torch_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))  # nothing is compiled there
    assert doctor.bytecode() == Finding("bytecode", "torch is compiled when it is next imported")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = doctor.bytecode()
    assert found.verdict == WARN
    assert "PYTHONDONTWRITEBYTECODE is set" in found.found
    assert found.remedy.startswith(f"{sys.executable} -m compileall -q ")
    package = Path(found.remedy.split()[-1]) / "torch" / "__init__.py"
    compiled = Path(cache_from_source(str(package)))
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    assert doctor.bytecode() == Finding("bytecode", "torch is compiled")


def test_more_workers_than_cores_and_little_shared_memory_are_warned_of() -> None:
    cores = len(os.sched_getaffinity(0))
    assert doctor.processors(RaySection(workers=cores)).verdict == OK
    many = doctor.processors(RaySection(workers=cores + 1))
    assert (many.verdict, many.remedy) == (WARN, f"they take turns: set ray.workers={cores} or less")
    assert doctor.shared_memory(RaySection(object_store_mib=2**30)).verdict == WARN
    assert doctor.no_gpu(1).verdict == WARN


def test_storage_is_written_read_and_left_as_it_was(tmp_path: Path) -> None:
    place, *room = doctor.storage_works("run.root", str(tmp_path / "not" / "there" / "yet"))
    assert (place.verdict, len(room)) == (OK, 1)
    assert "written, read and deleted" in place.found
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    assert doctor._tried(("raw", doctor.raw_data, (str(tmp_path / "none"),)))[0].verdict == FAIL
    assert doctor._tried(("raw", doctor.raw_data, (str(tmp_path / "file"),)))[0].verdict == OK


def test_storage_of_a_server(s3: int) -> None:
    (works,) = doctor.storage_works("run.root", f"s3://{BUCKET}/runs")
    assert (works.verdict, works.found.partition(":")[0]) == (OK, "s3")
    (none,) = doctor._tried(("run.root", doctor.storage_works, ("run.root", "s3://no-such-bucket/runs")))
    assert none.verdict == FAIL
    assert "no bucket no-such-bucket" in none.found


def test_a_server_that_is_silent_does_not_hang_it(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent}")
    started = time.monotonic()
    uri = f"http://127.0.0.1:{silent}"
    told = found(
        [
            ("MLflow", doctor.mlflow_answers, (TrackSection(uri=uri), False)),
            ("run.root", doctor.storage_works, ("run.root", "s3://bucket/runs")),
        ],
        wait_s=4,
    )
    assert [(one.what, one.verdict, one.found) for one in told] == [
        ("MLflow", FAIL, "no answer in 4 s"), ("run.root", FAIL, "no answer in 4 s"),
    ]  # fmt: skip
    assert time.monotonic() - started < 60  # it would be minutes


def test_a_process_that_dies_is_told() -> None:
    (told,) = found([("Ray", os._exit, (7,))])
    assert (told.verdict, told.found) == (FAIL, "its process ended with exit code 7")


def test_a_run_is_made_in_mlflow_when_asked_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    track = TrackSection(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (before,) = doctor.mlflow_answers(track, False)
    assert before.verdict == OK
    assert not (tmp_path / "mlflow.db").exists()  # looked at, not made
    (told,) = doctor.mlflow_answers(track, True)
    assert "took a run" in told.found
    from pipelines.registry.tracking import connect

    assert connect(track).search_runs([connect(track).get_experiment_by_name("dmtg").experiment_id]) == []
    (off,) = doctor.mlflow_answers(TrackSection(uri="none"), True)
    assert "off" in off.found


@pytest.mark.ray
def test_the_command_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, with a local Ray in a process of its own; a server that refuses makes exit code 1."""
    monkeypatch.chdir(tmp_path)
    ask = ["doctor", "-c", "planted", "track.uri=none", "ray.object_store_mib=128", "--timeout", "240", "--json"]
    told = CliRunner().invoke(app, ask)
    answer: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    by_name = {one["what"]: one for one in answer["findings"]}
    assert told.exit_code == 0, told.stderr
    assert "a local one ran a task" in by_name["Ray"]["found"]
    assert by_name.keys() >= {
        "Python", "packages", "bytecode", "CPU", "GPU", "MLflow", "run.root", "data.shards", "shared memory"
    }  # fmt: skip
    assert answer["next"].startswith("dmtg shard -c planted track.uri=none")

    refuses = [f"track.uri=http://127.0.0.1:{free_port()}", f"ray.address=127.0.0.1:{free_port()}"]
    told = CliRunner().invoke(app, ["doctor", "-c", "planted", *refuses, "--timeout", "8", "--json"])
    answer = json.loads(told.stdout.splitlines()[-1])
    verdicts = {one["what"]: one["verdict"] for one in answer["findings"]}
    assert (told.exit_code, verdicts["MLflow"], verdicts["Ray"], verdicts["run.root"]) == (1, FAIL, FAIL, OK)
    assert all(one["remedy"] for one in answer["findings"] if one["verdict"] != OK)
