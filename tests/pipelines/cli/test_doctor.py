"""`dmtg doctor` on this machine, and with faults. Only one test uses Ray."""

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
from pipelines.cli.probes import FAIL, OK, WARN, Finding, Probe, run_in_processes, run_probe
from pipelines.config.ray_section import RaySection
from pipelines.config.sections import TrackSection
from tests.pipelines.s3_server import BUCKET, free_port


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def findings(probes: list[Probe], wait_s: float = 60) -> list[Finding]:
    return list(run_in_processes(probes, wait_s))


def test_python_and_packages_of_this_installation_are_as_required() -> None:
    assert doctor.python().verdict == OK
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in doctor.python().found
    assert doctor.packages(["text"]).verdict in (OK, WARN)  # a warning if dmtg is not installed


def test_a_wrong_version_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    required = [
        "torch<1",
        "no-such-package",
        "numpy>=2",
        "kfp>=2; extra == 'kubeflow'",
        "rdkit<1; extra == 'molecules'",
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: required)
    torch = doctor.metadata.version("torch")
    finding = doctor.packages(["molecules"])
    assert finding.verdict == FAIL
    assert f"torch {torch} is not <1" in finding.found
    assert "no-such-package is missing" in finding.found
    assert "rdkit" in finding.found
    assert "kfp" not in finding.found  # its extra is not needed
    assert "pip install 'dmtg[pipelines,molecules]'" in finding.remedy


def test_a_warning_if_every_process_would_compile_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))  # nothing is compiled there
    assert doctor.bytecode() == Finding("bytecode", "torch is compiled at its next import")
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


def test_warnings_for_more_workers_than_cores_and_little_shared_memory() -> None:
    cores = len(os.sched_getaffinity(0))
    assert doctor.processors(RaySection(workers=cores)).verdict == OK
    many = doctor.processors(RaySection(workers=cores + 1))
    assert (many.verdict, many.remedy) == (WARN, f"workers share cores: set ray.workers={cores} or less")
    assert doctor.shared_memory(RaySection(object_store_mib=2**30)).verdict == WARN
    assert doctor.no_gpu(1).verdict == WARN


def test_storage_is_written_read_and_left_unchanged(tmp_path: Path) -> None:
    place, *space = doctor.storage_works("run.root", str(tmp_path / "not" / "there" / "yet"))
    assert (place.verdict, len(space)) == (OK, 1)
    assert "written, read and deleted" in place.found
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    assert run_probe(("raw", doctor.raw_data, (str(tmp_path / "none"),)))[0].verdict == FAIL
    assert run_probe(("raw", doctor.raw_data, (str(tmp_path / "file"),)))[0].verdict == OK


def test_storage_of_a_server(s3: int) -> None:
    (works,) = doctor.storage_works("run.root", f"s3://{BUCKET}/runs")
    assert (works.verdict, works.found.partition(":")[0]) == (OK, "s3")
    (none,) = run_probe(("run.root", doctor.storage_works, ("run.root", "s3://no-such-bucket/runs")))
    assert none.verdict == FAIL
    assert "no bucket no-such-bucket" in none.found


def test_a_silent_server_does_not_block_the_command(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent}")
    started = time.monotonic()
    uri = f"http://127.0.0.1:{silent}"
    found = findings(
        [
            ("MLflow", doctor.mlflow_answers, (TrackSection(uri=uri), False)),
            ("run.root", doctor.storage_works, ("run.root", "s3://bucket/runs")),
        ],
        wait_s=1,
    )
    assert [(one.what, one.verdict, one.found) for one in found] == [
        ("MLflow", FAIL, "no answer in 1 s"), ("run.root", FAIL, "no answer in 1 s"),
    ]  # fmt: skip
    assert time.monotonic() - started < 60  # without the timeout it takes minutes


def test_a_process_that_dies_is_a_failure() -> None:
    (finding,) = findings([("Ray", os._exit, (7,))])
    assert (finding.verdict, finding.found) == (FAIL, "its process ended with exit code 7")


def test_write_creates_a_run_in_mlflow_and_deletes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    track = TrackSection(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (before,) = doctor.mlflow_answers(track, False)
    assert before.verdict == OK
    assert not (tmp_path / "mlflow.db").exists()  # checked, not created
    (written,) = doctor.mlflow_answers(track, True)
    assert "accepted a run" in written.found
    from pipelines.registry.tracking import connect

    assert connect(track).search_runs([connect(track).get_experiment_by_name("dmtg").experiment_id]) == []
    (off,) = doctor.mlflow_answers(TrackSection(uri="none"), True)
    assert "off" in off.found


def test_ray_is_checked_only_where_it_is_used(tmp_path: Path) -> None:
    subject = doctor.Subject(
        RaySection(executor="embedded"), TrackSection(uri="none"), {"run.root": str(tmp_path)}
    )
    found = {one.what: one for one in doctor.examine(subject, write=False, wait_s=60)}
    assert "own process" in found["Ray"].found
    assert "shared memory" not in found


@pytest.mark.usefixtures("ray_session")
def test_ray_runs_a_task() -> None:
    (found,) = doctor.ray_runs(RaySection(workers=2))
    assert found.verdict == OK
    assert "a local cluster ran a task" in found.found


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["ray.executor=embedded"], id="embedded"),
        pytest.param(["ray.executor=ray", "ray.object_store_mib=128"], id="Ray", marks=pytest.mark.soak),
    ],
)
def test_the_command_on_this_machine(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All checks; a server that refuses connections gives exit code 1."""
    monkeypatch.chdir(tmp_path)
    arguments = ["doctor", "-c", "planted", "track.uri=none", *words, "--timeout", "240", "--json"]
    result = CliRunner().invoke(app, arguments)
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    by_name = {one["what"]: one for one in answer["findings"]}
    assert result.exit_code == 0, result.stderr
    expected = "commands run in their own process" if len(words) == 1 else "a local cluster ran a task"
    assert expected in by_name["Ray"]["found"]
    assert ("shared memory" in by_name) == (len(words) > 1)
    assert by_name.keys() >= {"Python", "packages", "bytecode", "CPU", "GPU", "MLflow", "run.root", "data.shards"}
    assert answer["next"].startswith(f"dmtg shard -c planted track.uri=none {words[0]}")


def test_servers_that_refuse_connections_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refuses = [f"track.uri=http://127.0.0.1:{free_port()}", f"ray.address=127.0.0.1:{free_port()}"]
    result = CliRunner().invoke(app, ["doctor", "-c", "planted", *refuses, "--timeout", "8", "--json"])
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    verdicts = {one["what"]: one["verdict"] for one in answer["findings"]}
    assert (result.exit_code, verdicts["MLflow"], verdicts["Ray"], verdicts["run.root"]) == (1, FAIL, FAIL, OK)
    assert all(one["remedy"] for one in answer["findings"] if one["verdict"] != OK)
