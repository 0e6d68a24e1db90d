"""Tar files as WebDataset writes and reads them."""

from __future__ import annotations

import pickle
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest

from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.data.planning import unpickled
from pipelines.data.shards import QUARANTINE, shard
from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT, Source
from pipelines.data.sources.labelled_images import webdataset
from pipelines.errors import UserError
from pipelines.storage import Location, locate
from tests.pipelines.data.sources.array_files import write_tar
from tests.pipelines.data.sources.image_files import ANIMALS, png, sample

TASKS = [
    {"column": "kind", "kind": "multiclass"},
    {"column": "age", "kind": "regression"},
    {"column": "cls", "kind": "binary"},
    {"column": "wild", "kind": "binary"},
]


def reader(root: Path, **options: Any) -> Source:
    return build_source("webdataset", str(root), {"size": 8, "resize": "stretch", "tasks": TASKS, **options})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_tar(tmp_path / "w" / "train" / "000.tar", [sample(i) for i in range(10)])
    write_tar(tmp_path / "w" / "train" / "001.tar", [sample(i) for i in range(10, 20)])
    write_tar(tmp_path / "w" / "val" / "000.tar", [sample(i) for i in range(20, 26)])
    write_tar(tmp_path / "w" / "test" / "000.tar", [sample(i) for i in range(26, 30)])
    return tmp_path / "w"


def test_samples_are_those_that_were_written(root: Path) -> None:
    source = reader(root)
    assert source.describe().tasks[0].labels == ANIMALS
    copied: Source = unpickled(pickle.dumps(source))
    entries = list(source.entries())
    assert entries[0].id == "test/000/0026"
    for entry in entries:
        i = int(entry.id.rpartition("/")[2])
        assert entry.split == ("train" if i < 20 else "val" if i < 26 else "test")
        row = copied.read(entry)
        np.testing.assert_array_equal(row[INPUT], np.full((8, 8, 3), (i, 255 - i, 7)))
        values = [row[f"task.{task['column']}"] for task in TASKS]
        assert values == [i % 3, i / 2, i % 2, i % 2]


def test_names_and_patterns_name_the_splits(tmp_path: Path) -> None:
    for name, first in (("train-000", 0), ("train-001", 5), ("valid-000", 10)):
        write_tar(tmp_path / f"{name}.tar", [sample(i) for i in range(first, first + 5)])
    assert Counter(entry.split for entry in reader(tmp_path).entries()) == {"train": 10, "val": 5}
    files = {"train": "train-000.tar", "val": "train-001.tar", "test": "v*.tar"}
    splits = [entry.split for entry in reader(tmp_path, files=files).entries()]
    assert splits == ["train"] * 5 + ["val"] * 5 + ["test"] * 5
    with pytest.raises(UserError, match="no tar file of val matches 'dev"):
        list(reader(tmp_path, files={"train": "train*", "val": "dev*"}).entries())
    write_tar(tmp_path / "more.tar", [sample(20)])
    with pytest.raises(UserError, match=r"no split in the name of more\.tar"):
        list(reader(tmp_path).entries())


def test_bad_samples_are_quarantined_with_their_place(root: Path, tmp_path: Path) -> None:
    _, whole = sample(1)
    bad = [
        ("no_image", {"json": whole["json"]}),
        ("no_png", {**whole, "png": b"x"}),
        ("no_json", {**whole, "json": b"{"}),
        ("no_label", {"png": png(1)}),  # is no bad sample
        ("no_class", {**whole, "json": b'{"kind": "cat", "age": "old", "wild": 1}'}),
    ]
    write_tar(root / "train" / "002.tar", bad)
    source = {"kind": "webdataset", "root": str(root), "options": {"size": 8, "tasks": TASKS}}
    values = {
        "name": "w", "source": source, "data": {"shards": str(tmp_path / "s"), "max_bad_fraction": 0.2},
        "ray": {"executor": "embedded"}, "track": {"uri": "none"},
    }  # fmt: skip
    manifest = shard(checked(Config, values)).manifest
    assert manifest.quarantined == 4
    assert manifest.sums["train"]["kind"]["missing"] == 1
    text = (tmp_path / "s" / QUARANTINE).read_text()
    for part in ("no image in train/002.tar, sample 1", "not an image: train/002.tar, sample 2",
                 "no_json.json is no JSON object", "'old' is not a finite number"):  # fmt: skip
        assert part in text


def test_a_column_that_no_sample_has_is_named(root: Path) -> None:
    with pytest.raises(UserError, match="no column kinds") as found:
        list(reader(root, tasks=[{"column": "kinds", "kind": "multiclass"}]).entries())
    assert "did you mean kind?" in found.value.remedy


def test_damaged_and_compressed_tar_files_are_named(root: Path) -> None:
    file = root / "train" / "001.tar"
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(UserError, match="damaged") as found:
        list(reader(root).entries())
    assert found.value.where == str(file)
    with tarfile.open(file, "w:gz") as tar:
        tar.add(root / "val" / "000.tar", "0001.png")
    with pytest.raises(UserError, match="compressed"):
        list(reader(root).entries())
    for old in root.rglob("*.tar"):
        old.unlink()
    with pytest.raises(UserError, match="no tar file"):
        list(reader(root).entries())


def test_a_tar_file_of_a_server_is_read_as_one_stream(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = locate(str(root / "train" / "000.tar"))
    expected = list(webdataset.tar_members(place))
    opened: list[str] = []

    class Remote(Location):
        local = None  # as for an address of a store

        @property
        def filesystem(self) -> Any:
            opened.append("opened")
            return pafs.LocalFileSystem()

    assert list(webdataset.tar_members(Remote(place.path))) == expected
    assert opened == ["opened"]
    assert expected[0].content == b""
    first = place.read_bytes(expected[0].start, expected[0].size)
    assert first == png(0)
