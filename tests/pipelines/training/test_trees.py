"""Extra trees beside a run on a table: the figures of scikit-learn, once for a run folder, on every executor."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import ensemble
from sklearn import metrics as sk

from dmtg_core.evaluation.trees import QUICK_COUNT
from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.data.manifest import read_manifest
from pipelines.data.reader import Reader
from pipelines.report.run import page
from pipelines.runs.files import RESULT, TREES
from pipelines.storage import locate
from pipelines.training.driver import Trained, train
from tests.pipelines.conftest import ON_RAY

Finished = tuple[Config, Trained, list[str]]


def config_of(work: Path, **sections: Any) -> Config:
    """A table of 300 rows with a yes-or-no target and one in thousands, and a network that trains in a second."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4)).round(3)
    flag, price = x[:, 0] * x[:, 1] + 0.3 * rng.normal(size=300) > 0, 1000 * x[:, 2] + 300 * rng.normal(size=300)
    lines = [f"{','.join(map(str, row))},{int(a)},{b:.1f}" for row, a, b in zip(x, flag, price, strict=True)]
    work.mkdir(exist_ok=True)
    (work / "t.csv").write_text("\n".join(["a,b,c,d,flag,price", *lines]) + "\n")
    tasks = [{"column": "flag", "kind": "binary", "metric": "auroc"}, {"column": "price", "kind": "regression"}]
    values: dict[str, Any] = {
        "name": "trees",
        "source": {"kind": "table", "root": str(work / "t.csv"), "options": {"tasks": tasks}},
        "data": {"shards": str(work / "shards"), "min_support": 1},
        "network": {"encoder": "mlp", "groups": 2, "options": {"widths": [8, 4]}},
        "train": {"epochs": 2, "batch_size": 50},
        "search": {"method": "dmtg", "baseline": False},
        "track": {"uri": "none"},
        "run": {"root": str(work / "runs"), "name": "one"},
        "ray": {"executor": "embedded", "object_store_mib": 128},
    }
    for name, section in sections.items():
        values[name] |= section
    return checked(Config, values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished run on the table."""
    logged: list[str] = []
    config = config_of(tmp_path_factory.mktemp("trees"))
    return config, train(config, logged.append), logged


def unfinished(finished: Finished, **train_section: Any) -> tuple[Config, list[str]]:
    """The configuration of the run, whose result is removed as if it had been killed before it was written."""
    config, done, _ = finished
    (done.run / RESULT).delete()
    return config.model_copy(update={"train": config.train.model_copy(update=train_section)}), []


def stored(config: Config, split: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Inputs and raw labels of a split, in the order of the shards."""
    folder = locate(config.data.shards)
    manifest = read_manifest(folder)
    reader = Reader(folder, manifest, manifest.description.tasks)
    parts = [reader.arrays(reader.table(shard.file)) for shard in manifest.shards[split]]
    labels = {task.name: np.concatenate([part.labels[task.name] for part in parts]) for task in reader.tasks}
    return np.concatenate([part.inputs for part in parts]), labels


def test_the_figures_are_those_of_scikit_learn(finished: Finished) -> None:
    config, done, logged = finished
    (x, y), (test_x, test_y) = stored(config, "train"), stored(config, "test")
    tasks = read_manifest(locate(config.data.shards)).description.tasks
    seed, found = config.train.seed, done.result["trees"]
    forest = ensemble.ExtraTreesClassifier(QUICK_COUNT, random_state=seed).fit(x, y["flag"])
    auroc = sk.roc_auc_score(test_y["flag"], forest.predict_proba(test_x)[:, 1])
    price = next(task for task in tasks if task.name == "price")
    standard = (y["price"] - np.float32(price.offset[0])) / np.float32(price.scale[0])
    trees = ensemble.ExtraTreesRegressor(QUICK_COUNT, random_state=seed).fit(x, standard)
    guesses = price.offset[0] + price.scale[0] * trees.predict(test_x)
    rmse = math.sqrt(sk.mean_squared_error(test_y["price"], guesses))
    assert found["metrics"]["flag"]["auroc"] == pytest.approx(auroc, abs=1e-6)
    assert found["metrics"]["price"]["rmse"] == pytest.approx(rmse, rel=1e-4)
    deviation = y["price"].std()
    assert found["errors"]["price"] == pytest.approx(found["metrics"]["price"]["rmse"] / deviation, rel=1e-4)
    assert found["error"] == pytest.approx((1 - auroc + found["errors"]["price"]) / 2, abs=1e-6)
    assert (found["count"], found["rows"], found["of"]) == (QUICK_COUNT, len(x), len(x))
    assert sum("training extra trees" in line for line in logged) == 1


def test_the_page_has_the_figures(finished: Finished) -> None:
    _, done, _ = finished
    text = page(done.run)
    assert "mean error" in text
    assert '<th scope="col" class="n">extra trees</th>' in text


def test_a_resumed_run_does_not_train_them_again(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    before = finished[1].result
    config, logged = unfinished(finished)
    monkeypatch.setattr("pipelines.training.measures.trees.train_trees", None)
    assert train(config, logged.append).result == before
    assert not any("training extra trees" in line for line in logged)


def test_they_can_be_switched_off_without_another_run(finished: Finished) -> None:
    before = finished[1].result
    config, logged = unfinished(finished, trees=False)
    assert config.run_name() == finished[0].run_name()
    assert config.digest() == finished[0].digest()
    assert train(config, logged.append).result == before | {"trees": {"skipped": "train.trees=false"}}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [("sklearn", "scikit-learn is not installed: pip install 'dmtg[tables]'"), ("", "ValueError: no trees here")],
)
def test_a_run_without_scikit_learn_and_one_whose_trees_fail_are_finished(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, broken: str, reason: str
) -> None:
    before = finished[1].result
    (finished[1].run / TREES).delete()
    config, logged = unfinished(finished)
    if broken:
        monkeypatch.setitem(sys.modules, broken, None)
    else:

        def fail(*_: Any, **__: Any) -> None:
            raise ValueError("no trees here")

        monkeypatch.setattr("pipelines.training.measures.trees.train_trees", fail)
    assert train(config, logged.append).result == before | {"trees": {"failed": reason}}
    assert f"note: no extra trees for comparison: {reason}" in logged
    # a later call of an unfinished run trains them
    monkeypatch.undo()
    config, logged = unfinished(finished)
    assert train(config, logged.append).result == before | {
        "trees": json.loads((finished[1].run / TREES).read_text())
    }


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_they_are_the_same_beside_several_workers_on_ray(finished: Finished, tmp_path: Path) -> None:
    logged: list[str] = []
    config = config_of(tmp_path / "ray", ray=ON_RAY)
    found = train(config, logged.append).result["trees"]
    assert found == finished[1].result["trees"]
    assert sum("training extra trees" in line for line in logged) == 1
