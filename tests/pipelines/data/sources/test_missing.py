"""Missing labels, words for yes and no, kinds of features, and columns that are asked for by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from pipelines.data.preprocessing import prepare
from pipelines.data.sources import build_source
from pipelines.data.sources.base import Source
from pipelines.errors import UserError
from pipelines.scaffold.inference import ColumnSummary, feature, target
from pipelines.scaffold.template import new_config

A, B = {"column": "a", "kind": "binary"}, {"column": "b", "kind": "binary"}


def write(file: Path, **columns: list[str]) -> Path:
    """A table with the columns, a number and a second target; every third row is in val."""
    count = len(next(iter(columns.values())))
    more = {"x": range(count), "b": [i % 2 for i in range(count)], "split": ["train", "train", "val"] * count}
    frame = pd.DataFrame({**columns, **{key: list(values)[:count] for key, values in more.items()}})
    frame.to_csv(file, index=False)
    return file


def reader(file: Path, *tasks: dict[str, Any], **options: Any) -> Source:
    return build_source("table", str(file), {"tasks": [*tasks, B], **options})


def labels(source: Source, name: str = "task.a") -> list[int | None]:
    found = [source.read(entry)[name] for entry in source.entries()]
    return [None if value is None else int(value) for value in found]


@pytest.mark.parametrize("marker", ["NA", "N/A", "n/a", "?", "-", "--", "null", "None", "#N/A", "<NA>", "NaN"])
def test_a_marker_is_a_missing_label_of_every_kind(tmp_path: Path, marker: str) -> None:
    words = write(tmp_path / "w.csv", a=["yes", "no", marker] * 4)
    assert labels(reader(words, A)) == [1, 0, None] * 4
    assert labels(reader(words, {**A, "positive": ["yes"]})) == [1, 0, None] * 4
    assert labels(reader(words, {"column": "a", "kind": "multiclass"})) == [1, 0, None] * 4
    numbers = write(tmp_path / "n.csv", a=["1", "2", marker] * 4)
    assert labels(reader(numbers, {"column": "a", "kind": "regression"})) == [1, 2, None] * 4
    made = yaml.safe_load(new_config("table", str(words), ["a,b"], "x").text)["source"]["options"]
    assert made["tasks"][0]["kind"] == "binary"


def test_a_dash_beside_a_plus_is_a_class(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", a=["+", "-", "?", "-"] * 3)
    assert labels(reader(file, {"column": "a", "kind": "multiclass"})) == [0, 1, None, 1] * 3
    assert labels(reader(file, {**A, "positive": ["+"]})) == [1, 0, None, 0] * 3
    assert ColumnSummary("a", ["+", "-", "?"]).counts == {"+": 1, "-": 1}


def test_a_word_that_a_task_names_is_a_class(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", a=["EU", "NA", "?", "EU"] * 3)
    task = {"column": "a", "kind": "multiclass", "classes": ["EU", "NA"]}
    assert labels(reader(file, task)) == [0, 1, None, 0] * 3
    assert labels(reader(file, {**A, "positive": ["EU"]}, missing=["?"])) == [1, 0, None, 1] * 3


def test_minus_one_beside_0_and_1_is_missing_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "t.csv", a=["-1", "0", "1.0", "-1.0"] * 3)
    source = reader(file, A)
    assert labels(source) == [None, 0, 1, None] * 3
    assert "column a has -1, -1.0 beside 0 and 1" in caplog.text
    assert "positive: ['1']" in source.describe().notes[0]
    assert labels(reader(file, {**A, "positive": ["1"]})) == [0, 0, 1, 0] * 3
    assert labels(reader(write(tmp_path / "u.csv", a=["-1", "1"] * 6), A)) == [0, 1] * 6
    made = target(ColumnSummary("a", ["-1", "0", "1"] * 9), "", more=False)
    assert (made.options["kind"], made.options["missing"]) == ("binary", ["-1"])


@pytest.mark.parametrize(
    ("yes", "no"),
    [
        ("ja", "nein"), ("Ja", "Nein"), ("oui", "non"), ("Sí", "No"), ("sim", "não"), ("да", "нет"), ("ДА", "НЕТ"),
        ("tak", "nie"), ("是", "否"), ("はい", "いいえ"), ("y", "n"), ("T", "F"), ("on", "off"),
        ("wahr", "falsch"), ("vrai", "faux"), ("TRUE", "FALSE"), ("1.00", "0.00"), ("ja", "nej"), ("ναι", "όχι"),
    ],
)  # fmt: skip
def test_yes_and_no(tmp_path: Path, yes: str, no: str) -> None:
    file = write(tmp_path / "t.csv", a=[yes, no, yes] * 4)
    assert labels(reader(file, A)) == [1, 0, 1] * 4
    if not yes[0].isdigit():
        made = target(ColumnSummary("a", [yes, no, yes]), "", more=False)
        assert (made.options["kind"], "positive" in made.options) == ("binary", False)
        assert made.why == f"67% are {yes}"


def test_classes_of_one_value_are_one_class(tmp_path: Path) -> None:
    multiclass = {"column": "a", "kind": "multiclass"}
    source = reader(write(tmp_path / "t.csv", a=["1", "1.0", "2", "TRUE", "True"] * 3), multiclass)
    assert source.describe().tasks[0].labels == ("1", "2", "true")
    assert labels(source) == [0, 0, 1, 2, 2] * 3
    source = reader(write(tmp_path / "u.csv", a=["01", "1", "2"] * 3), multiclass)
    assert source.describe().tasks[0].labels == ("01", "1", "2")
    source = reader(write(tmp_path / "v.csv", a=["1.0", "2.0"] * 3), {**multiclass, "classes": ["1", "2"]})
    assert labels(source) == [0, 1] * 3


def test_labels_of_images_and_texts_have_markers_too(tmp_path: Path) -> None:
    write(tmp_path / "t.csv", a=["ja", "nein", "NA"] * 4, text=[f"a text {i}" for i in range(12)])
    options = {"file": "t.csv", "tasks": [A], "length": 4}
    texts = build_source("text", str(tmp_path), options)
    assert [entry.fields["row"].cells["a"] for entry in texts.entries()] == ["ja", "nein", ""] * 4
    (tmp_path / "images").mkdir()
    images = build_source("folder", str(tmp_path), {"labels": "t.csv", "image_column": "text", "tasks": [A]})
    assert [entry.fields["row"].cells["a"] for entry in images.entries()] == ["ja", "nein", ""] * 4


def test_dates_are_numbers(tmp_path: Path) -> None:
    days = pd.date_range("2020-01-01", periods=9, freq="50D")
    file = write(tmp_path / "t.csv", a=["1", "0", "1"] * 3, born=[f"{day:%d.%m.%Y}" for day in days[:-1]] + [""])
    source = reader(file, A)
    (born, _) = source.describe().preparation["features"]
    assert (born["type"], born["format"], born["first"], born["gaps"]) == (
        "date",
        "dd.mm.yyyy",
        "2020-01-01",
        False,
    )
    stored = np.stack([source.read(entry)["input"] for entry in source.entries()])
    assert stored[:8, :6].tolist() == [
        [50 * i, day.year, day.month, day.day, day.weekday(), day.day_of_year] for i, day in enumerate(days[:8])
    ]
    kept = [i for i in range(9) if i % 3 != 2]
    assert stored[8, :6] == pytest.approx(stored[kept, :6].mean(axis=0))
    spec = source.describe().input
    assert spec.std[:6] == pytest.approx([s or 1 for s in stored[kept, :6].astype(float).std(axis=0)])
    typed = pd.DataFrame({"born": [*days[:-1], pd.NaT], "x": range(9)})
    assert np.array_equal(prepare(source.describe().preparation, typed), stored)


def test_dates_of_two_meanings_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "t.csv", a=["1", "0", "1"] * 2, day=["03/04/2020", "05/06/2020", "01/02/2020"] * 2)
    (day, _) = reader(file, A).describe().preparation["features"]
    assert day["type"] == "category"
    assert "dates of column day can be read in several ways (dd/mm/yyyy, mm/dd/yyyy)" in caplog.text


@pytest.mark.parametrize(
    ("name", "cells", "use"),
    [
        ("plz", [f"{i:05d}" for i in range(5000, 5300)], "left out"),
        ("site", [f"{i % 9:03d}" for i in range(300)], "category"),
        ("account_id", [str(10_000 + i // 2) for i in range(300)], "left out"),
        ("zip", [str(90_000 + i % 50) for i in range(300)], "category"),
        ("age", [str(i % 80) for i in range(300)], "number"),
        ("born", [f"{1 + i % 28}.{1 + i % 12}.19{10 + i % 80}" for i in range(300)], "date"),
        ("note", [f"the printer number {i} is broken again" for i in range(300)], "left out"),
        ("flag", ["TRUE", "FALSE", "NA"] * 100, "category"),
    ],
)
def test_kinds_of_features(name: str, cells: list[str], use: str) -> None:
    assert feature(ColumnSummary(name, cells)).use == use
    assert ColumnSummary(name, cells).is_text == (name == "note")


@pytest.mark.parametrize("kind", ["table", "text", "folder"])
def test_a_split_column_that_is_asked_for_exists(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / "t.csv", a=["1", "0", "1"] * 4, text=[f"text {i}" for i in range(12)])
    file.write_text(file.read_text().replace("split", "Split", 1))
    (tmp_path / "images").mkdir()
    options: dict[str, Any] = {
        "table": {"file": "t.csv"},
        "text": {"file": "t.csv"},
        "folder": {"labels": "t.csv", "image_column": "text"},
    }[kind] | {"tasks": [A]}
    by_hash = build_source(kind, str(tmp_path), options).entries()
    assert [entry.split for entry in by_hash] != ["train", "train", "val"] * 4
    with pytest.raises(UserError, match="no column split") as caught:
        list(build_source(kind, str(tmp_path), options | {"split_column": "split"}).entries())
    assert "did you mean Split?" in caught.value.remedy
    found = build_source(kind, str(tmp_path), options | {"split_column": "Split"}).entries()
    assert [entry.split for entry in found] == ["train", "train", "val"] * 4
