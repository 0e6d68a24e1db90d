"""A run that is killed goes on where it was and ends where an undisturbed one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.pipelines.conftest import config_values

pytestmark = pytest.mark.ray


def command(config: Path) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", "train", "-c", str(config), "--json"]


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with log.open("ab") as out:
        # a session of its own, so that the signal reaches Ray's processes as well, as a lost machine would
        return subprocess.Popen(
            command(config), stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )


def outcome(log: Path) -> dict:
    found: dict = json.loads(log.read_text().strip().splitlines()[-1])
    return found


def epochs_done(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize("after", [2, 5])
def test_killed_run_goes_on_and_ends_with_the_same_figures(images: Path, tmp_path: Path, after: int) -> None:
    values = config_values(
        images, tmp_path, train={"epochs": 4}, ray={"workers": 2}, track={"uri": "none"}, run={"name": "killed"}
    )
    config = tmp_path / "killed.yaml"
    config.write_text(yaml.safe_dump(values))
    run, log = tmp_path / "runs" / "killed", tmp_path / "killed.log"

    process = start(config, log)
    while epochs_done(run) < after and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, log.read_text()
    assert not (run / "result.json").exists()

    assert start(config, log).wait() == 0, log.read_text()
    assert "going on from the last checkpoint" in log.read_text()
    resumed = outcome(log)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == len({(r["stage"], r["epoch"]) for r in records}) == 8

    whole_log = tmp_path / "whole.log"
    whole_config = tmp_path / "whole.yaml"
    whole_config.write_text(yaml.safe_dump(values | {"run": {"root": str(tmp_path / "runs"), "name": "whole"}}))
    assert start(whole_config, whole_log).wait() == 0, whole_log.read_text()
    whole = outcome(whole_log)
    assert resumed["grouping"] == whole["grouping"]
    for kind in ("metrics", "baseline"):
        for task, found in whole[kind].items():
            assert resumed[kind][task] == pytest.approx(found, rel=1e-4, abs=1e-5), (kind, task)
