"""Networks of more than ten branches that an earlier version trained wrongly are refused everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import yaml

from dmtg_core import GroupingNetwork
from dmtg_core.network.encoders import EncoderSpec
from dmtg_core.training.checkpoint import SEAL, OutdatedNetworkError, save_network
from pipelines.compare.cells import FORMAT, Cell
from pipelines.compare.job import CellJob
from pipelines.compare.training import train_cells
from pipelines.config.ray_section import RaySection
from pipelines.config.sections import TrackSection
from pipelines.data.sources.base import Source
from pipelines.errors import UserError
from pipelines.execution.embedded import EmbeddedExecutor
from pipelines.registry.models import _branches, load_groups
from pipelines.registry.tracking import connect
from pipelines.runs.files import CONFIG
from pipelines.runs.models import check_models, read_model
from pipelines.storage import locate
from pipelines.training.failures import permanent_error
from tests.dmtg_core.samples import mlp_spec
from tests.pipelines.untrained import Finished, finish, small_table

REMEDY = "train it again with dmtg train and another run.name"


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "table").mkdir()
    return small_table(tmp_path / "table")


def outdated(run: Path) -> None:
    """Rewrite the networks of a folder in the format of the previous version."""
    for file in run.rglob("network.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 1}))
        file.with_name(SEAL).unlink(missing_ok=True)  # that version wrote no checksums of a model


def finished(source, root: Path, branches: int) -> Finished:
    """A run of the previous version, configured with so many branches, with tasks in two groups."""
    store = {"uri": f"sqlite:///{root}/mlflow.db"}
    done = finish(source, EncoderSpec("mlp"), root, store, name=f"before{branches}", groups=2)
    outdated(done.run)
    (done.run / CONFIG).write_text(yaml.safe_dump({"network": {"groups": branches}}))
    (done.run / "grouping.json").write_text("{}")
    connect(done.config.track).log_param(done.run_id, "network.groups", branches)
    return done


@pytest.mark.parametrize("branches", [10, 11])
def test_a_run_and_its_registered_models(source, tmp_path, branches) -> None:
    done = finished(source, tmp_path, branches)
    done.register()
    places = [str(done.run), f"models:/before{branches}/1", f"models:/before{branches}.group_1/1"]
    if branches == 10:
        assert [list(load_groups(place, done.config.track)) for place in places] == [
            ["group_0", "group_1"], ["group_0", "group_1"], ["group_1"],
        ]  # fmt: skip
        return
    for place in places:
        with pytest.raises(UserError, match="on 11 branches, .* train it again") as error:
            load_groups(place, done.config.track)
        assert (error.value.where, error.value.remedy) == (place, REMEDY)
    with pytest.raises(UserError, match="on 11 branches"):
        read_model(locate(str(done.run / "models" / "group_0")))


def test_a_finished_run_with_such_models_is_refused(source, tmp_path) -> None:
    done = finished(source, tmp_path, 12)
    config = done.config.model_copy(update={"network": done.config.network.model_copy(update={"groups": 12})})
    with pytest.raises(UserError, match="on 12 branches"):
        check_models(config, locate(str(done.run)))
    check_models(done.config, locate(str(tmp_path / "no run")))


def test_a_registered_model_of_more_than_ten_groups_is_refused_when_it_is_loaded(tmp_path) -> None:
    from pipelines.registry.pyfunc_model import GroupPredictor

    network = GroupingNetwork(mlp_spec(groups=11, initial="diagonal", initial_scale=5.0))
    groups = network.specialise()
    for name, model in groups.items():
        save_network(tmp_path / "groups" / name, model.network)
    grouping = {"groups": {f"group_{n}": [f"task {n}"] for n in range(11)}}
    (tmp_path / "grouping.json").write_text(json.dumps(grouping))
    context = SimpleNamespace(
        artifacts={"groups": str(tmp_path / "groups"), "grouping": str(tmp_path / "grouping.json")}
    )
    GroupPredictor().load_context(context)
    outdated(tmp_path)
    with pytest.raises(OutdatedNetworkError, match="on 11 branches"):
        GroupPredictor().load_context(context)


def test_training_that_resumes_from_such_a_checkpoint_ends_with_a_remedy(source, tmp_path) -> None:
    config = finish(source, EncoderSpec("mlp"), tmp_path, {"uri": f"sqlite:///{tmp_path}/m.db"}, name="x").config
    error = OutdatedNetworkError("/run/checkpoint: an earlier version trained this")
    found = permanent_error(error, config, "/run", 1)
    assert found is not None
    assert (found.what, found.where) == ("an earlier version trained this", "/run")
    assert "another run.name" in found.remedy


def test_results_of_a_comparison_by_the_previous_version_are_not_mixed_with_new_ones(tmp_path) -> None:
    class TrainedAgainError(Exception):
        """The cell is not read."""

    cell, logged = Cell("naive_mtl", 1), []
    file = locate(str(tmp_path)) / "cells" / f"{cell.name}.json"
    job, executor = CellJob(None, None, None, locate(str(tmp_path)), None), EmbeddedExecutor(RaySection())
    file.write_json({"format": FORMAT, "score": 1.0})
    assert train_cells(job, executor, [cell], logged.append)[cell]["score"] == 1.0
    file.write_json({"score": 1.0})

    def log(line: str) -> None:
        logged.append(line)
        if "to train" in line:
            raise TrainedAgainError

    with pytest.raises(TrainedAgainError):
        train_cells(job, executor, [cell], log)
    assert logged[0] == "1 results are from an earlier version with other figures: trained again"


def test_the_branches_of_a_model_are_those_of_its_run_or_else_its_number_of_groups(source, tmp_path) -> None:
    done = finished(source, tmp_path, 11)
    done.register()
    client = connect(done.config.track)
    described = mlflow.models.get_model_info("models:/before11/1")
    assert _branches(client, described) == 11
    client.delete_run(done.run_id)
    assert _branches(client, described) == 11  # a deleted run can still be read
    assert _branches(connect(TrackSection(uri=f"sqlite:///{tmp_path}/other.db")), described) == 2
    assert _branches(None, described) == 2
