"""Sweeps on both executors: their results, no trial twice, and resuming after a kill."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import yaml

from pipelines.config.loading import Config, load_config
from pipelines.data.manifest import read_manifest
from pipelines.errors import UserError
from pipelines.runs.files import read_jsonl
from pipelines.runs.identity import record_identity
from pipelines.storage import locate
from pipelines.sweep.driver import SweepResult, sweep
from pipelines.sweep.plan import Plan
from pipelines.sweep.trials import sweep_name
from pipelines.training.driver import train
from tests.pipelines.conftest import ON_RAY
from tests.pipelines.driver import Driver, Undisturbed, same, workers

ON_TUNE = pytest.param({**ON_RAY, "object_store_mib": 128}, marks=[pytest.mark.ray, pytest.mark.soak], id="Ray")
EMBEDDED = pytest.param({"executor": "embedded"}, id="embedded")
FAR = {"family": "constant", "start": 1e-44}  # logits divided by it are not finite
NEAR = {"family": "constant", "start": 2.5}
NAIVE, GOOD, BAD = "naive_mtl_seed22", "groups2_constant2.5_seed22", "groups2_constant1e-44_seed22"
Ran = tuple[Config, SweepResult, list[str]]


def swept_config(undisturbed: Undisturbed, root: Path, **sections: dict[str, Any]) -> Config:
    """The configuration of a run as that of a sweep with everything below `root`."""
    values = undisturbed[0].model_dump(mode="json")
    own = {"run": {"root": str(root / "runs")}, "track": {"uri": f"sqlite:///{root / 'mlflow.db'}"}}
    for name, section in {**own, **sections}.items():
        values[name] = values[name] | section
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def swept(run: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Three trials: naive MTL, a setting that can be trained, and one that cannot."""
    section = {"temperatures": [NEAR, FAR], "stop_early": False}
    config, logged = swept_config(run, tmp_path_factory.mktemp("sweep"), sweep=section), list[str]()
    return config, sweep(config, logged.append), logged


def rows(done: SweepResult) -> dict[str, dict[str, Any]]:
    return {row["trial"]: row for row in done.found["rows"]}


def test_trials_have_the_results_of_separate_runs(swept: Ran, run: Undisturbed) -> None:
    found = rows(swept[1])
    assert list(found) == [NAIVE, GOOD, BAD]
    naive, trial = found[NAIVE], found[GOOD]
    for mine, theirs in (
        (naive["metrics"], run[1].result["baseline"]),
        (trial["metrics"], run[1].result["metrics"]),
    ):
        for task, figures in theirs.items():
            assert mine[task] == pytest.approx(figures, rel=1e-4, abs=1e-5), task
    assert trial["grouping"] == run[1].result["grouping"]
    assert trial["gain"] == pytest.approx(run[1].result["normalized_gain"], rel=1e-3, abs=1e-3)
    assert naive["gain"] == 0
    assert naive["gain_validation"] in (0, None)  # an error of 0 has no relative change
    assert trial["flops"] > naive["flops"] or len(trial["grouping"]) == 1
    assert (trial["epochs"], trial["status"]) == (4, "finished")


def test_a_failed_trial_is_a_row_with_its_reason_and_the_others_continue(swept: Ran) -> None:
    _, done, logged = swept
    found = rows(done)
    assert {name: row["status"] for name, row in found.items()} == {
        NAIVE: "finished", GOOD: "finished", BAD: "failed"
    }  # fmt: skip
    assert "finite" in found[BAD]["reason"]
    assert any(line.startswith(f"{BAD}: failed: {found[BAD]['reason']} (") for line in logged)
    assert f"{BAD} failed: {found[BAD]['reason']}" in done.found["notes"]


