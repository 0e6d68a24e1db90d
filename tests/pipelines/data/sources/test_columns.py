"""A table of any length is read in passes, with the figures of a table in memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from dmtg_core.tables import figures
from dmtg_core.tables.figures import ExactSum
from pipelines.data.sources import build_source, columns
from pipelines.data.sources.base import Source
from pipelines.data.sources.columns import Replayed, training_figures
from pipelines.data.sources.rows import Row, read_rows
from pipelines.data.sources.tables import delimited, parquet
from pipelines.errors import UserError
from pipelines.storage import locate

TASKS = [
    {"column": "sick", "kind": "binary", "drop": ["2"]},
    {"column": "ward", "kind": "multiclass"},
    {"column": "cost", "kind": "regression"},
]


def table(count: int) -> pa.Table:
    """Numbers of different sizes, categories, gaps and rows that are left out."""
    rng = np.random.default_rng(0)
    return pa.table({
        "age": [None if i % 9 == 0 else value for i, value in enumerate(rng.normal(50, 20, count).tolist())],
        "dose": (10.0 ** rng.uniform(-20, 20, count)).tolist(),
        "town": [("bonn", "köln", "")[i] for i in rng.integers(0, 3, count)],
        "sick": [f"{i}" for i in rng.integers(0, 3, count)],
        "ward": [f"ward {i}" for i in rng.integers(0, 12, count)],
        "cost": rng.exponential(1e6, count).tolist(),
        "split": [("train", "val", "test")[i] for i in rng.integers(0, 3, count)],
    })  # fmt: skip


@pytest.fixture(params=["csv", "parquet", "folder"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A table as a file, or as a folder of files."""
    whole = table(300)
    if request.param == "csv":
        pa.csv.write_csv(whole, tmp_path / "t.csv")
        return tmp_path / "t.csv"
    if request.param == "parquet":
        pq.write_table(whole, tmp_path / "t.parquet", row_group_size=70)
        return tmp_path / "t.parquet"
    for part in range(3):
        pq.write_table(whole.slice(100 * part, 100), tmp_path / f"{part}.parquet")
    return tmp_path


def reader(place: Path) -> Source:
    return build_source("table", str(place), {"tasks": TASKS})


def test_a_long_table_is_read_as_a_short_one(
    written: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    short = reader(written)
    expected = short.describe(), list(short.entries())
    monkeypatch.setattr(parquet, "BATCH_ROWS", 30)
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 100)
    monkeypatch.setattr(columns, "HELD_ROWS", 10)
    monkeypatch.setattr(figures, "_FOLDED", 7)
    long = reader(written)
    caplog.clear()
    with caplog.at_level("INFO"):
        assert (long.describe(), list(long.entries())) == expected
    assert len(expected[1]) == 204
    assert caplog.text.count("96 of 300 rows left out by `drop`") == 1
    assert vars(long)["_entries"]._held is None
    assert vars(short)["_entries"]._held is not None


def test_rows_of_a_parquet_file_are_numbered_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BATCH_ROWS", 4)
    pq.write_table(pa.table({"a": list(range(10))}), tmp_path / "t.parquet")
    found = list(read_rows(locate(str(tmp_path / "t.parquet")), ["a"]))
    assert [(row.line, row.cells["a"]) for row in found] == [(i + 1, f"{i}") for i in range(10)]


def test_only_the_beginning_of_a_table_is_read_for_its_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 2**12)
    text = "a,b\n" + "1,2\n" * 20_000 + "a line that does not fit\n"
    (tmp_path / "t.csv").write_text(text)
    every = read_rows(locate(str(tmp_path / "t.csv")), ["a"])
    assert next(every).cells == {"a": "1", "b": "2"}
    with pytest.raises(UserError, match="line 20002 has 1 cells, expected 2"):
        for _ in every:
            pass


def test_sums_are_those_of_fsum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_FOLDED", 10)
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(100))
        numbers = (rng.uniform(-1, 1, count) * 10 ** rng.uniform(-30, 30, count)).tolist()
        numbers += [-number for number in numbers[: len(numbers) // 2]]
        total = ExactSum()
        for number in numbers:
            total.add(number)
        assert total.total == math.fsum(numbers)
        assert len(total._parts) < 20


def test_figures_are_those_of_the_standard_library() -> None:
    numbers = np.random.default_rng(0).normal(3, 2, 5000).tolist()
    cells = [*map(repr, numbers), "", "many", "inf"]
    samples = [(Row(i, {"a": cell}), "train") for i, cell in enumerate(cells)] + [(Row(0, {"a": "1e9"}), "val")]
    found = training_figures(samples, ["a"], most=100)["a"]
    assert (found.cells, found.filled, found.numbers) == (5003, 5002, 5000)
    assert found.mean == statistics.fmean(numbers)
    assert found.deviation == pytest.approx(statistics.pstdev(numbers), rel=1e-12)
    assert found.incomplete
    assert len(found.values) == 101


def test_a_pass_that_ends_early_is_not_held() -> None:
    begun: list[bool] = []

    def read(first: bool) -> Iterator[int]:
        begun.append(first)
        yield from range(5)

    every = Replayed(read)
    assert next(iter(every)) == 0
    assert [list(every), list(every)] == [[0, 1, 2, 3, 4]] * 2
    assert begun == [True, True]
