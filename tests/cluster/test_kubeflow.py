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

# kfp needs an older protobuf than the lock file has, so `make` installs it in an environment of its own
PYTHON = str(ROOT / ".kfp" / "bin" / "python")

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


def in_kfp(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A run of the Python that has kfp; dmtg is that of these tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    held = {**os.environ, "PATH": path}
    return subprocess.run([PYTHON, *words], capture_output=True, text=True, check=False, env=held, cwd=folder)


def run_locally(what: str, given: Mapping[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    """A component, or the pipeline, by the local runner."""
    words = (str(PIPELINE.parent), str(folder / "outputs"), what, json.dumps(given))
    return in_kfp("-W", "ignore", "-c", RUN, *words, folder=folder)


@pytest.fixture(scope="module", autouse=True)
def kfp() -> None:
    if not Path(PYTHON).exists():
        pytest.skip("no .kfp: `make .kfp` installs Kubeflow's SDK")


def test_what_is_committed_is_what_the_pipeline_compiles_to(tmp_path: Path) -> None:
    code = """
import sys, pathlib
sys.path.insert(0, sys.argv[1])
import pipeline
pipeline.compile_to(pathlib.Path(sys.argv[2]))
"""
    done = in_kfp("-W", "error", "-c", code, str(PIPELINE.parent), str(tmp_path / "new.yaml"))
    assert done.returncode == 0, done.stderr
    new, held = ((yaml.safe_load(p.read_text(encoding="utf-8"))) for p in (tmp_path / "new.yaml", PIPELINE))
    # another release of kfp names itself, and no more than that
    assert new | {"sdkVersion": ""} == held | {"sdkVersion": ""}


def test_nightly_runs_come_one_at_a_time_at_the_hour_of_the_other_schedulers() -> None:
    code = """
import inspect, sys
sys.path.insert(0, sys.argv[1])
from kfp import Client
import pipeline
text = inspect.getsource(pipeline.every_night)
assert "max_concurrency=1" in text
inspect.signature(Client.create_recurring_run).bind(None, experiment_id="", job_name="", cron_expression="",
    max_concurrency=1, no_catchup=True, pipeline_package_path="")
print(pipeline.EVERY_NIGHT)
"""
    done = in_kfp("-W", "ignore", "-c", code, str(PIPELINE.parent))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "15", "2", "*", "*", "*"]
    cron = (ROOT / "cluster" / "systemd" / "crontab").read_text(encoding="utf-8")
    assert "\n15 2 * * * " in cron


def test_a_step_that_fails_says_why_and_fails(tmp_path: Path) -> None:
    given = {"command": "train", "config": "rooms", "words": ["train.epoch=2"], "gives": "run_dir", "cluster": ""}
    done = run_locally("dmtg", given, tmp_path)
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "unknown key train.epoch" in text
    assert "did you mean" in text
    assert "ended with exit code 2" in text


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