@pytest.mark.parametrize("place", [EMBEDDED, ON_TUNE])
def test_a_stopped_trial_frees_its_processes_and_cpus(
    swept: Ran, run: Undisturbed, tmp_path: Path, place: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    on_ray = place["executor"] == "ray"
    if on_ray:
        request.getfixturevalue("ray_session")
    section, long = {"groups": [2, 3], "grace_epochs": 1, "reduction": 2}, {"epochs": 1000}
    config = swept_config(run, tmp_path, sweep=section, train=long, track={"uri": "none"}, ray=place)
    plan = Plan(config, locate(config.run.root) / sweep_name(config))
    planned = {trial.name: trial.run for trial in plan.trials.values()}
    for name, source in ((NAIVE, NAIVE), ("groups2_seed22", GOOD)):  # as an earlier session would have left them
        shutil.copytree(f"{swept[1].folder}/trials/{source}", str(planned[name]))
    record_identity(planned[NAIVE].parent.parent, config, read_manifest(locate(config.data.shards)).digest())
    metrics = planned["groups2_seed22"] / "metrics.jsonl"
    metrics.write_text(re.sub(r'"val_score": [^,]+', '"val_score": -100.0', metrics.read_text()))
    logged: list[str] = []
    found = rows(sweep(config, logged.append))["groups3_seed22"]
    assert (found["status"], found["reason"]) == ("stopped", "not among the best 1/2 of the settings at epoch 1")
    assert 1 <= found["epochs"] < 1000
    how = "on Ray Tune with 2 workers each" if on_ray else "in processes of their own (embedded)"
    assert f"1 of 3 trials to train, 1 at a time {how}, samples in memory" in logged
    if not on_ray:
        assert not multiprocessing.active_children()
        return
    import ray

    while workers(psutil.Process().children(recursive=True)):  # their controller ends them a moment later
        time.sleep(0.1)
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        time.sleep(0.1)


def test_mlflow_has_a_run_for_the_sweep_and_a_child_run_for_each_trial(swept: Ran) -> None:
    config, done, _ = swept
    client = mlflow.MlflowClient(config.track.uri)
    parent = client.get_run(done.run_id)
    assert parent.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(done.run_id)} >= {"sweep.html", "best.yaml", "sweep.json"}
    below = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{done.run_id}'")
    assert {run.info.run_name: run.info.status for run in below} == {
        name: "FINISHED" if row["status"] == "finished" else "FAILED" for name, row in rows(done).items()
    }
    trial = next(run for run in below if run.info.run_name == GOOD)
    assert trial.data.metrics["normalized_gain"] == pytest.approx(rows(done)[GOOD]["gain"])
    assert len(client.get_metric_history(trial.info.run_id, "score/start_0")) == 4
    assert client.search_registered_models() == []


