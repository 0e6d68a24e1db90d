"""Registered models of a frozen encoder: its weights are registered once or named, and are fetched and checked."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch

from pipelines.errors import UserError
from pipelines.registry.base_versions import DIGEST
from pipelines.registry.bases import ENVIRONMENT
from pipelines.registry.models import load_groups
from pipelines.registry.records import versions
from pipelines.registry.tracking import connect
from pipelines.runs.models import write_models
from pipelines.serving.fitting import open_model
from pipelines.storage import locate
from tests.dmtg_core.pretrained import changed
from tests.dmtg_core.training.test_batching import assert_close
from tests.pipelines.frozen import Pictures, encoder, pictures, write_weights
from tests.pipelines.untrained import Finished, finish
from tests.soak import others_in_soak

pytest.importorskip("timm")
STORED = torch.from_numpy(pictures())


def finished(name: str, file: str, root: Path, track: dict[str, str], branch: str = "lora") -> Finished:
    """A run of two groups, with changed branches, in a complete folder."""
    run = finish(Pictures(), encoder(file, branch), root, track, name=name, groups=2)
    for model in run.models.values():
        changed(model.network)
    write_models(locate(str(run.run / "models")), run.models)
    return replace(run, models={group: model.eval() for group, model in run.models.items()})


def outputs(models) -> dict[str, torch.Tensor]:
    return {name: out for model in models for name, out in model(STORED).items()}


def decoded(run: Finished) -> dict[str, torch.Tensor]:
    return {name: out for model in run.models.values() for name, out in model.predict(STORED).items()}


def check_serves(run: Finished, uri: str, groups: dict[str, list[str]]) -> None:
    """Check the predictions of a version, loaded by DMTG and by MLflow."""
    for loaded in (load_groups(uri, run.config.track), open_model(uri, run.config.track).groups):
        assert list(loaded) == list(groups)
        tasks = {task for group in groups.values() for task in group}
        expected = {name: out for name, out in outputs(run.models.values()).items() if name in tasks}
        assert_close(outputs(loaded.values()), expected, 1e-5)
        assert len({id(model.network.stem) for model in loaded.values()}) == 1
    predicted = mlflow.pyfunc.load_model(uri).predict(pictures())
    for name, values in decoded(run).items():
        if name in tasks:
            torch.testing.assert_close(torch.from_numpy(predicted[name]), values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("branch", others_in_soak(["lora", "last"], "lora"))
def test_frozen_weights_are_registered_once(branch, root, embedded, tmp_path) -> None:
    file, name = Path(write_weights(tmp_path)), f"base_{branch}"
    run = finished(name, str(file), root, embedded, branch)
    file.unlink()
    composite, *members = run.register()
    client = connect(run.config.track)
    (base,) = versions(client, f"{name}.base")
    assert base.tags[DIGEST] == run.models["group_0"].network.frozen_digest
    check_serves(run, composite.uri, run.result["grouping"])
    for member, group in zip(members, run.result["grouping"], strict=True):
        check_serves(run, member.uri, {group: run.result["grouping"][group]})
    place = Path(mlflow.artifacts.download_artifacts(composite.uri, dst_path=str(tmp_path)))
    assert not [held for held in place.rglob("*") if held.name == "base.safetensors"]
    described = json.loads((place / "artifacts" / "base.json").read_text())
    assert described == {"digest": base.tags[DIGEST], "name": f"{name}.base", "version": "1"}
    again = finished(name, write_weights(tmp_path), root, embedded, branch)
    assert again.register()[0].version == 2
    assert len(versions(client, f"{name}.base")) == 1
    other = finished(name, write_weights(tmp_path, 1), root, embedded, branch)
    assert other.register()[0].version == 3
    assert len(versions(client, f"{name}.base")) == 2
    check_serves(other, f"models:/{name}/3", other.result["grouping"])
    check_serves(run, f"models:/{name}/1", run.result["grouping"])


def test_a_registration_that_was_interrupted_does_not_copy_weights_again(root, embedded, tmp_path) -> None:
    run = finished("base_again", write_weights(tmp_path), root, embedded)
    first = run.register()
    assert run.register() == first
    assert len(versions(connect(run.config.track), "base_again.base")) == 1


def test_weights_of_a_reference_are_not_copied(root, embedded, tmp_path, monkeypatch) -> None:
    file = Path(write_weights(tmp_path))
    run = finished("base_named", str(file), root, embedded | {"base": "reference"})
    composite = run.register()[0]
    assert not [
        one for one in connect(run.config.track).search_registered_models() if one.name == "base_named.base"
    ]
    check_serves(run, composite.uri, run.result["grouping"])
    moved = file.rename(tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match=f"frozen weights are missing: there is no {file}") as caught:
        load_groups(composite.uri, run.config.track)
    assert ENVIRONMENT in caught.value.remedy
    monkeypatch.setenv(ENVIRONMENT, str(moved))
    check_serves(run, composite.uri, run.result["grouping"])
    monkeypatch.setenv(ENVIRONMENT, str(run.run / "models" / "base"))
    check_serves(run, composite.uri, run.result["grouping"])
    monkeypatch.setenv(ENVIRONMENT, write_weights(tmp_path, 1))
    with pytest.raises(UserError, match=r"frozen weights in .*weights_1.* have changed since training") as caught:
        load_groups(composite.uri, run.config.track)
    assert ENVIRONMENT in caught.value.remedy
    monkeypatch.setenv(ENVIRONMENT, "/nowhere")
    with pytest.raises(UserError, match="no such file or folder: /nowhere"):
        load_groups(composite.uri, run.config.track)


def test_a_deleted_copy_is_named(root, embedded, tmp_path, monkeypatch) -> None:
    file = Path(write_weights(tmp_path))
    run = finished("base_gone", str(file), root, embedded)
    composite = run.register()[0]
    client = connect(run.config.track)
    client.delete_model_version("base_gone.base", "1")
    with pytest.raises(UserError, match="cannot load the frozen weights models:/base_gone.base/1") as caught:
        load_groups(composite.uri, run.config.track)
    assert ENVIRONMENT in caught.value.remedy
    monkeypatch.setenv(ENVIRONMENT, str(file))
    check_serves(run, composite.uri, run.result["grouping"])


def test_the_registered_weights_are_listed_and_shown(root, embedded, tmp_path, caplog) -> None:
    from pipelines.registry.versions import list_models, show_model

    with caplog.at_level(logging.INFO):
        run = finished("base_listed", write_weights(tmp_path), root, embedded)
        run.register()
    names = [entry["name"] for entry in list_models(run.config.track, "base_listed")]
    assert names == ["base_listed", "base_listed.base", "base_listed.group_0", "base_listed.group_1"]
    assert show_model(run.config.track, "base_listed.base")["uri"] == "models:/base_listed.base/1"
