"""A disk that fills at any write: one message, no file is damaged, and the same command finishes afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli.app import app
from tests.pipelines.cli.spoiled import config, table
from tests.pipelines.full_disk import FullDisk
from tests.soak import others_in_soak

pytestmark = pytest.mark.usefixtures("plain_reports", "few_trees")
STEPS = 6  # of the writes, in the short test


def train(folder: Path) -> tuple[int, str, dict]:
    """Train in a folder; exit code, log and JSON object."""
    folder.mkdir(exist_ok=True)
    (folder / "table.csv").write_bytes(table())
    (folder / "c.yaml").write_text(yaml.safe_dump(config(str(folder / "table.csv"), str(folder / "work"))))
    found = CliRunner().invoke(app, ["train", "-c", str(folder / "c.yaml"), "--json"])
    return found.exit_code, found.stderr, json.loads(found.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def few_trees() -> Iterator[None]:
    """Trees beside a run, of which only the writing is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.training.measures.trees.QUICK_COUNT", 2)
        yield


@pytest.fixture(scope="module")
def undisturbed(
    plain_reports: None, few_trees: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict]:
    """Number of writes of a run, and its result."""
    with pytest.MonkeyPatch.context() as patch:
        disk = FullDisk(patch)
        code, log, found = train(tmp_path_factory.mktemp("undisturbed"))
    assert code == 0, log
    return disk.writes, found


def check(room: int, undisturbed: tuple[int, dict], folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(patch, room)
        code, log, found = train(folder)
    assert "Traceback" not in log
    if code:
        assert code == 1
        assert "No space left on device" in found["error"]["what"] or "space" in found["error"]["remedy"], log
        assert found["error"]["where"]
        assert "--debug" not in found["error"]["remedy"], log
    code, log, found = train(folder)
    assert code == 0, log
    assert found["metrics"] == undisturbed[1]["metrics"]
    assert found["grouping"] == undisturbed[1]["grouping"]
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize("step", others_in_soak(range(STEPS), 0, 4))
def test_a_disk_that_fills_at_some_writes(step: int, undisturbed: tuple[int, dict], tmp_path: Path) -> None:
    check(step * (undisturbed[0] - 1) // (STEPS - 1), undisturbed, tmp_path / "run")


@pytest.mark.soak
def test_a_disk_that_fills_at_each_write(undisturbed: tuple[int, dict], tmp_path: Path) -> None:
    for room in range(undisturbed[0]):
        check(room, undisturbed, tmp_path / f"run{room}")
