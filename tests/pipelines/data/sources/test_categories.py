"""Rare values of a category share the feature of unseen values, in files and DataFrames; against scikit-learn."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import OneHotEncoder

from dmtg_core.sklearn.frames import column_names, describe, stored_rows
from dmtg_core.tables.categories import rare_values
from pipelines.data.preprocessing import prepare
from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT, Source

ROWS = 1500
SPLIT = np.array(["train", "train", "val"] * (ROWS // 3))


def towns(seed: int = 0) -> pd.DataFrame:
    """60 towns and 40 postcodes with leading zeros; a few of each are frequent."""
    rng = np.random.default_rng(seed)
    town = rng.choice([f"town {i}" for i in range(60)], ROWS, p=(shares := 1 / np.arange(1, 61)) / shares.sum())
    code = rng.choice([f"{i:04d}" for i in range(40)], ROWS, p=shares[:40] / shares[:40].sum())
    return pd.DataFrame({"town": town, "code": code, "size": rng.normal(size=ROWS)})


def reader_of(folder: Path, frame: pd.DataFrame, **options: Any) -> Source:
    frame.assign(split=SPLIT, late=np.arange(ROWS) % 2).to_csv(folder / "t.csv", index=False)
    given = {"tasks": [{"column": "late", "kind": "binary"}], "scaling": "quantile", **options}
    return build_source("table", str(folder / "t.csv"), given)


def test_rare_values_are_those_of_scikit_learn(tmp_path: Path) -> None:
    frame = towns()
    reader = reader_of(tmp_path, frame)
    stored = np.stack([reader.read(entry)[INPUT] for entry in reader.entries()])
    encoder = OneHotEncoder(min_frequency=10, handle_unknown="infrequent_if_exist", sparse_output=False)
    columns = frame[["town", "code"]]
    expected = encoder.fit(columns[SPLIT == "train"]).transform(columns)
    assert np.array_equal(stored[:, :-1], expected)
    assert (stored[SPLIT == "train", -2] == 1).sum() > 20, "the shared feature is trained"

    # the features of all ways to a prediction are the same
    preparation = reader.describe().preparation
    assert np.array_equal(prepare(preparation, frame), stored)
    found = describe(frame, column_names(frame), np.flatnonzero(SPLIT == "train"))
    assert (found.preparation, found.spec) == (preparation, reader.describe().input)
    assert np.array_equal(stored_rows(found.preparation, frame, column_names(frame)), stored)
    new = pd.DataFrame({"town": ["elsewhere", "town 0"], "code": ["9999", 0], "size": 0.0})
    known = pd.DataFrame({"town": ["elsewhere", "town 0"], "code": ["9999", "0000"]})
    assert np.array_equal(prepare(preparation, new)[:, :-1], encoder.transform(known))


def test_rare_values_are_not_counted_as_unseen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    preparation = reader_of(tmp_path, towns()).describe().preparation
    town, code = preparation["features"][:2]
    rare = [{"town": town["rare"][0], "code": cell, "size": 1} for cell in (code["rare"][0], int(code["rare"][0]))]
    assert prepare(preparation, rare)[:, [len(town["values"]), -2]].tolist() == [[1, 1], [1, 1]]
    assert not caplog.records
    prepare(preparation, [*rare, {"town": "elsewhere", "code": 9999, "size": 1}])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "column town: 1 of 3 cells have a value that training did not have: 'elsewhere'; "
        "column code: 1 of 3 cells have a value that training did not have: '9999'"
    )


@pytest.mark.parametrize(
    ("rows", "counts", "rare"),
    [
        (199, {"a": 198, "b": 1}, set()),
        (300, {"a": 295, "b": 3, "c": 2}, {"c"}),
        (5000, {"a": 4981, "b": 10, "c": 9}, {"c"}),
        (5000, {"a": 4998, "": 2}, set()),  # missing cells are counted separately
        (5000, {f"{i}": 5 for i in range(1000)}, set()),  # nothing else would be left
    ],
)
def test_a_rare_value_has_few_rows_and_a_small_share(rows: int, counts: dict[str, int], rare: set[str]) -> None:
    assert rare_values(counts, rows) == rare


def test_tables_without_rare_values_are_described_as_before(tmp_path: Path) -> None:
    frame = towns().assign(town=np.tile(["a", "b", ""], ROWS // 3), code=np.tile(["01", "02", "3"], ROWS // 3))
    features = reader_of(tmp_path, frame).describe().preparation["features"]
    assert features[:2] == [
        {"column": "town", "type": "category", "values": ["a", "b"], "form": "value"},
        {"column": "code", "type": "category", "values": ["01", "02"], "form": "digits"},
    ]
