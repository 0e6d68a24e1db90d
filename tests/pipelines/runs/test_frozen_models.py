"""Group models of a frozen encoder: a folder of models is complete without the encoder's own file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dmtg_core import GroupingNetwork
from dmtg_core.network.grouping_network import clone
from dmtg_core.training.checkpoint import BASE, BASE_WEIGHTS, save_base
from pipelines.config.sections import TrackSection
from pipelines.errors import UserError
from pipelines.registry.models import load_groups
from pipelines.runs.models import group_names, read_model, warm_start, write_models
from pipelines.runs.warm_start import START, keep_models
from pipelines.storage import Location, locate
from tests.dmtg_core.training.test_batching import assert_close
from tests.pipelines.frozen import network, pictures, write_weights
from tests.pipelines.s3_server import BUCKET

pytest.importorskip("timm")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return Path(write_weights(tmp_path))


def outputs(models) -> dict[str, torch.Tensor]:
    return {name: out for model in models for name, out in model(torch.from_numpy(pictures())).items()}


def expected(trained: GroupingNetwork) -> dict[str, torch.Tensor]:
    return trained(torch.from_numpy(pictures()))


@pytest.mark.parametrize("branch", ["lora", "last"])
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_models_are_read_without_the_file_of_the_encoder(branch, place, weights, tmp_path, request) -> None:
    trained = network(str(weights), branch)
    if place == "s3":
        request.getfixturevalue("s3")
    models = locate(f"s3://{BUCKET}/frozen/{branch}/models" if place == "s3" else str(tmp_path / "run" / "models"))
    write_models(models, trained.specialise())
    weights.unlink()
    assert models.folders() == [BASE, "group_0", "group_1"]
    found = {name: read_model(models / name) for name in group_names(models)}
    assert list(found) == ["group_0", "group_1"]
    assert_close(outputs(found.values()), expected(trained), 1e-5)
    assert len({id(model.network.stem) for model in found.values()}) == 1


def test_frozen_weights_are_written_once(weights, tmp_path) -> None:
    trained = network(str(weights))
    models = locate(str(tmp_path / "run" / "models"))
    write_models(models, trained.specialise())
    written = (tmp_path / "run" / "models" / BASE / BASE_WEIGHTS).stat().st_mtime_ns
    write_models(models, clone(trained).specialise())
    assert (tmp_path / "run" / "models" / BASE / BASE_WEIGHTS).stat().st_mtime_ns == written


def test_a_run_folder_serves_without_the_file_of_the_encoder(weights, tmp_path) -> None:
    trained, run = network(str(weights)), tmp_path / "run"
    write_models(locate(str(run / "models")), trained.specialise())
    (run / "grouping.json").write_text(trained.grouping().to_json())
    weights.unlink()
    found = load_groups(str(run), TrackSection(uri="none"))
    assert list(found) == ["group_0", "group_1"]
    assert_close(outputs(found.values()), expected(trained), 1e-5)


def test_changed_and_missing_frozen_weights_are_named(weights, tmp_path) -> None:
    models = locate(str(tmp_path / "run" / "models"))
    write_models(models, network(str(weights)).specialise())
    weights.unlink()
    folder = tmp_path / "run" / "models"
    save_base(folder / BASE, network(write_weights(tmp_path, 1)))
    with pytest.raises(UserError, match=rf"the frozen weights in {folder}/base have changed") as caught:
        read_model(models / "group_0")
    assert "put the frozen weights back" in caught.value.remedy
    for file in (folder / BASE).iterdir():
        file.unlink()
    (folder / BASE).rmdir()
    with pytest.raises(UserError, match=rf"missing: neither {folder}/base nor {weights} exists"):
        read_model(models / "group_0")


def copies(weights: Path, tmp_path: Path) -> Location:
    """A run that starts from models whose encoder's file is gone by now."""
    place, run = locate(str(tmp_path / "trained")), locate(str(tmp_path / "run"))
    write_models(place, network(str(weights)).specialise())
    models = warm_start([(name, place / name) for name in group_names(place)])
    keep_models(models, run)
    return run


def test_a_run_has_copies_of_the_models_that_it_starts_from(weights, tmp_path) -> None:
    trained, run = network(str(weights)), copies(weights, tmp_path)
    weights.unlink()
    kept = warm_start(keep_models(None, run))
    assert kept is not None
    assert kept.names == ("group_0", "group_1")
    assert (run / START / BASE).is_dir()
    assert_close(outputs(kept.models), expected(trained), 1e-5)
    started = clone(trained)
    with torch.no_grad():
        for parameter in started.branches.parameters():
            parameter.zero_()
    kept.apply(started)
    assert_close(dict(started.branches.state_dict()), dict(trained.branches.state_dict()), 0)
