"""Shards belong to their raw data: changed raw data is noticed, announced, and never mixed with earlier shards."""

from __future__ import annotations

import itertools
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.config.loading import Config
from pipelines.data import raw_data
from pipelines.data.manifest import FILE, read_manifest
from pipelines.data.raw_data import differences, identity
from pipelines.data.renewal import ensure_shards, ready_shards, stale_notes
from pipelines.data.shards import shard
from pipelines.data.sources import build_source
from pipelines.data.sources.columns import training_figures
from pipelines.data.sources.row_splits import hash_split
from pipelines.data.sources.rows import Row
from pipelines.errors import UserError
from pipelines.runs.lease import Lease
from pipelines.storage import locate
from tests.pipelines.changing import table_config, write_table
from tests.pipelines.conftest import make_config, write_images


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "table.csv")


def renewed(config) -> list[str]:
    """The lines about the shards of a command that trains."""
    lines: list[str] = []
    ensure_shards(config, lines.append)
    return [line for line in lines if "created again" in line or line.startswith("changed")]


def test_shards_of_unchanged_raw_data_stay(table: Path, tmp_path: Path) -> None:
    config = table_config(table, tmp_path)
    digest = shard(config).manifest.digest()
    table.write_bytes(table.read_bytes())  # another time, the same content
    assert renewed(config) == []
    assert stale_notes(config, read_manifest(locate(config.data.shards))) == []
    assert ensure_shards(config).digest() == digest
    assert shard(config).manifest.digest() == digest


def test_changed_labels_renew_the_shards_and_are_announced(table: Path, tmp_path: Path) -> None:
    config = table_config(table, tmp_path)
    before = shard(config).manifest
    write_table(table, flip=True)
    assert any("the raw data" in note for note in stale_notes(config, before))
    lines = renewed(config)
    assert "the raw data had" in lines[0]
    classes = before.sums["train"]["a"]["classes"]
    assert f"changed: labels of a by class: {classes[::-1]}, before {classes}" in lines
    assert read_manifest(locate(config.data.shards)).digest() != before.digest()
    assert renewed(config) == []


def test_changed_rows_and_columns_are_announced(table: Path, tmp_path: Path) -> None:
    shard(table_config(table, tmp_path))
    write_table(table, rows=150)
    other = table_config(table, tmp_path)
    options = other.source.options | {"features": ["x1", "x3"]}
    other = other.model_copy(update={"source": other.source.model_copy(update={"options": options})})
    lines = renewed(other)
    assert "source.options differ in features" in lines[0]
    assert any(line.startswith("changed: train has ") for line in lines)
    assert "changed: columns of the input: gone x2" in lines


KINDS = ("binary", "multiclass", "regression")


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(KINDS, 2)))
def test_another_kind_of_task_is_announced(tmp_path: Path, first: str, second: str) -> None:
    (tmp_path / "t.csv").write_text("x,y\n" + "\n".join(f"{row},{row % 2}" for row in range(200)))

    def of_kind(kind: str) -> Config:
        options = {"id_column": None, "split_column": None, "tasks": [{"column": "y", "kind": kind}]}
        source = {"kind": "table", "root": str(tmp_path / "t.csv"), "options": options}
        return table_config(tmp_path / "t.csv", tmp_path, source=source)

    shard(of_kind(first))
    assert renewed(of_kind(second))[1:] == [f"changed: y is {second}, before {first}"]


def test_a_task_that_was_added_to_the_options_is_not_missing(table: Path, tmp_path: Path) -> None:
    shard(table_config(table, tmp_path, "a"))
    manifest = ensure_shards(table_config(table, tmp_path, "a", "b"))
    assert [task.name for task in manifest.description.tasks] == ["a", "b"]


def test_raw_data_at_another_address_does_not_train_on_the_shards(table: Path, tmp_path: Path) -> None:
    shard(table_config(table, tmp_path))
    other = write_table(tmp_path / "other.csv", seed=1)
    with pytest.raises(UserError, match=r"created from .*table\.csv, source\.root is .*other\.csv") as found:
        ensure_shards(table_config(other, tmp_path))
    assert "dmtg shard" in found.value.remedy
    copy = tmp_path / "copy.csv"
    copy.write_bytes(table.read_bytes())  # the same data under another name
    assert ready_shards(table_config(copy, tmp_path)) is not None


def test_shards_without_their_raw_data_are_used(table: Path, tmp_path: Path) -> None:
    config = table_config(table, tmp_path)
    shard(config)
    table.unlink()
    lines: list[str] = []
    assert ready_shards(config, lines.append) is not None
    assert "cannot be read" in lines[0]
    with pytest.raises(UserError, match="does not exist"):
        ready_shards(table_config(tmp_path / "typo.csv", tmp_path))


def test_an_image_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    config = make_config(write_images(tmp_path / "raw", rows=24), tmp_path)
    before = shard(config).manifest
    assert ready_shards(config) is not None
    file = tmp_path / "raw" / "images" / "img020.png"
    Image.new("RGB", (16, 16), (9, 9, 9)).save(file)
    assert ready_shards(config) is None
    assert shard(config).manifest.digest() != before.digest()


