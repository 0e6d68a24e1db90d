"""Folders of Parquet files as Spark and pandas write them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml

from pipelines.data.sources import build_source
from pipelines.data.sources.rows import read_head
from pipelines.data.sources.tables.folders import partition
from pipelines.errors import UserError
from pipelines.scaffold.template import new_config
from pipelines.storage import locate

TASKS = [{"column": "a", "kind": "binary"}, {"column": "b", "kind": "binary"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    splits = ["train"] * 80 + ["val"] * 20 + ["test"] * 10
    frame = pd.DataFrame({"x": range(110), "a": [i % 2 for i in range(110)], "b": [i % 3 % 2 for i in range(110)]})
    frame.assign(split=splits, town=["Köln/x", None] * 55).to_parquet(
        tmp_path / "p", partition_cols=["split", "town"]
    )
    return tmp_path / "p"


def test_folders_are_columns(folder: Path) -> None:
    source = build_source("table", str(folder), {"split_column": "split", "tasks": TASKS, "categorical": ["town"]})
    assert Counter(entry.split for entry in source.entries()) == {"train": 80, "val": 20, "test": 10}
    town = next(one for one in source.describe().preparation["features"] if one["column"] == "town")
    assert town["values"] == ["", "Köln/x"]
    rows, more = read_head(locate(str(folder)), 30)
    assert {row.cells["split"] for row in rows} == {"train", "val", "test"}
    assert more


def test_a_new_configuration_finds_the_split(folder: Path) -> None:
    made = yaml.safe_load(new_config("", str(folder), ["a,b"], "x").text)["source"]
    assert made["options"]["split_column"] == "split"
    source = build_source("table", str(folder), made["options"])
    assert Counter(entry.split for entry in source.entries()) == {"train": 80, "val": 20, "test": 10}


def test_columns_of_a_path() -> None:
    assert partition("split=train/a=b=c/x%20y=%C3%A4/p.parquet") == {"split": "train", "a": "b=c", "x y": "ä"}
    assert partition("k=__HIVE_DEFAULT_PARTITION__/p.parquet") == {"k": ""}
    assert partition("plain/k=1.parquet") == {}


def test_a_column_in_the_file_and_in_the_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x=1").mkdir()
    pd.DataFrame({"x": [1], "a": [1], "b": [0]}).to_parquet(tmp_path / "x=1" / "p.parquet")
    with pytest.raises(UserError, match="column x occurs more than once"):
        list(build_source("table", str(tmp_path), {"tasks": TASKS}).entries())
