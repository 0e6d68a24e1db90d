"""Options of losses, the sampler and the weighting of the tasks in a run on a table."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmtg_core.network.spec import TASK_WEIGHTINGS
from pipelines.config.loading import Config
from pipelines.config.sections import TrainSection
from pipelines.config.validation import checked
from pipelines.data.manifest import read_manifest
from pipelines.errors import UserError
from pipelines.runs.files import MODELS, RESULT
from pipelines.runs.models import group_names, read_model
from pipelines.storage import locate
from pipelines.training.driver import train

pytestmark = pytest.mark.usefixtures("plain_reports")
TASKS = [
    {"column": "flag", "kind": "binary", "metric": "auroc", "loss_options": {"pos_weight": "balanced"}},
    {"column": "grade", "kind": "multiclass", "loss": "ordinal", "loss_options": {"class_weights": "balanced"}},
    {
        "column": "price",
        "kind": "regression",
        "loss": "quantile",
        "loss_options": {"quantile": 0.9},
        "metric": "mae",
    },
]


def config_of(work: Path, tasks: list[dict[str, Any]] = TASKS, **sections: Any) -> Config:
    """A table of 300 rows with a rare flag, an ordered class and a number."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3)).round(3)
    flag, grade, price = x[:, 0] > 1.2, np.digitize(x[:, 1], [-0.5, 1.0]), 100 * x[:, 2]
    lines = [
        f"{','.join(map(str, row))},{int(a)},{b},{c:.1f}"
        for row, a, b, c in zip(x, flag, grade, price, strict=True)
    ]
    work.mkdir(exist_ok=True)
    (work / "t.csv").write_text("\n".join(["a,b,c,flag,grade,price", *lines]) + "\n")
    values: dict[str, Any] = {
        "name": "losses",
        "source": {"kind": "table", "root": str(work / "t.csv"), "options": {"tasks": tasks}},
        "data": {"shards": str(work / "shards"), "min_support": 1},
        "network": {"encoder": "mlp", "groups": 2, "options": {"widths": [8, 4]}},
        "train": {"epochs": 3, "batch_size": 50, "trees": False},
        "search": {"method": "dmtg", "baseline": False},
        "track": {"uri": "none"},
        "run": {"root": str(work / "runs"), "name": "one"},
        "ray": {"executor": "embedded", "object_store_mib": 128},
    }
    for name, section in sections.items():
        values[name] |= section
    return checked(Config, values)


@pytest.mark.parametrize("cache", ["memory", "stream"])
def test_a_run_has_the_weights_of_the_training_labels_in_its_models(tmp_path: Path, cache: str) -> None:
    options = {"task_weighting": "dwa"} if cache == "memory" else {}
    config = config_of(tmp_path, data={"cache": cache, "sampler": "balanced"}, train=options)
    train(config, lambda _: None)
    run = locate(config.run.root) / "one"
    manifest = read_manifest(locate(config.data.shards))
    assert manifest.description.tasks[0].loss_options.pos_weight == "balanced"  # the shards keep what was written
    flags, grades = (manifest.sums["train"][name]["classes"] for name in ("flag", "grade"))
    models = [read_model(run / MODELS / name) for name in group_names(run / MODELS)]
    found = {task.name: task for model in models for task in model.tasks}
    assert found["flag"].loss_options.pos_weight == flags[0] / flags[1] > 3
    expected = [sum(grades) / (3 * count) for count in grades]
    assert found["grade"].loss_options.class_weights == pytest.approx(expected)
    assert found["price"].loss_options.quantile == 0.9
    assert tuple(found[task.name] for task in manifest.tasks(None, "")) == manifest.tasks(None, "")
    validation = json.loads((run / RESULT).read_text())["validation"]
    assert {name for name, values in validation.items() if "log_loss" in values} == {"flag", "grade"}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"loss": "focal", "loss_options": {"gama": 1}},
            "task 'flag': loss focal of a binary task has no option 'gama'",
        ),
        ({"loss_options": {"pos_weight": -1}}, "pos_weight must be positive, got -1"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_before_shards_are_written(tmp_path: Path, task, message) -> None:
    config = config_of(tmp_path, [TASKS[0] | {"loss_options": {}} | task])
    with pytest.raises(UserError, match=message) as caught:
        train(config, lambda _: None)
    assert caught.value.where == "source.options.tasks"
    assert not (tmp_path / "shards" / "_manifest.json").exists()


def test_a_sampler_without_classes_and_a_weighting_without_its_library_are_refused(
    tmp_path: Path, monkeypatch
) -> None:
    config = config_of(tmp_path, data={"sampler": "balanced", "tasks": ["price"]})
    with pytest.raises(UserError, match="balanced needs a binary or multiclass task") as caught:
        train(config, lambda _: None)
    assert caught.value.where == "data"
    monkeypatch.setitem(sys.modules, "torchjd.scalarization", None)
    with pytest.raises(UserError, match=r"needs a library .* 'dmtg\[aggregators\]'") as caught:
        train(config_of(tmp_path, train={"task_weighting": "famo"}), lambda _: None)
    assert caught.value.where == "train"
    with pytest.raises(UserError, match="'stch' needs the losses of a whole batch"):
        train(config_of(tmp_path, train={"task_weighting": "stch", "accumulate": 2}), lambda _: None)


def test_the_sampler_changes_the_digest_only_if_it_is_used(tmp_path: Path) -> None:
    plain = config_of(tmp_path)
    assert config_of(tmp_path, data={"sampler": "uniform"}).digest() == plain.digest()
    assert config_of(tmp_path, data={"sampler": "balanced"}).digest() != plain.digest()


def test_the_weightings_are_those_of_the_core() -> None:
    schema = TrainSection.model_json_schema()["properties"]["task_weighting"]
    assert tuple(schema["enum"]) == TASK_WEIGHTINGS


def test_balanced_weights_without_training_labels_are_1(tmp_path: Path) -> None:
    train(config := config_of(tmp_path, [TASKS[0]], data={"tasks": None}, train={"epochs": 1}), lambda _: None)
    manifest = replace(read_manifest(locate(config.data.shards)), sums={})
    assert manifest.tasks(None, "")[0].loss_options.pos_weight == 1.0
