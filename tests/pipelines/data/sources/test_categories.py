"""Rare values of a category and columns of many values, in files and DataFrames; against scikit-learn."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.feature_extraction import FeatureHasher
from sklearn.preprocessing import OneHotEncoder

from dmtg_core.sklearn.frames import column_names, describe, stored_rows
from dmtg_core.tables.categories import barely_repeats, rare_values
from dmtg_core.tables.stored import hash_place
from pipelines.data.preprocessing import load_preparation, prepare
from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT, Source
from pipelines.errors import UserError

ROWS = 1500
SPLIT = np.array(["train", "train", "val"] * (ROWS // 3))


def towns(seed: int = 0) -> pd.DataFrame:
    """60 towns and 40 postcodes with leading zeros; a few of each are frequent."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, 61) ** 2
    town = rng.choice([f"town {i}" for i in range(60)], ROWS, p=shares / shares.sum())
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
    encoder = OneHotEncoder(min_frequency=3, handle_unknown="infrequent_if_exist", sparse_output=False)
    columns = frame[["town", "code"]]
    expected = encoder.fit(columns[SPLIT == "train"]).transform(columns)
    assert np.array_equal(stored[:, :-1], expected)
    assert (stored[SPLIT == "train", -2] == 1).any(), "the shared feature is trained"

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
    caplog.clear()
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
        (100, {"a": 99, "b": 1}, set()),
        (101, {"a": 100, "b": 1}, {"b"}),
        (200, {"a": 197, "b": 2, "c": 1}, {"c"}),
        (300, {"a": 295, "b": 3, "c": 2}, {"c"}),
        (5000, {"a": 4995, "b": 3, "c": 2}, {"c"}),
        (5000, {"a": 4998, "": 2}, set()),  # missing cells are counted separately
        (5000, {f"{i}": 2 for i in range(2500)}, set()),  # nothing else would be left
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


def shops() -> pd.DataFrame:
    """150 shops of about 10 rows each, some missing; 130 codes with leading zeros."""
    rng = np.random.default_rng(0)
    shop = pd.Series(rng.choice([f"Größe {i}" for i in range(150)], ROWS)).where(rng.random(ROWS) < 0.9)
    code = rng.choice([f"{i:04d}" for i in range(130)], ROWS)
    return pd.DataFrame({"shop": shop, "code": code, "size": rng.normal(size=ROWS)})


def test_many_values_are_hashed_as_scikit_learn_hashes_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    frame = shops()
    reader = reader_of(tmp_path, frame)
    preparation = reader.describe().preparation
    lines = [record.getMessage() for record in caplog.records if "is hashed" in record.getMessage()]
    assert [line.partition("t.csv: ")[2] for line in lines] == [
        f"column {name} has {count} values and is hashed to 256 features; for a feature for each value, set "
        "source.options.max_values" for name, count in (("shop", 151), ("code", 130))
    ]  # fmt: skip
    assert [one["type"] for one in preparation["features"]] == ["hashed", "hashed", "number"]
    stored = np.stack([reader.read(entry)[INPUT] for entry in reader.entries()])
    assert stored.shape == (ROWS, 256 + 1 + 256 + 1)
    for column, places in (("shop", stored[:, :256]), ("code", stored[:, 257:-1])):
        tokens = [[cell] if isinstance(cell, str) else [] for cell in frame[column]]
        hasher = FeatureHasher(256, input_type="string", alternate_sign=False, dtype=np.float32)
        known = hasher.transform(tokens).toarray()
        assert np.array_equal(places.sum(1), known.sum(1))
        assert set(np.unique(places)) == set(np.unique(known)) == {0, 1}
        # the same value has the same place, and about as many values share one as with another hash
        held = frame[column].notna().to_numpy()
        mine, theirs = ({*zip(frame[column][held], one[held].argmax(1), strict=True)} for one in (places, known))
        assert len(mine) == len(theirs) == frame[column].nunique()
        used = [len({place for _, place in pairs}) for pairs in (mine, theirs)]
        assert used[0] > 0.9 * used[1]
    assert np.array_equal(stored[:, 256], frame["shop"].isna())

    # files, typed columns and DataFrames
    assert np.array_equal(prepare(preparation, frame), stored)
    assert np.array_equal(prepare(preparation, frame.assign(code=frame["code"].astype(int))), stored)
    found = describe(frame, column_names(frame), np.flatnonzero(SPLIT == "train"))
    assert (found.preparation, found.spec) == (preparation, reader.describe().input)
    assert np.array_equal(stored_rows(found.preparation, frame, column_names(frame)), stored)
    caplog.clear()
    (new,) = prepare(preparation, [{"shop": "new", "code": None, "size": 1}])
    assert np.flatnonzero(new).tolist() == [zlib.crc32(b"new") % 256, 513]
    assert not caplog.records, "values that are hashed are not listed"
    assert set(load_preparation(preparation).example()) == {"shop", "code", "size"}


def test_the_place_of_a_value_is_the_same_in_every_version() -> None:
    assert [hash_place(cell, 256) for cell in ("Köln", "007", "7", "7.0", "TRUE", "true")] == [
        *(zlib.crc32(text.encode()) % 256 for text in ("Köln", "7", "7", "7", "true", "true")),
    ]  # fmt: skip
    assert hash_place("Köln", 256) == 251


def test_a_given_limit_is_kept(tmp_path: Path) -> None:
    frame = shops()
    with pytest.raises(UserError, match="column shop has 151 different values, more than max_values=140"):
        reader_of(tmp_path, frame, max_values=140).describe()
    shop, code, _ = reader_of(tmp_path, frame, max_values=200).describe().preparation["features"]
    assert (len(shop["values"] + shop["rare"]), len(code["values"] + code["rare"])) == (151, 130)


def test_ids_are_not_hashed(tmp_path: Path) -> None:
    frame = shops().assign(shop=[f"id {i // 9 if i % 5 == 0 else i}" for i in range(ROWS)])
    with pytest.raises(
        UserError, match="column shop has .* different values, more than 100, and most occur once or twice"
    ):
        reader_of(tmp_path, frame).describe()
    assert barely_repeats({"a": 3, "b": 2, "c": 1, "d": 1, "": 9})
    assert not barely_repeats({"a": 3, "b": 2, "c": 1})
