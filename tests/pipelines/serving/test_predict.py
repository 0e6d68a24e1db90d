"""Batch prediction: the files have the predictions of the model, for every kind of task, once for every sample."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from typer.testing import CliRunner

from dmtg_core.input_spec import InputSpec
from dmtg_core.network.encoders import EncoderSpec
from dmtg_core.network.grouping_network import GroupingNetwork, GroupModel
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.tasks import Task
from dmtg_core.training.checkpoint import save_model
from dmtg_core.training.data import Arrays
from pipelines.cli.app import app
from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.data.manifest import FILE, Manifest
from pipelines.errors import UserError
from pipelines.serving.evaluate import evaluate
from pipelines.serving.predict import PLAN, PREDICTIONS, Predicted, predict
from pipelines.storage import locate
from tests.pipelines.s3_server import BUCKET
from tests.pipelines.shard_files import write_arrays

SIDE = 8
INPUT = InputSpec("image", (SIDE, SIDE, 3), "uint8", std=(255.0,))
TASKS = (
    Task("wet", "binary"),
    Task("room", "multiclass", channels=3, labels=("bath", "hall", "attic")),
    Task("shape", "multiclass", channels=2),
    Task("size", "regression", offset=(5.0,), scale=(10.0,), unit="m"),
    Task("corner", "regression", channels=2),
    Task("thing", "dense_classification", channels=4),
    Task("depth", "dense_regression", offset=(100.0,), scale=(50.0,), unit="1/512 m"),
    Task("normal", "dense_regression", channels=3),
)
ROWS = {"train": (16,), "val": (9, 4), "test": (11, 7, 5)}


def arrays(rng: np.random.Generator, rows: int) -> Arrays:
    """Images; their labels are not read."""
    labels = {"wet": rng.integers(0, 2, rows).astype(np.uint8)}
    return Arrays(rng.integers(0, 256, (rows, SIDE, SIDE, 3)).astype(np.uint8), labels, {})


def write_run(folder: Path, seed: int) -> dict[str, GroupModel]:
    """A finished run of an untrained network, in two groups."""
    spec = NetworkSpec(INPUT, TASKS, EncoderSpec("convnet", options={"widths": [4, 8]}), groups=2,
                       initial="diagonal", initial_scale=1.0, decoder_width=4, seed=seed)  # fmt: skip
    network = GroupingNetwork(spec)
    models = network.specialise()
    for name, model in models.items():
        save_model(folder / "models" / name, model)
    (folder / "grouping.json").write_text(network.grouping().to_json())
    return {name: model.eval() for name, model in models.items()}


class Prepared:
    """Shards, two runs, and a configuration."""

    def __init__(self, root: Path) -> None:
        rng = np.random.default_rng(0)
        self.root, shards = root, root / "shards"
        shards.mkdir()
        splits = {split: [arrays(rng, rows) for rows in counts] for split, counts in ROWS.items()}
        reader = write_arrays(shards, INPUT, [TASKS[0]], splits, group_rows=4)
        held = {
            split: [replace(s, sha256=hashlib.sha256((shards / s.file).read_bytes()).hexdigest()) for s in parts]
            for split, parts in reader.manifest.shards.items()
        }
        self.manifest = replace(reader.manifest, shards=held, sums={split: {} for split in held})
        self.inputs = {split: np.concatenate([part.inputs for part in parts]) for split, parts in splits.items()}
        self.write(self.manifest)
        self.models = write_run(root / "run", 0)
        write_run(root / "other", 1)
        self.config = checked(
            Config, {"name": "made", "data": {"shards": str(shards)}, "track": {"uri": "none"},
                     "train": {"batch_size": 3}, "ray": {"executor": "embedded"}},
        )  # fmt: skip

    def write(self, manifest: Manifest) -> None:
        """Put a manifest into the folder of the shards."""
        (self.root / "shards" / FILE).write_text(json.dumps(manifest.to_dict()))

    def predict(self, out: str, split: str = "test", model: str = "run", log: Any = print) -> Any:
        """`dmtg predict`."""
        return predict(self.config, str(self.root / model), str(self.root / out), split, log)

    def by_hand(self, split: str) -> dict[str, np.ndarray]:
        """Task → predictions of the models for all samples of a split."""
        raw = torch.from_numpy(self.inputs[split])
        found = (model.predict(raw) for model in self.models.values())
        return {task: value.numpy() for held in found for task, value in held.items()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def predicted(prepared: Prepared) -> Predicted:
    """All splits."""
    return prepared.predict("all", "all")


def test_the_files_have_the_predictions_of_the_model(prepared: Prepared, predicted: Predicted) -> None:
    assert (predicted.rows, predicted.files, predicted.kept) == (52, 6, 0)
    about = json.loads((prepared.root / "all" / PREDICTIONS).read_text())
    for split, counts in ROWS.items():
        files = [prepared.root / "all" / shard.file for shard in prepared.manifest.shards[split]]
        frame = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
        ids = [f"{file.name}/{i}" for file, rows in zip(files, counts, strict=True) for i in range(rows)]
        assert list(frame["id"]) == ids
        expected = prepared.by_hand(split)
        check_rows(frame, expected)
        for name in ("thing", "depth", "normal"):
            entry = about["tasks"][name]
            found = np.stack([np.frombuffer(v, entry["dtype"]).reshape(entry["shape"]) for v in frame[name]])
            assert found.shape == expected[name].shape
            assert np.allclose(found, expected[name], rtol=1e-5, atol=1e-4)
    assert about["tasks"]["thing"]["dtype"] == "uint8"
    names = [name for name in frame.columns if name != "id"]
    assert names == [name for entry in about["tasks"].values() for name in entry["columns"]]


def check_rows(frame: pd.DataFrame, expected: dict[str, np.ndarray]) -> None:
    assert np.allclose(frame["wet"], expected["wet"], atol=1e-6)
    assert list(frame["room"]) == [("bath", "hall", "attic")[i] for i in expected["room"].argmax(1)]
    assert np.allclose(frame[["room.bath", "room.hall", "room.attic"]], expected["room"], atol=1e-6)
    assert list(frame["shape"]) == list(expected["shape"].argmax(1))
    assert np.allclose(frame[["shape.0", "shape.1"]], expected["shape"], atol=1e-6)
    assert np.allclose(frame["size"], expected["size"], rtol=1e-5)
    assert np.allclose(frame[["corner.0", "corner.1"]], expected["corner"], atol=1e-6)


def test_the_last_file_describes_the_others(prepared: Prepared, predicted: Predicted) -> None:
    about = json.loads((prepared.root / "all" / PREDICTIONS).read_text())
    assert about["model"]["address"] == str(prepared.root / "run")
    assert about["data"] == {
        "shards": str(prepared.root / "shards"), "digest": prepared.manifest.digest(), "split": "all"
    }  # fmt: skip
    assert about["rows"] == 52
    served = {name: entry["group"] for name, entry in about["tasks"].items()}
    assert served == {task.name: group for group, model in prepared.models.items() for task in model.tasks}
    assert about["tasks"]["size"]["unit"] == "m"
    for held in about["files"]:
        data = (prepared.root / "all" / held["file"]).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (held["sha256"], held["bytes"])
        assert pq.read_table(pa.BufferReader(data)).num_rows == held["rows"]


def test_an_interrupted_job_resumes_and_keeps_complete_files(prepared: Prepared) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("shard 1/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared.predict("torn", log=interrupt)
    assert (prepared.root / "torn" / PLAN).exists()
    assert not (prepared.root / "torn" / PREDICTIONS).exists()
    whole = [note.name.removesuffix(".json") for note in (prepared.root / "torn" / "_parts").iterdir()]
    assert whole
    broken = prepared.root / "torn" / whole[0]
    good = broken.read_bytes()
    broken.write_bytes(good[:-1])
    stamps = {name: (prepared.root / "torn" / name).stat().st_mtime_ns for name in whole[1:]}

    done = prepared.predict("torn")
    assert (done.rows, done.files) == (23, 3)
    assert done.kept >= len(whole) - 1
    assert broken.read_bytes() == good
    assert stamps == {name: (prepared.root / "torn" / name).stat().st_mtime_ns for name in whole[1:]}
    again = prepared.predict("torn")
    assert (again.rows, again.files, again.kept) == (23, 3, 3)


def test_a_folder_with_other_contents_is_refused(prepared: Prepared, predicted: Predicted) -> None:
    with pytest.raises(UserError, match="this folder has predictions of .*/run .* not of .*/other") as caught:
        prepared.predict("all", "all", "other")
    assert caught.value.wrong_use
    with pytest.raises(UserError, match="on all of .* not of .* on test of"):
        prepared.predict("all")
    with pytest.raises(UserError, match="no record of predictions: _manifest.json"):
        prepared.predict("shards")
    shards = {split: held[:1] for split, held in prepared.manifest.shards.items()}
    prepared.write(replace(prepared.manifest, shards=shards))
    try:
        with pytest.raises(UserError, match="not of"):
            prepared.predict("all", "all")
    finally:
        prepared.write(prepared.manifest)


def test_a_model_that_does_not_fit_the_shards_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no split 'tests'"):
        prepared.predict("none", "tests")
    spec = NetworkSpec(InputSpec("features", (4,)), TASKS[:1], EncoderSpec("mlp"), groups=1)
    (model,) = GroupingNetwork(spec).specialise().values()
    save_model(tmp_path / "models" / "group_0", model)
    (tmp_path / "grouping.json").write_text("{}")
    with pytest.raises(UserError, match=r"reads features of float32 \(4,\), the data has image of uint8"):
        predict(prepared.config, str(tmp_path), str(tmp_path / "out"))
    held = prepared.manifest.shards
    wrong = replace(held["test"][0], rows=12)
    prepared.write(replace(prepared.manifest, shards=held | {"test": [wrong, *held["test"][1:]]}))
    try:
        with pytest.raises(UserError, match="the shard has 11 rows, the manifest says 12"):
            predict(prepared.config, str(prepared.root / "run"), str(tmp_path / "rows"))
    finally:
        prepared.write(prepared.manifest)


def test_a_registered_model_predicts_into_a_bucket(run, s3: int, tmp_path: Path) -> None:
    config, done, _ = run
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    client = mlflow.MlflowClient(config.track.uri)
    client.set_registered_model_alias("patches", "served", done.models[0].uri.rpartition("/")[2])
    out = f"s3://{BUCKET}/predictions"
    arguments = ["predict", "models:/patches@served", "-c", str(file), "--out", out, "--json"]
    try:
        result = CliRunner().invoke(app, arguments)
    finally:
        client.delete_registered_model_alias("patches", "served")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["out"] == out
    assert found["kept"] == 0
    about = (locate(out) / PREDICTIONS).read_json()
    assert about["model"]["address"] == done.models[0].uri
    tables = [pq.read_table(pa.BufferReader((locate(out) / f["file"]).read_bytes())) for f in about["files"]]
    frame = pa.concat_tables(tables).to_pandas()
    assert len(frame) == found["rows"] == about["rows"]
    truth = pd.read_csv(Path(config.source.root) / "labels.csv").set_index("image").loc[frame["id"]]
    accuracy = evaluate(config, str(done.run), "test")["colour"]["accuracy"]
    assert (frame["colour"].to_numpy() == truth["colour"].to_numpy()).mean() == pytest.approx(accuracy)
