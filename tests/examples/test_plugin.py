"""A package with an encoder, a source, a loss and a metric: trained with it, loaded with it and without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml

from dmtg_core import addresses
from pipelines.config.loading import Config, load_config
from pipelines.data.manifest import read_manifest
from pipelines.errors import UserError
from pipelines.registry.models import load_groups
from pipelines.registry.versions import show_model
from pipelines.runs.files import RESULT
from pipelines.serving.evaluate import evaluate
from pipelines.storage import locate
from pipelines.training.checks import check_network
from tests.paths import ROOT

PLUGIN = ROOT / "examples" / "plugin"
LOSS, METRIC = "dmtg_example.losses:log_cosh", "dmtg_example.metrics:relative_error"
ENCODER, SOURCE = "dmtg_example.encoders:GatedLayers", "dmtg_example.sources:ArraySource"
INSTALL = r"pip install 'dmtg-example==1\.0\.0'"


@dataclass(frozen=True)
class Done:
    """The folder of the installed package, the configuration, and the JSON of the training that used both."""

    package: Path
    config: str
    found: dict[str, Any]

    @property
    def loaded(self) -> Config:
        return load_config(self.config)


def write_mixture(file: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)).astype(np.float32)
    height = x[:, 0] * 3 + 10
    height[::7] = np.nan
    np.savez(file, features=x, height=height, weight=x[:, 1] ** 2, ripe=(x[:, 2] > 0).astype(np.int64))


def configuration(folder: Path) -> Path:
    """The configuration of the page of the package, with the folders of the test."""
    values = yaml.safe_load((PLUGIN / "README.md").read_text().split("```yaml\n")[1].split("```")[0])
    values["source"]["root"] = str(folder / "mixture.npz")
    values["data"]["shards"], values["run"]["root"] = str(folder / "shards"), str(folder / "runs")
    values |= {"train": {"epochs": 2, "trees": False}, "search": {"method": "dmtg", "group_epochs": 1}}
    values |= {"track": {"uri": f"sqlite:///{folder / 'mlflow.db'}"}, "ray": {"executor": "embedded"}}
    file = folder / "mixture.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The package is installed into a folder, and `dmtg train` writes shards, trains and registers with it."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, folder / "source")  # its build leaves files there
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(folder / "source")], check=True)
    write_mixture(folder / "mixture.npz")
    config = configuration(folder)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder / "site")])}
    command = [sys.executable, "-m", "pipelines.cli", "train", "-c", str(config), "--json"]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return Done(folder / "site", str(config), json.loads(ran.stdout.splitlines()[-1]))


@pytest.fixture(autouse=True)
def new_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has not imported the package, and has no permission to."""
    monkeypatch.setattr(addresses, "_allowed", {})
    monkeypatch.setattr(addresses, "_loaded", {})
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "dmtg_example"]:
        del sys.modules[name]


