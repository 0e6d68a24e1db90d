"""More than ten groups, more than 255 and 65,535 classes and categories, from a table to predictions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli.app import app
from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.registry.models import load_groups
from pipelines.registry.versions import list_models, show_model
from pipelines.report.inspect import inspect
from pipelines.serving.predict import PREDICTIONS, predict
from pipelines.training.driver import Trained, train

pytestmark = pytest.mark.soak

GROUPS = 12
NAMES = [f"group_{k}" for k in range(GROUPS)]
FLAGS = [f"flag_{n}" for n in range(GROUPS - 1)]
MANY = 70_000
EDGES = (0, 255, 256, 65_535, 65_536, MANY - 1)


def write_table(root: Path, numbers: Sequence[int], places: Sequence[int], flags: Sequence[str]) -> None:
    """A row for each number, a class, and place, a category; the last 200 rows are not trained on."""
    rng, rows = np.random.default_rng(0), len(numbers)
    columns: dict[str, Any] = {
        "id": range(rows),
        "size": rng.normal(size=rows).round(4),
        "place": [f"place{i}" for i in places],
        "number": numbers,
        "split": ["train"] * (rows - 200) + ["val"] * 100 + ["test"] * 100,
    }
    root.mkdir()
    columns |= {name: rng.integers(0, 2, rows) for name in flags}
    pd.DataFrame(columns).to_csv(root / "t.csv", index=False)


def config_of(root: Path, tasks: Sequence[dict[str, Any]], data: dict[str, Any], **training: Any) -> Config:
    """Each task starts in its own branch and stays there."""
    options = {
        "file": "t.csv",
        "id_column": "id",
        "features": ["size", "place"],
        "max_values": 10**6,
        "tasks": tasks,
    }
    values: dict[str, Any] = {
        "name": "many",
        "source": {"kind": "table", "root": str(root), "options": options},
        "data": {"shards": str(root / "shards")} | data,
        "network": {"encoder": "mlp", "groups": len(tasks), "options": {"widths": [4]}},
        "gate": {"initial": "diagonal", "initial_scale": 20.0, "learning_rate": 1e-9},
        "train": {"epochs": 1, "batch_size": 64} | training,
        "search": {"method": "dmtg"},
        "track": {"uri": f"sqlite:///{root / 'mlflow.db'}"},
        "run": {"root": str(root / "runs")},
        "ray": {"executor": "embedded"},
    }
    return checked(Config, values)


def predictions(config: Config, model: str, out: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """The tasks of `_predictions.json` for the test split, and the rows."""
    done = predict(config, model, str(out))
    files = [pd.read_parquet(out / file["file"]) for file in (done.out / PREDICTIONS).read_json()["files"]]
    return dict(done.tasks), pd.concat(files, ignore_index=True)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Trained]:
    """A finished run of twelve tasks in twelve groups, one of 300 classes, on a category of 300 values."""
    root = tmp_path_factory.mktemp("many") / "table"
    write_table(root, [i % 300 for i in range(900)], [i % 300 for i in range(900)], FLAGS)
    tasks = [{"column": "number", "kind": "multiclass"}, *({"column": f, "kind": "binary"} for f in FLAGS)]
    config = config_of(root, tasks, {})
    return config, train(config)


def test_every_listing_has_the_groups_in_the_order_of_their_numbers(many) -> None:
    config, done = many
    assert done.result["grouping"] == dict(zip(NAMES, ([task] for task in ("number", *FLAGS)), strict=True))
    registered = ["many", *(f"many.{name}" for name in NAMES)]
    assert [model.name for model in done.models] == registered
    assert [entry["name"] for entry in list_models(config.track)] == registered
    shown = show_model(config.track, "many")
    assert (list(shown["groups"]), list(shown["members"])) == (NAMES, registered[1:])
    assert list(shown["metrics"]) == ["number", *FLAGS]
    for model in (done.models[0].uri, str(done.run)):
        assert list(load_groups(model, config.track)) == NAMES
    details = (done.run / "details.json").read_json()
    assert [row["name"] for row in details["cost"]["rows"]][:GROUPS] == NAMES
    page = (done.run / "report.html").read_text()
    assert re.findall(r"</span>(group_\d+)\s*</td>", page) == NAMES


def test_the_terminal_lists_the_groups_in_that_order(many, tmp_path: Path) -> None:
    config, _ = many
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    for arguments in (["train", "-c", str(file)], ["models", "show", "many", "--uri", config.track.uri]):
        called = CliRunner().invoke(app, arguments)
        assert called.exit_code == 0, called.stderr
        lines = [line for line in called.stdout.splitlines() if re.search("flag_|number", line)]
        assert [name for line in lines for name in re.findall(r"\b(group_\d+)\b(?!/)", line)][:GROUPS] == NAMES


def test_served_predictions_equal_those_in_files(many, tmp_path: Path) -> None:
    config, done = many
    about, frame = predictions(config, done.models[0].uri, tmp_path / "out")
    assert [entry["group"] for entry in about.values()] == NAMES
    assert about["number"]["labels"] == [str(i) for i in range(300)]
    assert [name for name in frame if name != "id"] == [n for entry in about.values() for n in entry["columns"]]
    shares = frame[[f"number.{i}" for i in range(300)]].to_numpy()
    assert list(frame["number"]) == [str(i) for i in shares.argmax(1)]
    raw = pd.read_csv(Path(config.source.root) / "t.csv").set_index("id").loc[frame["id"].astype(int)]
    answers = mlflow.pyfunc.load_model(done.models[0].uri).predict(raw[["size", "place"]])
    assert list(answers) == ["number", *FLAGS, *(f"number.{i}" for i in range(300))]
    assert np.allclose(answers["number"], shares, atol=1e-6)
    for name in FLAGS:
        assert np.allclose(answers[name], frame[name], atol=1e-6)


def test_seventy_thousand_classes_from_a_table_to_predictions(tmp_path: Path) -> None:
    root, names = tmp_path / "table", [str(i) for i in range(MANY)]
    numbers = [EDGES[i % len(EDGES)] for i in range(500)]
    write_table(root, numbers, numbers, FLAGS[:1])
    tasks = [
        {"column": "number", "kind": "multiclass", "classes": names}, {"column": FLAGS[0], "kind": "binary"}
    ]  # fmt: skip
    config = config_of(root, tasks, {}, epochs=8, learning_rate=0.1)
    done = train(config)
    assert inspect(config)["problems"] == []
    about, frame = predictions(config, done.models[0].uri, tmp_path / "out")
    assert set(frame["number"]) <= {str(i) for i in EDGES}  # it has learned that no others occur
    assert about["number"]["columns"] == ["number", "number.probability"]
    assert frame["number.probability"].between(0, 1).all()
    assert (done.run / "report.html").size() < 20_000_000


def test_seventy_thousand_categories_from_a_table_to_predictions(tmp_path: Path) -> None:
    root = tmp_path / "table"
    places = [*range(MANY), *range(200)]
    write_table(root, [0] * len(places), places, FLAGS[:2])
    tasks = [{"column": name, "kind": "binary"} for name in FLAGS[:2]]
    config = config_of(root, tasks, {"rows_per_shard": 2000, "compression": "lz4"})
    done = train(config)
    assert inspect(config)["problems"] == []
    about, frame = predictions(config, done.models[0].uri, tmp_path / "out")
    assert [entry["group"] for entry in about.values()] == NAMES[:2]
    raw = pd.read_csv(root / "t.csv").set_index("id").loc[frame["id"].astype(int)]
    answers = mlflow.pyfunc.load_model(done.models[0].uri).predict(raw[["size", "place"]])
    for name in FLAGS[:2]:
        assert np.allclose(answers[name], frame[name], atol=1e-6)
