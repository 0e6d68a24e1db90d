"""Bad configurations and tables end with exit code 1 or 2 and one message, and no file of the user is lost."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli.app import app
from pipelines.errors import UserError
from tests.pipelines.cli.spoiled import config, spoiled_config, spoiled_table, table

CONFIGS, TABLES = 200, 100
EVERY = 10  # of both, in the short tests


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the table and with other files of the user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    monkeypatch.setattr("pipelines.storage.PATIENCE_S", 0.0)
    for folder in ("raw", "work", "work/shards_of_another"):
        (tmp_path / folder).mkdir()
    (tmp_path / "raw" / "table.csv").write_bytes(table())
    for name in ("raw/other.parquet", "work/thesis.tex", "x", "work/shards_of_another/train-00000.parquet"):
        (tmp_path / name).write_bytes(b"of the user")
    return tmp_path


def files(folder: Path) -> dict[str, str]:
    """The digest of every file of the user."""
    names = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def ended(*arguments: str) -> int:
    """Run a command; its exit code. An error has to be one that the command expected."""
    found = CliRunner().invoke(app, [*arguments])
    code = found.exit_code
    assert code in (0, 1, 2), (code, found.stderr)
    if code:
        for part in ("what: ", "where: ", "remedy: "):
            lines = [line for line in found.stderr.splitlines() if line.startswith(part)]
            assert len(lines) == 1, (part, found.stderr)
            assert len(lines[0]) < 3000
        assert "--debug" not in found.stderr, found.stderr  # the remedy of an error that was not expected
    assert "Traceback" not in found.stderr
    assert "\x1b" not in found.stderr
    assert "hush" not in found.stderr
    return code


def check_configs(place: Path, numbers: range, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_training(*_: Any, **__: Any) -> None:
        raise UserError("training would start", where="here", remedy="none")

    monkeypatch.setattr("pipelines.training.driver.train_monitored", no_training)
    file, refused = place / "c.yaml", 0
    for number in numbers:
        file.write_bytes(spoiled_config(number, str(place / "raw" / "table.csv"), str(place / "work")))
        before = files(place)
        try:
            refused += ended("train", "-c", str(file)) == 2
        except AssertionError as error:
            raise AssertionError(f"configuration {number}\n{file.read_bytes()[:2000]!r}\n{error}") from error
        after = files(place)
        lost = {name for name, digest in before.items() if after.get(name) != digest}
        assert not {name for name in lost if "/shards/" not in name and "/runs/" not in name}, number
    assert refused >= len(numbers) / 3


def check_tables(place: Path, numbers: range) -> None:
    file, values = place / "c.yaml", config(str(place / "raw" / "table.csv"), str(place / "work"))
    refused = 0
    for number in numbers:
        (place / "raw" / "table.csv").write_bytes(spoiled_table(number))
        values["data"]["shards"] = str(place / "work" / f"shards{number}")
        file.write_text(yaml.safe_dump(values))
        before = files(place)
        try:
            refused += ended("shard", "-c", str(file)) > 0
            ended("config", "new", "raw/table.csv", "--targets", "yes,size", "--out", f"new{number}.yaml")
        except AssertionError as error:
            raise AssertionError(f"table {number}\n{spoiled_table(number)[:2000]!r}\n{error}") from error
        after = files(place)
        assert {name for name, digest in before.items() if after.get(name) != digest} == set(), number
    assert refused >= len(numbers) / 4


def test_bad_configurations_are_explained(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_configs(place, range(0, CONFIGS, EVERY), monkeypatch)


def test_bad_tables_are_explained(place: Path) -> None:
    check_tables(place, range(0, TABLES, EVERY))


@pytest.mark.soak
@pytest.mark.parametrize("part", range(10))
def test_all_bad_configurations_are_explained(part: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_configs(place, range(part, CONFIGS, 10), monkeypatch)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(5))
def test_all_bad_tables_are_explained(part: int, place: Path) -> None:
    check_tables(place, range(part, TABLES, 5))
