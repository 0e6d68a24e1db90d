"""MLflow runs of drivers that were killed: none is left running, and none is created twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dmtg_core.input_spec import InputSpec
from dmtg_core.network.encoders import EncoderSpec
from dmtg_core.tasks import Task
from pipelines.config.loading import Config
from pipelines.config.sections import TrackSection
from pipelines.config.validation import checked
from pipelines.data.manifest import Manifest
from pipelines.data.sources.base import Description, Source
from pipelines.registry import lost_runs
from pipelines.registry.lost_runs import PROCESS, owner_tag
from pipelines.registry.tracking import Tracker, connect, open_tracker
from pipelines.storage import locate
from tests.pipelines.kill_points import kill_points
from tests.pipelines.untrained import finish
from tests.soak import others_in_soak


def opened(folder: str, uri: str, experiment: str) -> Tracker:
    """The tracker of a run folder."""
    track = {"uri": uri, "experiment": experiment}
    config = checked(Config, {"name": "made", "data": {"shards": "shards"}, "track": track})
    manifest = Manifest(Description(InputSpec("features", (2,)), (Task("task", "binary"),), {}), {}, {})
    return open_tracker(config, locate(folder), manifest)


def runs(section: TrackSection, experiment: str) -> list[Any]:
    client = connect(section)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def test_a_driver_that_is_killed_while_it_creates_its_run_finds_the_run_again(section, tmp_path: Path) -> None:
    connect(section).create_experiment("created")
    with kill_points() as points:
        assert not points.ended(lambda: opened(str(tmp_path / "x"), section.uri, "created"), None)
        writes = points.calls
        assert writes[0] == "write_bytes tracking.json"
        assert "create_run" in writes
        for at in range(len(writes)):
            folder = str(tmp_path / str(at))
            assert points.ended(lambda: opened(folder, section.uri, "created"), at)  # noqa: B023 - called at once
            run_id = opened(folder, section.uri, "created").run_id
            (found,) = [run for run in runs(section, "created") if run.info.run_name == str(at)]
            assert (found.info.run_id, found.info.status) == (run_id, "RUNNING")
            assert found.data.params["name"] == "made"
            assert opened(folder, section.uri, "created").run_id == run_id


def test_the_next_command_ends_the_run_of_a_killed_driver_and_no_other(
    section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(section).create_experiment("lost")
    mine = opened(str(tmp_path / "mine"), section.uri, "lost").run_id
    elsewhere = opened(str(tmp_path / "elsewhere"), section.uri, "lost").run_id
    client = connect(section)
    tag = json.loads(client.get_run(elsewhere).data.tags[PROCESS])
    client.set_tag(elsewhere, PROCESS, json.dumps(tag | {"host": "another machine", "pid": 2**22 + 1}))
    others = {
        mine: "RUNNING",
        elsewhere: "RUNNING",
        client.create_run(client.get_run(mine).info.experiment_id).info.run_id: "RUNNING",
    }
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]) as process:  # its driver
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda: process.pid)
            tag = owner_tag()
        lost = opened(str(tmp_path / "lost"), section.uri, "lost").run_id
        client.set_tag(lost, PROCESS, tag[PROCESS])
        lost_runs.searched.clear()  # as in a new process
        connect(section.model_copy(update={"experiment": "lost"}))
        assert client.get_run(lost).info.status == "RUNNING"
        process.send_signal(signal.SIGKILL)
    assert client.get_run(lost).info.status == "RUNNING"
    lost_runs.searched.clear()  # as in a new process
    connect(section.model_copy(update={"experiment": "lost"}))
    assert {run.info.run_id: run.info.status for run in runs(section, "lost")} == others | {lost: "KILLED"}
    assert opened(str(tmp_path / "lost"), section.uri, "lost").run_id == lost
    lost_runs.searched.clear()
    connect(section.model_copy(update={"experiment": "lost"}))
    assert client.get_run(lost).info.status == "RUNNING"


@pytest.mark.parametrize("every", others_in_soak([1, 7], 7))
def test_a_registration_that_is_killed_at_any_write_leaves_nothing_unfinished(
    source: Source, embedded: dict[str, str], root: Path, every: int
) -> None:
    def registered(name: str) -> Any:
        return finish(source, EncoderSpec("mlp"), root, embedded, name=name, groups=1)

    with kill_points() as points:
        made = registered(f"every{every}")
        assert not points.ended(made.register, None)
        writes = points.calls
        assert {"log_model_artifacts", "create_model_version", "set_registered_model_alias"} <= set(writes)
        for at in range(every - 1, len(writes), every):
            name = f"every{every}_{at}"
            made = registered(name)
            assert points.ended(made.register, at)
            assert [model.uri for model in made.register()] == [f"models:/{name}/1", f"models:/{name}.group_0/1"]
            client = connect(made.config.track)
            experiment = client.get_run(made.run_id).info.experiment_id
            logged = client.search_logged_models([experiment], f"source_run_id = '{made.run_id}'")
            assert {str(model.status) for model in logged} == {"READY"}, (at, writes[at])
            assert client.get_registered_model(name).aliases == {"challenger": 1}
