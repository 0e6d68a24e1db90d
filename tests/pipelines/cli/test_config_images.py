"""`dmtg config new` for images in tables and tar files, and for folders of arrays: the reader is inferred."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from pipelines.config.loading import Config, load_config
from pipelines.data.shards import shard
from pipelines.data.sources import build_source
from pipelines.errors import UserError
from pipelines.scaffold.template import new_config
from tests.pipelines.data.sources.array_files import write_nyuv2, write_tar
from tests.pipelines.data.sources.image_files import dataset, rows, sample, splits
from tests.pipelines.raw_data import write_qm9


def made(data: Path, targets: list[str], work: Path) -> Config:
    """The configuration for data, as `dmtg config new` writes it."""
    found = new_config("", str(data), targets, "mine")
    (work / "mine.yaml").write_text(found.text)
    return load_config(str(work / "mine.yaml"))


def save_dict(root: Path) -> None:
    splits().save_to_disk(root)


def save_without_val(root: Path) -> None:
    root.mkdir()
    for name in ("train", "test"):
        splits()[name].to_parquet(root / f"{name}-00000-of-00001.parquet")


def save_file(root: Path) -> None:
    dataset(40).to_parquet(root.with_suffix(".parquet"))


def save_delta(root: Path) -> None:
    held = [{**row, "image": row["image"]["bytes"]} for row in rows(40)]
    write_deltalake(root, pa.Table.from_pylist(held))


@pytest.mark.parametrize(
    ("save", "share"), [(save_dict, 0.0), (save_without_val, 0.1), (save_file, 0.0), (save_delta, 0.0)]
)
def test_tables_with_images(save, share: float, tmp_path: Path) -> None:
    save(tmp_path / "t")
    data = next(path for path in tmp_path.iterdir())
    config = made(data, ["kind", "age"], tmp_path)
    assert config.source is not None
    assert (config.source.kind, config.network.encoder) == ("image_table", "convnet")
    assert config.source.options["image_column"] == "image"
    assert config.source.options.get("val_share", 0.0) == share
    assert config.source.options.get("split_column", "split") == "split"
    source = build_source(config.source.kind, config.source.root, config.source.options)
    assert [task.name for task in source.describe().tasks] == ["kind", "age"]
    entries = list(source.entries())
    assert {entry.split for entry in entries} >= ({"train"} if share else {"train", "val"})
    assert source.read(entries[0])["input"] is not None


def test_tar_files(tmp_path: Path) -> None:
    write_tar(tmp_path / "w" / "train-0.tar", [sample(i) for i in range(80)])
    write_tar(tmp_path / "w" / "test-0.tar", [sample(i) for i in range(80, 90)])
    config = made(tmp_path / "w", ["kind", "age", "cls"], tmp_path)
    assert config.source is not None
    assert (config.source.kind, config.source.options["val_share"]) == ("webdataset", 0.1)
    kinds = {task["column"]: task["kind"] for task in config.source.options["tasks"]}
    assert kinds == {"kind": "multiclass", "age": "regression", "cls": "binary"}
    config = config.model_copy(update={"data": config.data.model_copy(update={"shards": str(tmp_path / "s")})})
    manifest = shard(config).manifest
    assert {split: manifest.rows(split) > 0 for split in ("train", "val", "test")} == {
        "train": True, "val": True, "test": True,
    }  # fmt: skip


def test_arrays_have_their_recipe_and_molecules_their_columns(tmp_path: Path) -> None:
    config = made(write_nyuv2(tmp_path / "nyu"), [], tmp_path)
    assert config.source is not None
    assert (config.source.kind, config.train.epochs) == ("nyuv2", 200)
    config = made(write_qm9(tmp_path / "qm9") / "qm9.csv", ["mu", "gap"], tmp_path)
    assert config.source is not None
    assert (config.source.kind, config.source.options["smiles"]) == ("table", "smiles")
    assert config.source.options["id_column"] == "mol_id"


def test_tables_without_images_stay_tables(tmp_path: Path) -> None:
    dataset(40).remove_columns("image").save_to_disk(tmp_path / "t")
    config = made(tmp_path / "t", ["kind", "wild"], tmp_path)
    assert config.source is not None
    assert config.source.kind == "table"
    pq.write_table(pa.table({"a": [0, 1] * 20, "b": [1, 0] * 20, "x": list(range(40))}), tmp_path / "t.parquet")
    assert made(tmp_path / "t.parquet", ["a", "b"], tmp_path).source.kind == "table"


def test_targets_have_to_be_named(tmp_path: Path) -> None:
    save_dict(tmp_path / "t")
    with pytest.raises(UserError, match="no target columns are named") as found:
        new_config("", str(tmp_path / "t"), [], "mine")
    assert "kind, wild, age, tags.furry, tags.small" in found.value.remedy
    pq.write_table(pa.table({"a": [0, 1] * 20, "b": [1, 0] * 20}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="no column of images"):
        new_config("image_table", str(tmp_path / "t.parquet"), ["a", "b"], "mine")
