"""Features of `dmtg inspect`: columns of stored rows, their distribution, and their association with targets."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dmtg_core import InputSpec, Task
from dmtg_core.tables.dates import ISO
from dmtg_core.tables.stored import hash_place
from pipelines.config.loading import Config
from pipelines.data.manifest import read_manifest
from pipelines.data.preprocessing import prepare
from pipelines.data.reader import Reader
from pipelines.data.sources.base import Column, Description
from pipelines.report import features
from pipelines.report.features import Features, distribution, features_of, table_values
from pipelines.report.inspect import inspect
from pipelines.storage import locate
from tests.pipelines.report.test_inspect import Page, write

PREPARATION = {
    "kind": "table",
    "missing": [],
    "features": [
        {"column": "heat", "type": "number", "mean": 20.0, "gaps": True},
        {"column": "site", "type": "category", "values": ["", "north", "<south>"]},
        {"column": "age", "type": "number", "mean": 1.0, "gaps": False},
    ],
}
TASKS = (
    Task("load", "regression", unit="1/512 m"),
    Task("fault", "binary", labels=("nein", "ja")),
    Task("part", "multiclass", 3, labels=("bolt", "seal", "belt")),
)
ROWS = 60


def rows() -> list[dict[str, np.ndarray | None]]:
    """Rows whose heat orders the load; the site is the fault; every sixth heat and every tenth site is missing."""
    found: list[dict[str, np.ndarray | None]] = []
    for i in range(ROWS):
        site = [1, 0, 0, 0] if i % 10 == 9 else [0, 1 - i % 2, i % 2, 0]
        gap = i % 6 == 5
        values = [20.0 if gap else 0.1 * i, float(gap), *site, float(i * 7 % 13)]
        row: dict[str, np.ndarray | None] = {"input": np.array(values, np.float32)}
        row["task.load"] = None if i == 3 else np.asarray(512.0 * i, np.float32)
        found.append(
            row | {f"task.{name}": np.asarray(i % n, np.uint8) for name, n in (("fault", 2), ("part", 3))}
        )
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    columns = {"input": Column("float32", (7,)), "task.load": Column("float32"), "task.fault": Column("uint8"),
               "task.part": Column("uint8")}  # fmt: skip
    described = Description(InputSpec("features", (7,)), TASKS, columns, PREPARATION)
    return write(tmp_path_factory.mktemp("table"), described, {"train": rows(), "val": rows()[:20]})


def found_in(config: Config) -> Features:
    folder = locate(config.data.shards)
    manifest = read_manifest(folder)
    found = features_of(Reader(folder, manifest, manifest.tasks(None, str(folder))))
    assert found is not None
    return found


def test_features_have_gaps_categories_and_association(config: Config) -> None:
    found = found_in(config)
    heat, site, age = found.table
    assert (found.rows, found.of, found.left_out) == (ROWS, ROWS, 0)
    assert found.targets == ("load", "fault", "part")
    assert [row["missing"] for row in found.table] == pytest.approx([1 / 6, 1 / 10, 0])
    assert heat["measures"][0] == pytest.approx(1.0)
    assert site["measures"][1] == pytest.approx(1.0)
    order, ages = np.arange(ROWS), np.arange(ROWS) * 7 % 13
    kept = order != 3
    assert age["measures"][0] == pytest.approx(stats.spearmanr(order[kept], ages[kept]).statistic)
    assert age["measures"][1] == pytest.approx(abs(stats.pearsonr(order % 2, ages).statistic))
    assert site["top"] == [("north", pytest.approx(5 / 9)), ("<south>", pytest.approx(4 / 9))]
    assert heat["words"] == "0 · 2.9 · 5.8"
    assert found.histograms["load"]["words"] == "0 · 30 · 59"  # metres


def test_the_page_has_a_row_for_each_feature(config: Config) -> None:
    page = Page(Path(inspect(config)["page"]).read_text())
    assert page.row("heat", "16.7%")[1:][0] == "1.00"
    assert page.row("site", "10.0%")[2] == "1.00"
    assert "<south> 44.4%" in page.text
    assert f"The figures are of all {ROWS} rows" in page.text
    assert "load (m)" in page.text


def test_a_sample_of_the_rows_is_bounded_and_named(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "MOST_ROWS", 10)
    found = found_in(config)
    assert (found.rows, found.of) == (10, ROWS)
    page = Page(Path(inspect(config)["page"]).read_text())
    assert f"a random sample of 10 of the {ROWS} rows" in page.text
    monkeypatch.setattr(features, "MOST_BYTES", 5 * 40)
    assert found_in(config).rows < 10


def test_of_many_targets_the_strongest_are_named(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "MOST_TARGETS", 2)
    monkeypatch.setattr(features, "MOST_FEATURES", 2)
    found = found_in(config)
    assert found.targets == ()
    assert [row["name"] for row in found.table] == ["heat", "site"]
    assert found.left_out == 1
    page = Page(Path(inspect(config)["page"]).read_text())
    assert page.row("site", "10.0%")[-1].startswith("fault 1.00")
    assert "1 are left out" in page.text


def test_stored_values_without_a_description_are_numbers_and_hashed_features_are_left_out() -> None:
    stored = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert [one.name for one in table_values(stored, {})] == ["feature 0", "feature 1"]
    assert table_values(stored, {"kind": "smiles"}) == []


@pytest.mark.parametrize(
    ("values", "bars"), [([2.0, 2.0], 1), ([math.nan], 0), ([-1e9, 1e9, *np.linspace(0, 1, 300)], features.BINS)]
)
def test_a_histogram_is_drawn_of_any_numbers(values: list[float], bars: int) -> None:
    found: dict[str, Any] = distribution(features.Values("x", np.array(values)))
    assert sum(bar > 0 for bar in found["bars"]) == bars
    assert max(found["bars"], default=1.0) == 1.0


def test_columns_after_a_date_are_read_at_their_place() -> None:
    """The stored rows come from the preparation that served models use."""
    means = [1.0, 2020.0, 1.0, 2.0, 3.0, 2.0]
    date = {
        "column": "born",
        "type": "date",
        "format": ISO,
        "first": "2020-01-01",
        "means": means,
        "gaps": True,
    }
    site = {"column": "site", "type": "category", "values": ["", "north"], "form": "value"}
    age = {"column": "age", "type": "number", "mean": 1.0, "gaps": False}
    preparation = {"kind": "table", "missing": [], "features": [date, site, age]}
    cells = [("2020-01-04", "north", 7), ("", "", 8)]
    rows = [dict(zip(("born", "site", "age"), one, strict=True)) for one in cells]
    born, place, old = table_values(prepare(preparation, rows), preparation)
    assert (born.array[0], born.unit, born.missing) == (3.0, "days since 2020-01-01", 0.5)
    assert (place.array.tolist(), old.array.tolist()) == ([1, -1], [7.0, 8.0])


def test_hashed_values_are_told_apart_by_their_places() -> None:
    shop = {"column": "shop", "type": "hashed", "size": 8, "gaps": True, "example": "a"}
    age = {"column": "age", "type": "number", "mean": 1.0, "gaps": False}
    preparation = {"kind": "table", "missing": [], "features": [shop, age]}
    rows = [{"shop": name, "age": place} for place, name in enumerate(["a", "b", "", "a"])]
    hashed, old = table_values(prepare(preparation, rows), preparation)
    assert hashed.array.tolist() == [*(hash_place(name, 8) for name in "ab"), -1, hash_place("a", 8)]
    assert (hashed.names[0], len(hashed.names), hashed.missing) == ("hash 0", 8, 0.25)
    assert old.array.tolist() == [0, 1, 2, 3]
