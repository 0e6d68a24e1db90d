"""More than 255 and more than 65,535 classes and categories: what is stored, read, counted, told and predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from matplotlib.figure import Figure

from dmtg_core.input_spec import InputSpec
from dmtg_core.tables.cells import in_order
from dmtg_core.tasks import MOST_SHARES, Task
from dmtg_core.training.data import ArrayData, Arrays, Chunks, DeviceArrays
from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.data import shards, statistics
from pipelines.data.manifest import read_manifest
from pipelines.data.planning import make_plans
from pipelines.data.preprocessing import load_preparation
from pipelines.data.reader import Reader
from pipelines.data.shards import write_shard
from pipelines.data.sources import build_source
from pipelines.data.sources.base import Column, Source
from pipelines.data.sources.labels import Target
from pipelines.data.sources.rows import Row
from pipelines.data.stream import all_units
from pipelines.errors import UserError
from pipelines.nightly.leakage import same_tasks
from pipelines.report.figures import MOST_PIXELS, dots
from pipelines.report.inspect import inspect
from pipelines.serving.columns import arrays_of, columns_of, schema
from pipelines.storage import locate
from tests.pipelines.shard_files import write_arrays

EDGES = (0, 1, 255, 256, 65_535, 65_536, 69_999)
CPU = torch.device("cpu")


@pytest.mark.parametrize("ignored", [-1, 255, 65_535])
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "int32"), (70_000, "int32")],
)
def test_class_ids_survive_a_round_trip(tmp_path: Path, classes: int, dtype: str, ignored: int) -> None:
    names = [f"c{i}" for i in range(classes)]
    task = Task("t", "multiclass", classes, labels=tuple(names), ignore_index=ignored)
    target = Target("t", task, {name: i for i, name in enumerate(names)})
    assert target.stored == Column(dtype)
    ids = sorted({i for i in (*EDGES, classes - 1) if i < classes})
    stored = [target.value(Row(1, {"t": cell})) for cell in (*(names[i] for i in ids), "")]
    assert stored[-1] is None
    labels = np.array([*stored[:-1], 0], dtype)
    there = np.array([value is not None for value in stored])
    arrays = Arrays(np.zeros((len(labels), 1), np.float32), {"t": labels}, {"t": there})
    reader = write_arrays(tmp_path, InputSpec("features", (1,)), [task], {"train": [arrays]}, group_rows=3)
    parts = Chunks([reader.read(unit.file, unit.group) for unit in all_units(reader, "train")])
    for samples in (parts, DeviceArrays(parts, CPU)):
        (batch,) = ArrayData({"train": samples}, [task]).evaluate("train", 100)
        assert batch.targets["t"].dtype == torch.int64
        assert batch.targets["t"].tolist() == [*ids, ignored]
    counts = statistics.label_sums(task, stored, [None] * len(stored))["classes"]
    assert (len(counts), list(np.flatnonzero(counts))) == (classes, [i for i in ids if i != ignored])


def test_classes_that_are_numbers_are_in_their_order() -> None:
    assert in_order(["10", "9", "1", "-2", "-10", "0.5", "2e1"]) == ("-10", "-2", "0.5", "1", "9", "10", "2e1")
    assert in_order(["ward 10", "ward 9", "other"]) == ("other", "ward 9", "ward 10")
    assert in_order(["10", "9", "none"]) == ("9", "10", "none")


# ---------------------------------------------------------------- a table whose every row is a class of its own


MANY = 70_000


def config_of(root: Path, tasks: Sequence[dict[str, Any]], features: Sequence[str]) -> Config:
    options = {"file": "t.csv", "id_column": "id", "tasks": list(tasks), "features": list(features)}
    values = {
        "name": "many", "source": {"kind": "table", "root": str(root), "options": options},
        "data": {"shards": str(root / "shards"), "rows_per_shard": 8192}, "track": {"uri": "none"},
    }  # fmt: skip
    return checked(Config, values)


def sharded(config: Config) -> Source:
    """Shards as `dmtg shard` makes them, in this process."""
    assert config.source is not None
    source = build_source(config.source.kind, config.source.root, config.source.options)
    description, folder = source.describe(), locate(config.data.shards)
    plans = make_plans(source.entries(), description, config.source, config.data)
    parts = {plan.digest: write_shard(source, description, plan, folder, "lz4") for plan in plans}
    shards._publish(folder, description, plans, parts, config.source, {})
    return source


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Shards of it; the id of a row is the name of its class."""
    root = tmp_path_factory.mktemp("table")
    numbers = np.arange(MANY)
    split = np.where(numbers % 100 == 7, "val", "train")
    pd.DataFrame({"id": numbers, "size": numbers % 7, "number": numbers, "split": split}).to_csv(
        root / "t.csv", index=False
    )
    config = config_of(root, [{"column": "number", "kind": "multiclass"}], ["size"])
    sharded(config)
    return config