def test_train_accepts_the_best_configuration_of_a_sweep(
    swept: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, done, _ = swept
    assert done.found["best"]["label"] == "groups2_constant2.5"
    monkeypatch.chdir(tmp_path)  # where no ray_config.yaml is
    found = train(load_config(str(done.best_config), [f"run.root={tmp_path}", "track.uri=none"]))
    same(found.result, rows(done)[GOOD] | {"baseline": rows(done)[NAIVE]["metrics"]})


def test_the_same_command_trains_only_failed_trials_again(swept: Ran) -> None:
    config, done, _ = swept
    before = ended(Path(str(done.folder)))
    logged: list[str] = []
    again = sweep(config, logged.append)
    assert ended(Path(str(done.folder))) == before
    assert again.found == json.loads((done.folder / "sweep.json").read_text())
    assert [line for line in logged if ": epoch " in line] == []
    assert any(line.startswith("1 of 3 trials to train") for line in logged)


def test_a_setting_that_cannot_be_built_is_refused_before_the_first_trial(
    run: Undisturbed, tmp_path: Path
) -> None:
    config = swept_config(run, tmp_path, sweep={"stems": [0, 9]}, track={"uri": "none"})
    with pytest.raises(UserError, match="setting groups2_stem9: .*stem") as found:
        sweep(config)
    assert found.value.wrong_use
    assert not list((tmp_path / "runs").rglob("metrics.jsonl"))


def ended(folder: Path) -> dict[str, int]:
    """The trials that have ended, and when."""
    files = [file for name in ("result.json", "stopped.json") for file in folder.glob(f"trials/*/{name}")]
    return {file.parent.name: file.stat().st_mtime_ns for file in files}


@dataclass
class SweepDriver(Driver):
    """`dmtg sweep` as a process of its own."""

    def command(self) -> list[str]:
        """Its command line."""
        config = self.root / "config.yaml"
        config.write_text(yaml.safe_dump(dict(self.values)))
        return [sys.executable, "-m", "pipelines.cli", "sweep", "-c", str(config), "--json"]


def in_progress(driver: SweepDriver) -> bool:
    """Whether a trial is between its first checkpoint and its end."""
    begun = {file.parents[1].name for file in driver.folder.glob("trials/*/checkpoints/*")}
    return bool(begun - set(ended(driver.folder)))


@pytest.mark.soak
@pytest.mark.parametrize("place", [EMBEDDED, ON_TUNE])
def test_a_sweep_that_was_killed_and_terminated_resumes_with_its_unfinished_trials(
    run: Undisturbed, tmp_path: Path, place: dict[str, Any]
) -> None:
    section = {"seeds": [22, 23], "grace_epochs": 1, "reduction": 2}
    config = swept_config(run, tmp_path, sweep=section, ray=place | {"workers": 1}, run={"name": "disturbed"} | {
        "root": str(tmp_path / "runs")})  # fmt: skip
    driver = SweepDriver(tmp_path, config.model_dump(mode="json"))
    driver.start()
    driver.wait_for(lambda: ended(driver.folder) and in_progress(driver))
    driver.lose()
    first = ended(driver.folder)

    process = driver.start()
    driver.wait_for(lambda: len(ended(driver.folder)) > len(first) and in_progress(driver))
    family = driver.family()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143, driver.log
    psutil.wait_procs(family)  # all its processes end
    message = f"dmtg sweep stopped\nwhat: terminated\nwhere: {driver.folder}\nremedy: run the same command again"
    assert message in driver.log
    second = ended(driver.folder)

    found = driver.finish()
    last = ended(driver.folder)
    assert first.items() <= second.items() <= last.items()  # no ended trial runs again
    assert len(last) == len(found["rows"]) == 4
    assert {row["status"] for row in found["rows"]} <= {"finished", "stopped"}
    naive = {row["seed"]: row for row in found["rows"] if row["naive"]}
    assert {row["status"] for row in naive.values()} == {"finished"}
    for row in found["rows"]:
        epochs = [record["epoch"] for record in read_jsonl(locate(row["run_dir"]) / "metrics.jsonl")]
        assert epochs == list(range(1, row["epochs"] + 1))  # none is missing, none was trained twice
        assert row["epochs"] == 4 or row["status"] == "stopped"
    assert found["best"]["label"] == "groups2"
    tracked = mlflow.MlflowClient(config.track.uri)
    assert tracked.get_run(found["run_id"]).info.status == "FINISHED"


@pytest.mark.soak
def test_a_sweep_of_rooms_that_was_killed_half_way_runs_no_finished_trial_again(tmp_path: Path) -> None:
    overrides = [
        f"source.root={tmp_path / 'raw'}", f"data.shards={tmp_path / 'shards'}", f"run.root={tmp_path / 'runs'}",
        "source.options={buildings: 4, points: 16, resolution: 48, size: 32}", "train.epochs=3",
        "run.name=disturbed", "track.uri=none", "ray.workers=1", "ray.object_store_mib=128", "data.min_support=1",
        "sweep.grace_epochs=1", "sweep.groups=[2, 3, 4]", "sweep.stems=[0, 1]", "sweep.seeds=[1, 2]",
    ]  # fmt: skip
    driver = SweepDriver(tmp_path, load_config("rooms", overrides).model_dump(mode="json"))
    driver.start()
    driver.wait_for(lambda: len(ended(driver.folder)) >= 7 and in_progress(driver))
    driver.lose()
    first = ended(driver.folder)
    found = driver.finish()
    last = ended(driver.folder)
    assert 7 <= len(first) < len(last) == len(found["rows"]) == 14
    assert first.items() <= last.items()
    assert all(row["status"] == ("stopped" if row["reason"] else "finished") for row in found["rows"])
    assert any(row["status"] == "stopped" for row in found["rows"])
    assert found["pareto"][0]["label"] == "naive_mtl"
