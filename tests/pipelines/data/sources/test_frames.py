"""A DataFrame for the estimator and a file for the reader have the same features, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dmtg_core.sklearn.frames import column_names, describe, stored_rows
from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT

ROWS = 300


def machines() -> pd.DataFrame:
    """A table with every kind of feature, with missing cells and a column that is constant in training."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "income": np.exp(rng.normal(8.0, 2.0, ROWS)),
            "rooms": rng.integers(1, 9, ROWS),
            "area": pd.array(rng.integers(20, 200, ROWS), "Int64"),
            "town": rng.choice(["Köln", "Trier", "-", "NA", "x y"], ROWS),
            "code": rng.choice(["007", "012", "100"], ROWS),
            "owned": rng.choice([True, False], ROWS),
            "built": pd.Timestamp("1999-12-24") + pd.to_timedelta(rng.integers(0, 9000, ROWS), "D"),
            "seen": pd.Timestamp("2024-01-01 07:30") + pd.to_timedelta(rng.integers(0, 10**6, ROWS), "s"),
            "level": rng.normal(size=ROWS).astype(np.float32).astype(np.float64),
            "same": 1,
        }
    )
    for column in ("income", "area", "town", "owned", "built"):
        frame[column] = frame[column].where(rng.random(ROWS) < 0.9)
    return frame


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_frame_is_stored_as_the_file_of_it(tmp_path: Path, kind: str) -> None:
    frame = machines()
    split = np.array(["train", "val", "train", "test"] * (ROWS // 4))
    written = frame.assign(split=split, late=np.arange(ROWS) % 2)
    file = tmp_path / f"machines.{kind}"
    written.to_csv(file, index=False) if kind == "csv" else written.to_parquet(file)
    options = {"tasks": [{"column": "late", "kind": "binary"}], "scaling": "quantile"}
    reader = build_source("table", str(file), options)
    described = reader.describe()
    stored = np.stack([reader.read(entry)[INPUT] for entry in reader.entries()])

    names = column_names(frame)
    found = describe(frame, names, np.flatnonzero(split == "train"))
    assert found.spec == described.input
    assert found.preparation == described.preparation
    assert found.constants == ["same"]
    assert [one["type"] for one in found.preparation["features"]] == [
        "number", "number", "number", "category", "category", "category", "date", "date", "number",
    ]  # fmt: skip
    mine = stored_rows(found.preparation, frame, names)
    assert mine.dtype == stored.dtype == np.float32
    assert mine.tobytes() == stored.tobytes()


def test_a_csv_that_pandas_read_is_stored_as_the_file(tmp_path: Path) -> None:
    file = tmp_path / "machines.csv"
    machines().assign(split=["train", "val", "train"] * 100, late=np.arange(ROWS) % 2).to_csv(file, index=False)
    reader = build_source("table", str(file), {"tasks": [{"column": "late", "kind": "binary"}]})
    stored = np.stack([reader.read(entry)[INPUT] for entry in reader.entries()])
    frame = pd.read_csv(file, dtype={"code": str}).drop(columns=["split", "late"])
    rows = np.flatnonzero(np.arange(ROWS) % 3 != 1)
    found = describe(frame, column_names(frame), rows)
    assert stored_rows(found.preparation, frame, column_names(frame)).tobytes() == stored.tobytes()