@pytest.fixture
def installed(done: Done, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(done.package)
    return done.package


def test_the_run_and_its_models_record_the_code(done: Done) -> None:
    result = json.loads((Path(done.found["run_dir"]) / RESULT).read_text())
    kinds = {one["address"]: one["kind"] for one in result["code"]}
    assert kinds == {ENCODER: "encoder", SOURCE: "source", LOSS: "loss", METRIC: "metric"}
    assert {(one["distribution"], one["version"]) for one in result["code"]} == {("dmtg-example", "1.0.0")}
    assert result["headline"] == {"height": METRIC, "weight": METRIC, "ripe": "accuracy"}
    assert result["metrics"]["height"][METRIC] >= 0
    mlflow.set_tracking_uri(done.loaded.track.uri)
    place = Path(mlflow.artifacts.download_artifacts(done.found["models"][0]))
    assert "dmtg-example==1.0.0" in (place / "requirements.txt").read_text().splitlines()
    facts = json.loads((place / "artifacts" / "details.json").read_text())
    assert {one["address"] for one in facts["code"]} == {ENCODER, LOSS, METRIC}
    shown = show_model(done.loaded.track, done.found["models"][0])["code"]
    assert f"encoder {ENCODER} of dmtg-example==1.0.0" in shown


def test_without_the_package_a_model_says_which_one_to_install(done: Done) -> None:
    track = done.loaded.track
    for address in (done.found["models"][0], done.found["run_dir"]):
        for trust in (False, True):
            with pytest.raises(UserError, match=INSTALL):
                load_groups(address, track, trust_code=trust)
    with pytest.raises(UserError, match=INSTALL):
        evaluate(done.loaded, done.found["run_dir"])
    mlflow.set_tracking_uri(track.uri)
    with pytest.raises(Exception, match=INSTALL):
        mlflow.pyfunc.load_model(done.found["models"][0])


def test_with_the_package_a_model_is_loaded_if_it_is_allowed(done: Done, installed: Path) -> None:
    track, address = done.loaded.track, done.found["models"][0]
    for place in (address, done.found["run_dir"]):
        with pytest.raises(UserError, match="--trust-code"):
            load_groups(place, track)
    assert "dmtg_example" not in sys.modules
    groups = load_groups(address, track, trust_code=True)
    assert sorted(task.name for model in groups.values() for task in model.tasks) == ["height", "ripe", "weight"]
    assert type(next(iter(groups.values())).network).__name__ == "GroupingNetwork"


def test_what_the_configuration_names_is_allowed(done: Done, installed: Path) -> None:
    found = evaluate(done.loaded, done.found["models"][0])
    assert found["height"][METRIC] == pytest.approx(done.found["metrics"]["height"][METRIC])
    assert found["weight"]["loss"] == pytest.approx(done.found["metrics"]["weight"]["loss"])


def test_mlflow_loads_it_without_an_option(done: Done, installed: Path) -> None:
    mlflow.set_tracking_uri(done.loaded.track.uri)
    model = mlflow.pyfunc.load_model(done.found["models"][0])
    with np.load(Path(done.config).with_name("mixture.npz")) as held:
        assert model.predict(held["features"][:3])["height"].shape == (3,)


def test_another_version_is_refused_with_both_unless_it_is_trusted(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "site"
    shutil.copytree(done.package, other)
    file = other / "dmtg_example" / "encoders.py"
    file.write_text(file.read_text().replace("nn.GLU(dim=1)", "nn.GLU(1)"))
    info = other / "dmtg_example-1.0.0.dist-info"
    (info / "METADATA").write_text((info / "METADATA").read_text().replace("Version: 1.0.0", "Version: 1.1.0"))
    info.rename(other / "dmtg_example-1.1.0.dist-info")
    monkeypatch.syspath_prepend(other)
    track, address = done.loaded.track, done.found["models"][0]
    with pytest.raises(UserError, match=r"was dmtg-example==1\.0\.0 .*installed is dmtg-example==1\.1\.0"):
        evaluate(done.loaded, address)
    mlflow.set_tracking_uri(track.uri)
    with pytest.raises(Exception, match=r"dmtg-example==1\.1\.0"):
        mlflow.pyfunc.load_model(address)
    assert "dmtg_example.encoders" not in sys.modules
    assert load_groups(address, track, trust_code=True)


def test_code_that_only_the_shards_name_is_not_imported(done: Done, installed: Path) -> None:
    config = load_config(done.config, ["source=null", "network.encoder=mlp", "network.options={widths: [4, 4]}"])
    manifest = read_manifest(locate(config.data.shards))
    tasks = manifest.description.tasks
    with pytest.raises(UserError, match=f"the shards name the loss {LOSS}") as found:
        check_network(config, manifest, tasks)
    assert "run.trust_code" in found.value.remedy
    assert "dmtg_example" not in sys.modules
    trusting = load_config(
        done.config,
        ["source=null", "network.encoder=mlp", "network.options={widths: [4, 4]}", "run.trust_code=true"],
    )
    check_network(trusting, manifest, tasks)
    assert "dmtg_example.losses" in sys.modules
    assert torch.is_tensor(addresses.load("loss", LOSS)(torch.zeros(1), torch.zeros(1)))
