"""Tables with images, written by the libraries whose format they have: datasets, pyarrow and deltalake."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from PIL import Image

from pipelines.config.loading import Config, load_config
from pipelines.config.validation import checked
from pipelines.data.new_samples import new_samples, raw_form
from pipelines.data.planning import unpickled
from pipelines.data.shards import QUARANTINE, shard
from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT, BadSampleError, Entry, Source
from pipelines.data.sources.labelled_images.table import ImageTableOptions
from pipelines.data.sources.rows import Row
from pipelines.data.sources.tables.folders import path_split
from pipelines.errors import UserError
from pipelines.scaffold.template import new_config
from pipelines.storage import locate
from tests.pipelines.data.sources.image_files import ANIMALS, FEATURES, TASKS, dataset, png, rows, splits

SPLIT_OF = ["train"] * 20 + ["val"] * 6 + ["test"] * 4


def plain(count: int = 30) -> pa.Table:
    """`rows` as a table of another library: bytes and names."""
    held = rows(count)
    return pa.table(
        {
            "image": [row["image"]["bytes"] for row in held],
            "kind": [ANIMALS[row["kind"]] for row in held],
            "wild": [["tame", "wild"][row["wild"]] for row in held],
            "age": [row["age"] for row in held],
            "tags.small": [int(1 in row["tags"]) for row in held],
            "split": SPLIT_OF[:count],
        }
    )


def save_dict(root: Path) -> None:
    splits().save_to_disk(root, num_shards={"train": 3, "validation": 1, "test": 1})


def save_parquet(root: Path) -> None:
    root.mkdir()
    for name, split in splits().items():
        for i in range(2):
            split.shard(2, i).to_parquet(root / f"{name}-{i:05d}-of-00002.parquet")


def save_plain(root: Path) -> None:
    root.mkdir()
    pq.write_table(plain(), root / "t.parquet", row_group_size=7)


def save_delta(root: Path) -> None:
    write_deltalake(root, plain(30), partition_by=["split"])
    write_deltalake(root, plain(30), partition_by=["split"], mode="overwrite")  # the files of before stay


FORMS: dict[str, Callable[[Path], None]] = {
    "save_to_disk": save_dict, "exported parquet": save_parquet, "parquet": save_plain, "delta": save_delta,
}  # fmt: skip


@pytest.fixture(scope="module", params=FORMS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("table") / "t"
    FORMS[request.param](root)
    return root


def reader(root: Path, **options: Any) -> Source:
    tasks = TASKS if "tasks" not in options else options.pop("tasks")
    binary = [dict(task, positive=["wild"]) if task["column"] == "wild" else task for task in tasks]
    return build_source("image_table", str(root), {"size": 8, "resize": "stretch", "tasks": binary, **options})


def number_of(row: dict[str, np.ndarray | None]) -> int:
    """Which of the samples it is: the colour of its image."""
    image = row[INPUT]
    assert image is not None
    return int(image[0, 0, 0])


def test_samples_are_those_that_were_written(saved: Path) -> None:
    source = reader(saved)
    description = source.describe()
    assert [(task.name, task.kind) for task in description.tasks] == [
        ("kind", "multiclass"), ("wild", "binary"), ("age", "regression"), ("tags.small", "binary"),
    ]  # fmt: skip
    assert description.tasks[0].labels == ANIMALS
    assert description.tasks[1].labels == ("tame", "wild")
    entries = list(source.entries())
    copied: Source = unpickled(pickle.dumps(source))
    numbers = {}
    for entry in entries:
        row = copied.read(entry)
        i = number_of(row)
        numbers[i] = entry.split
        held = rows(1, i)[0]
        np.testing.assert_array_equal(row[INPUT], np.full((8, 8, 3), (i, 255 - i, 7)))
        assert row["task.kind"] == held["kind"]
        assert row["task.wild"] == held["wild"]
        assert row["task.age"] == held["age"]
        assert row["task.tags.small"] == (1 in held["tags"])
    assert [numbers[i] for i in range(30)] == SPLIT_OF
    assert len({entry.id for entry in entries}) == 30


def test_a_single_data_set_and_a_single_file(tmp_path: Path) -> None:
    dataset(12).save_to_disk(tmp_path / "one")
    dataset(12).to_parquet(tmp_path / "one.parquet")
    for place in ("one", "one.parquet", "one/data-00000-of-00001.arrow"):
        entries = list(reader(tmp_path / place).entries())
        assert Counter(entry.split for entry in entries).keys() <= {
            "train",
            "val",
            "test",
        }  # by the hash of the id
        assert len(entries) == 12
    source = reader(tmp_path / "one", val_share=0.5)
    assert {entry.split for entry in source.entries()} >= {"train", "val"}


def test_ids_of_a_column_are_unique_over_row_groups(tmp_path: Path) -> None:
    names = [f"r{i}" for i in range(12)]
    table = plain(12).set_column(5, "split", [["train", "val"] * 6]).append_column("name", [names])
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=4)
    found = [entry.id for entry in reader(tmp_path / "t.parquet", id_column="name").entries()]
    assert found == names
    again = table.set_column(6, "name", [[*names[:-1], "r0"]])
    pq.write_table(again, tmp_path / "t.parquet", row_group_size=4)
    with pytest.raises(UserError, match="1 ids occur more than once: r0"):
        shard(config(tmp_path / "t.parquet", tmp_path, id_column="name"))


def config(root: Path, work: Path, **options: Any) -> Config:
    tasks = [dict(task, positive=["wild"]) if task["column"] == "wild" else task for task in TASKS]
    source = {"kind": "image_table", "root": str(root), "options": {"size": 8, "tasks": tasks, **options}}
    values = {
        "name": "t", "source": source, "data": {"shards": str(work / "shards"), "max_bad_fraction": 0.2},
        "ray": {"executor": "embedded"}, "track": {"uri": "none"},
    }  # fmt: skip
    return checked(Config, values)


def test_samples_of_a_row_group_are_read_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(plain(), tmp_path / "t.parquet", row_group_size=5)
    read: list[int] = []
    before = pq.ParquetFile.read_row_group

    def counted(self: Any, group: int, **options: Any) -> pa.Table:
        read.append(group)
        return before(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    manifest = shard(config(tmp_path / "t.parquet", tmp_path)).manifest
    assert sum(manifest.rows(split) for split in manifest.shards) == 30
    assert set(read) == set(range(6))
    assert len(read) <= 7  # each once, but for the one that two splits share


def test_bad_images_are_quarantined_with_their_place(tmp_path: Path) -> None:
    held = rows(30)
    held[2]["image"] = {"bytes": b"no image", "path": None}
    held[3]["image"] = None
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(noise, "PNG")
    held[4]["image"] = {"bytes": noise.getvalue()[:-100], "path": None}
    held[5]["image"] = {"bytes": None, "path": "nowhere.png"}
    features = datasets.Features({**FEATURES, "image": datasets.Image(decode=False)})
    table = pa.Table.from_pylist(held, features.arrow_schema).append_column("split", [SPLIT_OF])
    pq.write_table(table, tmp_path / "t.parquet")
    manifest = shard(config(tmp_path / "t.parquet", tmp_path)).manifest
    assert manifest.quarantined == 4
    text = (tmp_path / "shards" / QUARANTINE).read_text()
    for part in ("not an image: column image, row 3", "no image in column image, row 4", "damaged image",
                 "cannot open the image of 6: no such file"):  # fmt: skip
        assert part in text


def test_images_beside_the_table(tmp_path: Path) -> None:
    Image.open(io.BytesIO(png(9))).save(tmp_path / "9.png")
    held = plain(2).set_column(0, "image", [["9.png", str(tmp_path / "9.png")]])
    for write, name in ((pq.write_table, "t.parquet"), (pyarrow.feather.write_feather, "t.feather")):
        write(held, tmp_path / name)
        source = reader(tmp_path / name, tasks=TASKS[2:3])
        assert [number_of(source.read(entry)) for entry in source.entries()] == [9, 9]


def test_names_of_classes_are_no_markers_of_missing_labels(tmp_path: Path) -> None:
    names = datasets.Features({**FEATURES, "kind": datasets.ClassLabel(names=["NA", "?", "owl"])})
    datasets.Dataset.from_list(rows(6), features=names).save_to_disk(tmp_path / "one")
    source = reader(tmp_path / "one")
    assert [int(source.read(entry)["task.kind"]) for entry in source.entries()] == [0, 1, 2, 0, 1, 2]


def test_a_data_set_without_validation_names_the_option(tmp_path: Path) -> None:
    datasets.DatasetDict(train=dataset(20), test=dataset(4, 20)).save_to_disk(tmp_path / "t")
    with pytest.raises(UserError, match="train: 20, val: 0, test: 4") as found:
        shard(config(tmp_path / "t", tmp_path))
    assert "val_share=0.1" in found.value.remedy
    manifest = shard(config(tmp_path / "t", tmp_path, val_share=0.3)).manifest
    assert manifest.rows("val") > 0
    assert manifest.rows("train") + manifest.rows("val") == 20


def test_missing_class_labels_are_no_labels(tmp_path: Path) -> None:
    held = rows(6)
    held[0]["kind"], held[1]["kind"] = -1, None
    datasets.Dataset.from_list(held, features=FEATURES).save_to_disk(tmp_path / "one")
    source = reader(tmp_path / "one")
    values = [source.read(entry)["task.kind"] for entry in source.entries()]
    assert [None if value is None else int(value) for value in values] == [None, None, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("options", "what", "remedy"),
    [
        ({"image_column": "img"}, "no column img", "columns of images: image"),
        ({"image_column": "age"}, "column age holds", "columns of images: image"),
        ({"tasks": [{"column": "kinds", "kind": "multiclass"}]}, "no column kinds", "did you mean kind"),
        ({"split_column": "fold"}, "no column fold", "use the columns of the table"),
        ({"file": "absent.parquet"}, "the table does not exist", "source.options.file"),
    ],
)
def test_wrong_options_are_named(saved: Path, options: dict[str, Any], what: str, remedy: str) -> None:
    with pytest.raises(UserError, match=what) as found:
        list(reader(saved, **options).entries())
    assert remedy in found.value.remedy


def test_compressed_and_damaged_arrow_files_are_refused(tmp_path: Path) -> None:
    pyarrow.feather.write_feather(plain(), tmp_path / "t.feather", compression="lz4")
    with pytest.raises(UserError, match="compressed"):
        list(reader(tmp_path / "t.feather").entries())
    dataset(8).save_to_disk(tmp_path / "one")
    file = tmp_path / "one" / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged") as found:
        list(reader(tmp_path / "one").entries())
    assert "data-00000" in found.value.where


def test_a_delta_table_with_deletion_vectors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_delta(tmp_path / "t")
    protocol = DeltaTable(tmp_path / "t").protocol()._replace(reader_features=["deletionVectors"])
    monkeypatch.setattr(DeltaTable, "protocol", lambda _: protocol)  # the library cannot write such a table
    with pytest.raises(UserError, match="deletionVectors") as found:
        list(reader(tmp_path / "t").entries())
    assert "PURGE" in found.value.remedy


def test_without_deltalake_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_delta(tmp_path / "t")
    monkeypatch.setitem(__import__("sys").modules, "deltalake", None)
    with pytest.raises(UserError, match="deltalake") as found:
        list(reader(tmp_path / "t").entries())
    assert "dmtg[sources]" in found.value.remedy


def test_texts_of_such_a_folder(tmp_path: Path) -> None:
    held = {
        "body": [f"a text, number {i} of some" for i in range(60)],
        "good": [0, 1] * 30,
        "topic": list("xyz") * 20,
    }
    names = datasets.Features(
        {"body": datasets.Value("string"), "good": datasets.ClassLabel(names=["no", "yes"]),
         "topic": datasets.Value("string")}
    )  # fmt: skip
    whole = datasets.Dataset.from_dict(held, features=names)
    datasets.DatasetDict(train=whole.select(range(40)), val=whole.select(range(40, 60))).save_to_disk(
        tmp_path / "t"
    )
    found = new_config("text", str(tmp_path / "t"), ["good", "topic"], "mine")
    (tmp_path / "mine.yaml").write_text(found.text)
    config = load_config(str(tmp_path / "mine.yaml"))
    assert config.source is not None
    source = build_source("text", config.source.root, config.source.options)
    assert Counter(entry.split for entry in source.entries()) == {"train": 40, "val": 20}
    row = source.read(list(source.entries())[1])
    assert row["task.good"] == 1


def test_a_model_of_such_images_predicts_files(tmp_path: Path) -> None:
    form = raw_form({"kind": "image_table", "options": {"size": 8, "resize": "crop", "tasks": TASKS}})
    assert (form["resize"], form["targets"][0]) == ("crop", "kind")
    (tmp_path / "7.png").write_bytes(png(7))
    spec = checked(ImageTableOptions, {"size": 8, "tasks": TASKS}).input
    (new,) = new_samples([locate(str(tmp_path / "7.png"))], spec, None, form, "")
    assert new.input is not None
    assert new.input[0, 0].tolist() == [7, 248, 7]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00004.parquet", "train"), ("default/validation/0000.parquet", "val"),
        ("test-00000-of-00001-0123456789abcdef.parquet", "test"), ("dev_12.tar", "val"), ("train.pq", "train"),
        ("validation_matched-00000-of-00001.parquet", None), ("part-0.parquet", None),
        ("split=train/part-0.parquet", None),
    ],
)  # fmt: skip
def test_splits_of_paths(path: str, split: str | None) -> None:
    assert path_split(path) == split


@pytest.mark.parametrize("form", ["save_to_disk", "delta"])
def test_rows_of_these_folders_are_a_table_too(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path / "t")
    options = {"tasks": [{"column": "kind", "kind": "multiclass"}], "features": ["age"]}
    source = build_source("table", str(tmp_path / "t"), options)
    entries = list(source.entries())
    assert Counter(entry.split for entry in entries) == Counter(SPLIT_OF)
    assert source.describe().tasks[0].labels == ANIMALS
    broken = Row(1, entries[0].fields["row"].cells | {"kind": "cow"})
    with pytest.raises(BadSampleError, match="a label outside its classes: 'cow'"):
        source.read(Entry("x", "train", {"row": broken}))