def test_seventy_thousand_classes_are_stored_separately(table: Config) -> None:
    folder = locate(table.data.shards)
    manifest = read_manifest(folder)
    (task,) = manifest.description.tasks
    assert task.labels == tuple(map(str, range(MANY)))
    reader = Reader(folder, manifest, (task,))
    seen = 0
    for split in ("train", "val"):
        for unit in all_units(reader, split):
            with folder.filesystem.open_input_file((folder / unit.file).path) as file:
                ids = pa.parquet.ParquetFile(file).read_row_group(unit.group, columns=["id"])["id"].to_pylist()
            assert reader.read(unit.file, unit.group).labels["number"].tolist() == list(map(int, ids))
            seen += len(ids)
    assert seen == MANY
    counts = [manifest.sums[split]["number"]["classes"] for split in ("train", "val")]
    assert (np.sum(counts, axis=0) == 1).all()


def test_notes_on_many_classes_fit_on_a_line(table: Config) -> None:
    found = inspect(table)
    note, repeated = found["notes"]
    assert repeated.startswith("700 of 700 val samples have the input of a training sample")  # one of seven sizes
    assert note == (
        "task number has too few labels in train for a reliable result: classes with fewer than 20 labels "
        f"(0: 1, 1: 1, 2: 1, 3: 1, 4: 1 and {MANY - 5} more)"
    )
    assert all(len(row["classes"]) < 300 for row in found["table"])
    assert found["table"][0]["classes"].endswith("  19: 0.0%  20: 0.0% and 69280 more")
    assert (locate(table.data.shards).local / "_inspect.html").stat().st_size < 200_000


def test_message_on_tasks_of_many_classes_names_the_differences() -> None:
    names = tuple(map(str, range(MANY)))
    first, second = (Task("t", "multiclass", MANY, labels=labels) for labels in (names, (*names[:-1], "new")))
    with pytest.raises(UserError) as caught:
        same_tasks([first], [second], "here")
    assert caught.value.what.endswith("t (labels: 70000 names with 69999, 70000 names with new)")


# ---------------------------------------------------------------- categories


@pytest.mark.parametrize("count", [300, MANY])
def test_every_category_has_its_own_feature(count: int) -> None:
    values = [f"v{i}" for i in range(count)]
    features = [
        {"column": "size", "type": "number", "mean": 1.5, "gaps": True},
        {"column": "place", "type": "category", "values": values},
        {"column": "weight", "type": "number", "mean": 2.5, "gaps": False},
    ]
    how = load_preparation({"kind": "table", "features": features, "missing": ["NA"]})
    for cell, place in [*((f"v{i}", i) for i in EDGES if i < count), ("unseen", count)]:
        row = how.row({"size": "NA", "place": cell, "weight": 3})
        expected = np.zeros(count + 4, np.float32)
        expected[[0, 1, 2 + place, -1]] = 1.5, 1, 1, 3
        assert row.dtype == np.float32
        assert np.array_equal(row, expected)


def test_category_with_too_many_values_is_refused_before_anything_is_stored(table: Config) -> None:
    assert table.source is not None
    options = table.source.options | {
        "tasks": [{"column": "size", "kind": "regression"}], "features": ["number"], "categorical": ["number"],
    }  # fmt: skip
    with pytest.raises(UserError, match="10001 or more different values, more than 100, and most") as caught:
        build_source("table", table.source.root, options).describe()
    assert "set a larger source.options.max_values" in caught.value.remedy


# ---------------------------------------------------------------- predictions, names, pictures


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("classes", [300, MOST_SHARES, MOST_SHARES + 1, MANY])
def test_predictions_of_many_classes(classes: int, named: bool) -> None:
    labels = tuple(f"c{i}" for i in range(classes)) if named else ()
    task = Task("t", "multiclass", classes, labels=labels)
    likeliest = [0, 255, 256, classes - 1]
    decoded = np.full((4, classes), 0.25 / classes, np.float32)
    decoded[range(4), likeliest] = 0.75
    found = pa.table(arrays_of(task, decoded), schema=pa.schema(list(schema([task]))[1:]))
    assert found.column_names == list(columns_of(task))
    assert found["t"].to_pylist() == ([labels[i] for i in likeliest] if named else likeliest)
    if classes <= MOST_SHARES:
        assert found.num_columns == 1 + classes
        last = labels[-1] if named else classes - 1
        assert found[f"t.{last}"].to_pylist() == decoded[:, -1].tolist()
    else:
        assert found.column_names == ["t", "t.probability"]
        assert found["t.probability"].to_pylist() == [0.75] * 4


def test_plot_of_many_tasks_has_fewer_dots() -> None:
    assert dots(Figure((5, 5)), 100) == 100
    assert (dots(Figure((400, 400)), 100) * 400) ** 2 <= MOST_PIXELS * 1.001