def test_images_with_equal_sizes_and_times_are_compared_by_content(tmp_path: Path) -> None:
    config = make_config(write_images(tmp_path / "raw", rows=24), tmp_path)
    source = build_source("folder", str(tmp_path / "raw"), config.source.options)
    file = tmp_path / "raw" / "images" / "img000.png"
    before, times = identity(source, config.source, config.data), file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert differences(before, identity(source, config.source, config.data))


def test_a_large_folder_is_compared_by_its_first_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(write_images(tmp_path / "raw", rows=24), tmp_path)
    monkeypatch.setattr(raw_data, "MOST_FILES", 10)
    source = build_source("folder", str(tmp_path / "raw"), config.source.options)
    assert identity(source, config.source, config.data)["count"] == 1 + 10  # the table, and images


def test_a_restored_sample_is_read_again(tmp_path: Path) -> None:
    config = make_config(write_images(tmp_path / "raw", rows=24), tmp_path, data={"max_bad_fraction": 0.2})
    file = tmp_path / "raw" / "images" / "img003.png"
    data, times = file.read_bytes(), file.stat()
    file.write_bytes(bytes(len(data)))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    first = shard(config)
    assert first.manifest.quarantined == 1
    assert shard(config).made == 0  # the sample is still unusable
    file.write_bytes(data)
    assert shard(config).manifest.quarantined == 0


@pytest.mark.parametrize("change", ["rows", "splits", "shards", "digest"])
def test_an_edited_manifest_is_refused(table: Path, tmp_path: Path, change: str) -> None:
    config = table_config(table, tmp_path)
    whole = shard(config).manifest
    file = tmp_path / "shards" / FILE
    values = json.loads(file.read_text())
    train = values["splits"]["train"]
    if change == "rows":
        train["shards"][0]["rows"] += 1
    elif change == "splits":
        values["splits"]["test"]["shards"].append(train["shards"].pop())
    elif change == "shards":
        train["shards"].pop()
    else:
        values["digest"] = "0" * 12
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="the manifest was edited"):
        ensure_shards(config)
    assert shard(config).manifest.digest() == whole.digest()
    assert read_manifest(locate(config.data.shards)).digest() == whole.digest()


def test_names_of_the_description_belong_to_the_digest(table: Path, tmp_path: Path) -> None:
    manifest = shard(table_config(table, tmp_path)).manifest
    assert read_manifest(locate(str(tmp_path / "shards"))).digest() == manifest.digest()
    renamed = table_config(table, tmp_path / "b")
    tasks = [{"column": "a", "kind": "binary", "name": "other"}, {"column": "b", "kind": "binary"}]
    options = renamed.source.options | {"tasks": tasks}
    renamed = renamed.model_copy(update={"source": renamed.source.model_copy(update={"options": options})})
    assert shard(renamed).manifest.digest() != manifest.digest()


def test_a_second_job_of_one_folder_waits_for_the_first(table: Path, tmp_path: Path) -> None:
    config, lines = table_config(table, tmp_path), []
    lease = Lease(locate(str(tmp_path / "shards" / "_parts" / "_lease.json")), 60, "test")
    with lease.held():
        second = threading.Thread(target=lambda: lines.append(shard(config, lines.append).made))
        second.start()
        while not lines:
            second.join(0.05)
        assert "waiting for another job that writes shards" in lines[0]
        assert not (tmp_path / "shards" / FILE).exists()
    second.join()
    assert lines[-1] > 0


def test_outliers_are_named_and_infinite_values_are_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [f"m{i},{x:.3f},{y:.3f}" for i, (x, y) in enumerate(rng.normal(size=(200, 2)))]
    rows = [line.split(",") for line in lines]
    first, second, third = [row for row in rows if hash_split(row[0]) == "train"][:3]
    first[1], second[2], third[2] = "1e30", "1e38", "inf"
    (tmp_path / "t.csv").write_text("id,x,y\n" + "\n".join(",".join(row) for row in rows))
    options = {"id_column": "id", "split_column": None, "tasks": [{"column": "y", "kind": "regression"}]}
    source = {"kind": "table", "root": str(tmp_path / "t.csv"), "options": options}
    said: list[str] = []
    manifest = shard(table_config(tmp_path / "t.csv", tmp_path, source=source), said.append).manifest
    assert manifest.quarantined == 1
    for name, size in (("column x", "6e+29"), ("task y", "9e+37")):
        assert any(f"{name} has outliers: 1 values of at least {size}" in line for line in said), said
    assert len(read_manifest(locate(str(tmp_path / "shards"))).description.notes) == 2


def test_wide_values_are_no_outliers() -> None:
    figures = training_figures([(Row(1, {"x": f"{10.0**k}"}), "train") for k in range(-3, 4)] * 20, ["x"])["x"]
    assert figures.outliers == ""
