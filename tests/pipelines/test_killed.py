"""A run that is killed goes on where it was and ends where an undisturbed one does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from pipelines.config import Config
from pipelines.train import Trained

pytestmark = pytest.mark.ray


def command(config: Path) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", "train", "-c", str(config), "--json"]


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    with log.open("ab") as out:
        return subprocess.Popen(command(config), stdout=out, stderr=subprocess.STDOUT, env=environment)


def outcome(log: Path) -> dict:
    found: dict = json.loads(log.read_text().strip().splitlines()[-1])
    return found


def lose(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the command and to every Ray process below it, as a lost machine would."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def epochs_done(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize(
    "after",
    [
        5,  # in the search, with naive MTL behind it
        *(pytest.param(n, marks=pytest.mark.soak) for n in (0, 1, 4, 7)),
    ],
)
def test_killed_run_goes_on_and_ends_with_the_same_figures(
    images: Path, tmp_path: Path, run: tuple[Config, Trained, list[str]], after: int
) -> None:
    undisturbed = run[1].result
    values = run[0].model_dump(mode="json") | {
        "track": {"uri": "none"},
        "run": {"root": str(tmp_path / "runs"), "name": "killed"},
    }
    config, log = tmp_path / "killed.yaml", tmp_path / "killed.log"
    config.write_text(yaml.safe_dump(values))
    folder = tmp_path / "runs" / "killed"

    process = start(config, log)
    while (epochs_done(folder) < after or not (folder / "config.yaml").exists()) and process.poll() is None:
        time.sleep(0.02)
    lose(process)
    assert process.returncode == -signal.SIGKILL, log.read_text()
    assert not (folder / "result.json").exists()

    assert start(config, log).wait() == 0, log.read_text()
    if after:
        assert "going on from the last checkpoint" in log.read_text()
    resumed = outcome(log)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == len({(r["stage"], r["epoch"]) for r in records}) == 8
    assert resumed["grouping"] == undisturbed["grouping"]
    for kind in ("metrics", "baseline"):
        for task, found in undisturbed[kind].items():
            assert resumed[kind][task] == pytest.approx(found, rel=1e-4, abs=1e-5), (kind, task)
