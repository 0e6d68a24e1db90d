"""Groups trained on their own after a search; and profiles."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch

from dmtg_core.training.checkpoint import load_model
from pipelines.config.loading import Config
from pipelines.errors import UserError
from pipelines.runs.files import CONFIG, DETAILS, REGISTERED, REPORT, RESULT, SEARCHED
from pipelines.training.driver import Trained, train
from pipelines.training.finetune import DONE, GROUPS
from pipelines.training.profiling import profile
from tests.pipelines.conftest import ON_RAY, make_config


def after_the_search(run: tuple[Config, Trained, list[str]], root: Path, epochs: int) -> Config:
    """A copy of a run at the end of its search, and a configuration by which its groups train on."""
    config, trained, _ = run
    folder = root / "groups"
    shutil.copytree(str(trained.run), folder)
    (folder / RESULT).rename(folder / SEARCHED)
    for name in (CONFIG, REGISTERED, REPORT, "mlflow.json"):
        (folder / name).unlink(missing_ok=True)
    values = config.model_dump(mode="json")
    values["search"] |= {"group_epochs": epochs, "group_learning_rate": 0.01}
    values |= {"run": {"root": str(root), "name": "groups"}, "track": {"uri": "none"}}
    return Config.model_validate(values)


def test_groups_train_on_and_are_never_worse_on_validation(run, tmp_path: Path) -> None:
    config = after_the_search(run, tmp_path, 4)
    folder = tmp_path / "groups"
    logged: list[str] = []
    result = train(config, logged.append).result
    searched = json.loads((folder / SEARCHED).read_text())
    assert result["grouping"] == searched["grouping"]
    assert set(result["groups"]) == set(result["grouping"])
    assert all(scores["after"] <= scores["before"] for scores in result["groups"].values())
    assert any(scores["after"] < scores["before"] for scores in result["groups"].values())
    assert any("trained on its own" in line for line in logged)
    assert "naive MTL did not get" in result["notes"][-1]
    for name in result["grouping"]:
        model = load_model(folder / "models" / name)
        tuned = load_model(folder / GROUPS / name / "model")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tuned.parameters(), strict=True))

    # the page has samples of the new models and no comparison with naive MTL
    before, now = (json.loads((place / DETAILS).read_text()) for place in (Path(run[1].run.local), folder))
    assert now["intervals"] is None
    assert now["samples"]["labels"] != before["samples"]["labels"]
    assert now["cost"] == before["cost"]

    # a finished group is not trained again
    (folder / RESULT).unlink()
    name = next(iter(result["grouping"]))
    done = folder / GROUPS / name / DONE
    done.write_text(json.dumps(json.loads(done.read_text()) | {"after": -123.0}))
    again = train(config, logged.append).result
    assert again["groups"][name]["after"] == -123.0
    assert again["metrics"] == result["metrics"]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=[pytest.mark.ray, pytest.mark.soak])])
def test_a_profile_measures_the_workers_and_leaves_the_run_alone(
    run, tmp_path: Path, workers: int, request: pytest.FixtureRequest
) -> None:
    values = run[0].model_dump(mode="json") | {"run": {"root": str(tmp_path), "name": "profiled"}}
    if workers > 1:
        request.getfixturevalue("ray_session")
        values["ray"] |= ON_RAY
    done = profile(Config.model_validate(values), [].append)
    assert done.found["workers"] == workers
    assert sum(done.found["shares"].values()) == pytest.approx(1)
    assert done.found["shares"]["communication"] > 0  # sums over the workers, also over one
    assert (done.found["all_reduce_share"] > 0) == (workers > 1)
    names = {event.get("name") for event in json.loads(gzip.decompress(done.trace.read_bytes()))["traceEvents"]}
    assert {"data", "forward", "backward", "optimizer", "communication"} <= names
    assert not (tmp_path / "profiled" / RESULT).exists()
    assert not (tmp_path / "profiled" / "checkpoints").exists()


def test_an_aggregator_is_checked_before_anything_starts(images: Path, tmp_path: Path) -> None:
    config = make_config(images, tmp_path, train={"aggregator": "upgrad", "task_weighting": "uncertainty"})
    with pytest.raises(UserError) as caught:
        train(config, [].append)
    assert caught.value.where == "train"
    assert not (tmp_path / "runs" / config.run_name() / "checkpoints").exists()
