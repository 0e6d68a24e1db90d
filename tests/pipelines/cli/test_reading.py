"""Commands that read create nothing: no registry, no folder, no file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli.app import app

READING = {
    "models list": 0,
    "models show nothing": 1,
    "models diff nothing": 1,
    "models promote nothing": 1,
    "models rollback nothing": 1,
    "config show -c c.yaml": 0,
    "config schema": 0,
    "inspect -c c.yaml": 1,
    "evaluate models:/nothing/1 -c c.yaml": 1,
    "evaluate runs/nothing -c c.yaml": 1,
    "predict models:/nothing/1 new.csv -o out/p.csv": 1,
    "predict models:/nothing@champion -c c.yaml --out out": 1,
    "report runs/nothing": 1,
    "doctor --timeout 1": None,
    "--version": 0,
    "train --help": 0,
}


@pytest.mark.parametrize(("command", "code"), READING.items())
def test_a_command_that_reads_creates_nothing(
    command: str, code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shards = {"data": {"shards": "work/shards"}, "run": {"root": "work/runs"}, "ray": {"executor": "embedded"}}
    Path("c.yaml").write_text(yaml.safe_dump({"name": "x", **shards}))
    Path("new.csv").write_text("a\n1\n")
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == code if code is not None else done.exit_code in (0, 1), done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c.yaml", "new.csv"]
    if command.startswith(("models", "predict models:/nothing/1")) and code:
        assert "there is no registry" in done.stderr
