"""The Kubeflow pipeline: compiled as it is committed, and run by Kubeflow's local runner with the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.commands import PIPELINE
from tests.paths import ROOT
from tests.pipelines.conftest import config_values, write_images
from tests.soak import others_in_soak

# kfp needs an older protobuf than the lock file has, so `make` installs it in an environment of its own
PYTHON = str(ROOT / ".kfp" / "bin" / "python")
BIN = Path(sys.executable).parent

RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
from kfp import local
import pipeline
local.init(local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[2])
given = json.loads(sys.argv[4])
done = getattr(pipeline, sys.argv[3])(**given)
print("OUTPUTS", json.dumps({k: v for k, v in done.outputs.items()}))
"""


def in_kfp(*words: str, folder: Path | None = None, programs: Path = BIN) -> subprocess.CompletedProcess[str]:
    """A run of the Python that has kfp, with the `dmtg` of a folder of programs."""
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    held = {**os.environ, "PATH": path}
    return subprocess.run([PYTHON, *words], capture_output=True, text=True, check=False, env=held, cwd=folder)


# in place of dmtg: lists its arguments, and prints the object of each command
STUB = """#!/bin/sh
echo "$@" >> calls
case $1 in
    shard) echo '{"command": "shard", "shards": "sets/2026-05-01", "night": "2026-05-01"}' ;;
    sweep) echo '{"command": "sweep", "best_config": "sweeps/best.yaml"}' ;;
    train) echo "what: unknown key train.epoch, did you mean train.epochs?" >&2; exit 2 ;;
    regroup) echo '{"command": "regroup", "verdict": "kept", "night": "2026-05-01"}' ;;
esac
"""


def stub(folder: Path) -> Path:
    """The folder, with the stub."""
    (folder / "dmtg").write_text(STUB)
    (folder / "dmtg").chmod(0o755)
    return folder


def run_locally(
    what: str, given: Mapping[str, Any], folder: Path, programs: Path = BIN
) -> subprocess.CompletedProcess[str]:
    """A component, or the pipeline, by the local runner."""
    words = (str(PIPELINE.parent), str(folder / "outputs"), what, json.dumps(given))
    return in_kfp("-W", "ignore", "-c", RUN, *words, folder=folder, programs=programs)


@pytest.fixture(scope="module", autouse=True)
def kfp() -> None:
    if not Path(PYTHON).exists():
        pytest.skip("no .kfp: `make .kfp` installs Kubeflow's SDK")


COMPILED = """
import inspect, pathlib, sys
sys.path.insert(0, sys.argv[1])
from kfp import Client
import pipeline
pipeline.compile_to(pathlib.Path(sys.argv[2]))
text = inspect.getsource(pipeline.every_night)
assert "max_concurrency=1" in text
inspect.signature(Client.create_recurring_run).bind(None, experiment_id="", job_name="", cron_expression="",
    max_concurrency=1, no_catchup=True, pipeline_package_path="")
print(pipeline.EVERY_NIGHT)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str]]:
    """The compiled pipeline, and the fields of the time at which it is scheduled."""
    new = tmp_path_factory.mktemp("compiled") / "new.yaml"
    done = in_kfp("-W", "error", "-c", COMPILED, str(PIPELINE.parent), str(new))
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(new.read_text(encoding="utf-8")), done.stdout.split()


def test_what_is_committed_is_what_the_pipeline_compiles_to(compiled: tuple[Any, list[str]]) -> None:
    held = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))
    # another release of kfp names itself, and no more than that
    assert compiled[0] | {"sdkVersion": ""} == held | {"sdkVersion": ""}


def test_nightly_runs_come_one_at_a_time_at_the_hour_of_the_other_schedulers(
    compiled: tuple[Any, list[str]],
) -> None:
    assert compiled[1] == ["0", "15", "2", "*", "*", "*"]
    cron = (ROOT / "cluster" / "systemd" / "crontab").read_text(encoding="utf-8")
    assert "\n15 2 * * * " in cron


@pytest.mark.parametrize("command", others_in_soak(["stub", "real"], "stub"))
def test_a_step_that_fails_says_why_and_fails(tmp_path: Path, command: str) -> None:
    given = {"command": "train", "config": "rooms", "words": ["train.epoch=2"], "gives": "run_dir", "cluster": ""}
    done = run_locally("dmtg", given, tmp_path, stub(tmp_path) if command == "stub" else BIN)
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "unknown key train.epoch" in text
    assert "did you mean" in text
    assert "ended with exit code 2" in text


def test_a_step_gets_the_date_and_the_address_that_the_one_before_gives(tmp_path: Path) -> None:
    given = {
        "config": "nightly.yaml", "cluster": "", "date": "2026-05-01", "shard_words": ["data.rows_per_shard=8"],
        "sweep_words": ["sweep.groups=[2,3]"], "regroup_words": ["--kept-ok"],
    }  # fmt: skip
    done = run_locally("night", given, tmp_path, stub(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert (tmp_path / "calls").read_text().splitlines() == [
        "shard -c nightly.yaml data.rows_per_shard=8 --night 2026-05-01 --json",
        "sweep -c nightly.yaml sweep.groups=[2,3] data.shards=sets/2026-05-01 --json",
        "regroup -c sweeps/best.yaml --kept-ok --night 2026-05-01 --json",
    ]


@pytest.mark.soak
def test_a_nightly_run_goes_from_raw_files_to_a_verdict_on_the_best_setting_of_its_sweep(tmp_path: Path) -> None:
    values = config_values(write_images(tmp_path / "raw"), tmp_path, train={"epochs": 2}, gate={"prune": False})
    values["regroup"] = {"shards": str(tmp_path / "dated")}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    given = {
        "config": str(file), "cluster": "", "date": "2026-05-01", "shard_words": [],
        "sweep_words": ["sweep.groups=[3]", "sweep.gate_learning_rates=[0.01, 0.1]"],
        "regroup_words": ["--kept-ok"],
    }  # fmt: skip
    done = run_locally("night", given, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = [line.strip() for line in done.stdout.splitlines()]  # what steps print is indented
    objects = [json.loads(line) for line in lines if line.startswith('{"command"')]
    assert [one["command"] for one in objects] == ["shard", "sweep", "regroup"]
    assert all(one["status"] == "done" for one in objects)
    sharded, swept, night = objects
    assert sharded["shards"] == str(tmp_path / "dated" / "2026-05-01")
    assert (night["night"], night["verdict"]) == ("2026-05-01", "promoted")
    plan = json.loads((Path(night["report"]).parent / "plan.json").read_text())
    assert plan["shards"] == sharded["shards"]
    trained = yaml.safe_load((Path(night["report"]).parent / "challenger" / "config.yaml").read_text())
    best = yaml.safe_load(Path(swept["best_config"]).read_text())
    assert best["network"]["groups"] == 3  # the configuration of the pipeline has two
    assert trained["network"] == best["network"]
