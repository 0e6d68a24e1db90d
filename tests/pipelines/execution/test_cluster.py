"""A cluster that is gone, a missing token, and places that only one job can see. Nothing here starts Ray."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from pipelines.cli.app import app
from pipelines.config.ray_section import RaySection
from pipelines.errors import UserError
from pipelines.execution import cluster_address, places
from pipelines.execution.cluster_address import check_cluster
from pipelines.execution.places import check_places
from tests.pipelines.s3_server import free_port


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "RAY_ADDRESS",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_USE_TLS",
        places.JOB,
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cluster_address, "ANSWER_S", 0.5)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))


@pytest.mark.parametrize("start", ["", "ray://"])
@pytest.mark.parametrize("tls", ["0", "1"])
def test_a_cluster_that_is_gone_is_named(start: str, tls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", tls)
    address = f"{start}127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match="does not answer") as found:
        check_cluster(address)
    assert address in found.value.what
    assert address in found.value.where


def test_a_port_at_which_something_else_listens_is_no_cluster() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=f"{address} does not answer"):
            check_cluster(address)


def test_a_server_that_answers_passes_and_so_do_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_address, "ANSWER_S", 30)
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        check_cluster(f"127.0.0.1:{port}")
        server.stop(None).wait()
    check_cluster("auto")


def test_the_address_of_a_dashboard_is_explained() -> None:
    with pytest.raises(UserError, match="address of a dashboard") as found:
        check_cluster("http://127.0.0.1:8265")
    assert "6379" in found.value.remedy


def test_a_missing_token_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="needs a token, and there is none") as found:
        check_cluster("auto")
    assert "RAY_AUTH_TOKEN" in found.value.remedy
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    check_cluster("auto")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="needs a token"):
        check_cluster("auto")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    check_cluster("auto")


PLACES = {
    "run.root": "runs",
    "data.shards": "s3://b/shards",
    "track.uri": "sqlite:////data/mlflow.db",
    "--out": "",
}


@pytest.mark.parametrize("address", ["", "auto", "127.0.0.1:6379", "ray://127.0.0.1:10001", "localhost:6379"])
def test_every_place_is_admitted_on_this_machine(address: str) -> None:
    check_places(RaySection(address=address), PLACES)


@pytest.mark.parametrize("address", ["192.0.2.1:6379", "ray://head.test:10001"])
def test_local_places_are_refused_on_a_cluster_elsewhere(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda / ext4 rw 0 0\nserver:/x /data nfs4 rw 0 0\nserver:/y /my\\040team fuse.s3fs rw 0 0\n"
    )
    monkeypatch.setattr(places, "MOUNTS", mounts)
    with pytest.raises(UserError, match="only this job can see run.root: ") as found:
        check_places(RaySection(address=address), PLACES)
    assert found.value.wrong_use
    assert "ray.storage" in found.value.remedy
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match="only this job can see"):
        check_places(RaySection(), {"run.root": "/datax/runs"})
    check_places(RaySection(), {"run.root": "/data/runs", "data.shards": "/my team/x", "track.uri": "none"})


def test_the_folder_of_a_submitted_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(places.JOB, "{}")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run.root, track.uri"):
        check_places(RaySection(), PLACES | {"track.uri": f"sqlite:///{tmp_path / 'tmp'}/x.db"})
    check_places(RaySection(), PLACES | {"run.root": "/data/runs"})


def test_commands_check_their_places_and_can_be_told_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    for command in ("shard", "train", "signal", "compare", "sweep", "regroup"):
        refused = CliRunner().invoke(app, [command, "-c", "rooms", "data.shards=shards"])
        assert refused.exit_code == 2
        assert "only this job can see" in refused.stderr
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    allowed = CliRunner().invoke(app, ["train", "-c", "rooms", "track.uri=none", "--local-ok"])
    assert allowed.exit_code == 1
    assert "192.0.2.1:6379 does not answer" in allowed.stderr
