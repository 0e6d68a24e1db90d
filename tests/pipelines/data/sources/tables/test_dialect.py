"""The dialect of a file is found in its first bytes, and files of all dialects have the same content."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli.app import app
from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.data.preprocessing import prepare
from pipelines.data.sources import build_source
from pipelines.data.sources.base import Source
from pipelines.data.sources.rows import read_rows, table_dialect
from pipelines.data.sources.tables import dialect as dialects
from pipelines.data.sources.tables.dialect import Dialect, DialectOptions, dialect_of
from pipelines.data.sources.tables.encodings import unpacked
from pipelines.errors import UserError
from pipelines.scaffold.template import new_config
from pipelines.storage import locate
from pipelines.training.driver import train
from tests.pipelines.data.sources.tables.dialect_files import DIALECTS, Written, tidy_rows, write_table
from tests.soak import others_in_soak

OPTIONS: dict[str, Any] = {
    "id_column": "id",
    "categorical": ["town", "postcode", "active", "note"],
    "tasks": [
        {"column": "sick", "kind": "binary"},
        {"column": "size", "kind": "multiclass"},
        {"column": "cost", "kind": "regression"},
    ],
}


@pytest.fixture(params=list(DIALECTS))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Written]:
    """A table as a tidy CSV, and in a dialect."""
    script, how = DIALECTS[request.param]
    (tmp_path / "other").mkdir()
    rows = tidy_rows(script)
    tidy = write_table(tmp_path / "tidy.csv", rows, Written())
    return tidy, write_table(tmp_path / "other" / how.name, rows, how), how


def reader(file: Path, **options: Any) -> Source:
    return build_source("table", str(file), {**OPTIONS, **options})


def content(source: Source) -> dict[str, dict[str, Any]]:
    return {entry.id: {"split": entry.split, **source.read(entry)} for entry in source.entries()}


def frame(file: Path, how: Written, **options: Any) -> pd.DataFrame:
    with unpacked(locate(str(file))) as (content, _):
        data = io.BytesIO(content.read())
    return pd.read_csv(data, sep=how.delimiter, encoding=how.encoding.replace("-be", ""), **options)


def typed_frame(file: Path, how: Written) -> pd.DataFrame:
    # pandas takes the points of 31.12.2020 for separators of thousands
    return frame(file, how, decimal=how.decimal, thousands=how.thousands or None, dtype={"born": str})


def test_all_dialects_have_the_same_content(pair: tuple[Path, Path, Written]) -> None:
    tidy, other, how = pair
    expected, found = reader(tidy), reader(other)
    left, right = expected.describe(), found.describe()
    assert (left.input, left.tasks, left.columns) == (right.input, right.tasks, right.columns)
    known, made = ({one["column"]: one for one in side.preparation["features"]} for side in (left, right))
    assert made.pop("born") == known.pop("born") | {"format": made_format(how)}
    assert made == known
    assert {one["type"] for one in known.values()} == {"number", "category"}
    rows, others = content(expected), content(found)
    assert list(rows) == list(others)
    for name, values in rows.items():
        for column, value in values.items():
            assert np.array_equal(value, others[name][column]), (name, column)


def made_format(how: Written) -> str:
    return how.date.format(y="yyyy", m="mm", d="dd")


def trained(folder: Path, rows: list[dict[str, str]], how: Written) -> tuple[dict[str, Any], bytes]:
    """The metrics of a model of the table in a dialect, and its predictions for rows in this dialect."""
    (folder / "new").mkdir(parents=True)
    values = {
        "name": "t",
        "source": {"kind": "table", "root": str(write_table(folder / how.name, rows, how)), "options": OPTIONS},
        "data": {"shards": str(folder / "shards"), "min_support": 2},
        "network": {"encoder": "mlp", "groups": 2, "options": {"widths": [8, 4]}},
        "train": {"epochs": 1, "batch_size": 16},
        "search": {"method": "dmtg", "baseline": False},
        "track": {"uri": "none"},
        "run": {"root": str(folder / "runs")},
        "ray": {"executor": "embedded"},
    }
    done = train(checked(Config, values), lambda _: None)
    new = write_table(folder / "new" / how.name, rows[:40], how)
    said = CliRunner().invoke(app, ["predict", str(done.run), str(new), "-o", str(folder / "out.csv")])
    assert said.exit_code == 0, said.stderr
    return done.result["metrics"], (folder / "out.csv").read_bytes()


@pytest.mark.parametrize(
    "name", others_in_soak(["german spreadsheet", "utf-16 of a spreadsheet"], "german spreadsheet")
)
def test_a_dialect_ends_in_the_same_model(tmp_path: Path, name: str) -> None:
    """Metrics and predictions are equal bit for bit. For the other dialects this follows from the equal arrays in
    `test_all_dialects_have_the_same_content`, because training reads nothing else."""
    script, how = DIALECTS[name]
    rows = tidy_rows(script)
    metrics, predictions = trained(tmp_path / "tidy", rows, Written())
    other_metrics, other_predictions = trained(tmp_path / "other", rows, how)
    assert other_metrics == metrics
    assert other_predictions == predictions
    assert predictions.count(b"\n") == 41


def test_what_is_found_is_what_was_written(pair: tuple[Path, Path, Written]) -> None:
    _, other, how = pair
    found = dialect_of(locate(str(other)))
    assert (found.delimiter, found.decimal, found.header) == (how.delimiter, how.decimal, True)
    assert how.thousands in found.thousands
    assert bool(found.thousands) == bool(how.thousands)
    names = {"utf-16-be": "utf-16", "latin-1": "cp1252"}
    assert found.encoding == names.get(how.encoding, how.encoding)


def test_cells_are_those_of_pandas(pair: tuple[Path, Path, Written]) -> None:
    _, other, how = pair
    found = pd.DataFrame([row.cells for row in read_rows(locate(str(other)), ())])
    known = typed_frame(other, how)
    assert list(found.columns) == list(known.columns)
    for name in ("height", "income", "cost"):
        assert np.array_equal(pd.to_numeric(found[name]), known[name], equal_nan=True)
    for name in ("town", "note", "size", "split", "born"):
        assert found[name].tolist() == known[name].str.strip().tolist()


def test_a_frame_of_pandas_is_prepared_as_the_file(pair: tuple[Path, Path, Written]) -> None:
    _, other, how = pair
    source = reader(other)
    preparation = source.describe().preparation
    stored = np.stack([row["input"] for row in content(source).values()])
    assert np.array_equal(prepare(preparation, typed_frame(other, how)), stored)
    texts = frame(other, how, dtype=str, keep_default_na=False)
    assert np.array_equal(prepare(preparation, texts), stored)


def test_a_new_configuration_has_the_dialect(pair: tuple[Path, Path, Written]) -> None:
    _, other, _ = pair
    made = yaml.safe_load(new_config("table", str(other), ["sick,size"], "x").text)["source"]["options"]
    found = dialect_of(locate(str(other)))
    assert made.get("dialect", {}) == found.options
    assert [task.name for task in build_source("table", str(other), made).describe().tasks] == ["sick", "size"]


def test_a_dialect_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_table(tmp_path / "t.csv", tidy_rows("latin"), Written(";", ",", ".", "cp1252"))
    with caplog.at_level(logging.INFO):
        source = reader(file)
        source.describe()
        list(source.entries())
    assert caplog.text.count("separated by semicolons, decimal commas, thousands separated by '.', CP1252") == 1


def test_features_are_told_as_they_are_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [
        "id;Größe, in cm;Alter;geboren;krank",
        *(f"a{i};1,5{i};{i};0{i % 9 + 1}.02.1999;{i % 2}" for i in range(20)),
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines), encoding="cp1252")
    tasks = [{"column": "krank", "kind": "binary"}]
    with caplog.at_level(logging.INFO):
        build_source("table", str(tmp_path / "t.csv"), {"id_column": "id", "tasks": tasks}).describe()
    assert '2 features are numbers: "Größe, in cm", Alter\n' in caplog.text
    assert "1 feature is a date: geboren\n" in caplog.text
    assert "categor" not in caplog.text


def test_options_come_before_what_is_found(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("a;b\n1,5;Пётр\n2,5;Яна\n".encode("cp1251"))
    where = locate(str(tmp_path / "t.csv"))
    with pytest.raises(UserError, match="line 2, byte 7 of it: 0xf2 is not UTF-8") as caught:
        list(read_rows(where, ["a"]))
    assert "cp1251" in caught.value.remedy
    found = list(read_rows(where, ["a"], dialect=dialect_of(where, DialectOptions(encoding="cp1251"))))
    assert [row.cells for row in found] == [{"a": "1.5", "b": "Пётр"}, {"a": "2.5", "b": "Яна"}]
    given = DialectOptions(encoding="cp1251", decimal=".", header=False, thousands="", quotes="'")
    found = list(read_rows(where, (), dialect=dialect_of(where, given)))
    assert [row.cells["column_1"] for row in found] == ["a", "1,5", "2,5"]
    with pytest.raises(UserError, match="no encoding cp1"):
        dialect_of(where, DialectOptions(encoding="cp1"))


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("a,b\n1,2\n3,4\n", True),
        ("1.5,x\n2.5,y\n3.5,z\n", False),
        ("5,1,0\n3,0,0\n4,1,1\n", False),
        ("1990,1991,1992\n5,6,7\n7,8,9\n", True),
        (",0,1\n0,5,6\n1,7,8\n", True),
        ("name,2020\nx,1\ny,2\n", True),
        ("x,y\nz,y\nx,z\n", True),
        ("2020-01-05,1.5\n2020-02-05,2.5\n2021-02-05,1.0\n", False),
    ],
)
def test_header(tmp_path: Path, text: str, header: bool) -> None:
    (tmp_path / "t.csv").write_text(text)
    found = dialect_of(locate(str(tmp_path / "t.csv")))
    assert found.header is header
    rows = list(read_rows(locate(str(tmp_path / "t.csv")), ()))
    assert len(rows) == text.count("\n") - header
    if not header:
        assert next(iter(rows[0].cells)) == "column_1"
        names = text.partition("\n")[0].split(",")
        assert dialect_of(locate(str(tmp_path / "t.csv")), columns=names).header


@pytest.mark.parametrize(
    ("text", "delimiter", "decimal", "thousands"),
    [
        ('a,b\n"1,234",x\n"12,345,678",y\n', ",", ".", ","),
        ('a,b\n"1,5",x\n"2,25",y\n', ",", ",", ""),
        ("a;b\n1,234;x\n2,345;y\n", ";", ",", ""),
        ("a;b\n1.234,5;x\n12.345.678,25;y\n", ";", ",", "."),
        ("a;b\n1'234.5;x\n12'345.25;y\n", ";", ".", "'\u2019"),
        ("sep=|\na|b\n1|x\n2|y\n", "|", ".", ""),
        ('sep=;\r\na;b\r\n1,5;"x;y"\r\n', ";", ",", ""),
        ("text;n\nwell, yes;1\nno, no;2\n", ";", ".", ""),
        ('text,n\n"a; b",1\n"c; d",2\n', ",", ".", ""),
        ("a\n1\n2\n", ",", ".", ""),
        ("ip;v\n10.0.0.1;1.5\n10.0.0.2;2.5\n", ";", ".", ""),
    ],
)
def test_marks(tmp_path: Path, text: str, delimiter: str, decimal: str, thousands: str) -> None:
    (tmp_path / "t.csv").write_text(text, newline="")
    found = dialect_of(locate(str(tmp_path / "t.csv")))
    assert (found.delimiter, found.decimal, found.thousands) == (delimiter, decimal, thousands)


def test_the_usual_dialect_has_no_options() -> None:
    assert Dialect().options == {}
    assert Dialect(encoding="utf-16", header=False, quotes="").options == {"header": False, "quotes": ""}
    assert Dialect(";", ",", encoding="cp1252").options == {
        "delimiter": ";", "decimal": ",", "encoding": "cp1252"
    }  # fmt: skip


def test_the_beginning_suffices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_table(tmp_path / "t.csv", tidy_rows("cyrillic"), Written(";", ",", ".", date="{d}.{m}.{y}"))
    whole = dialect_of(locate(str(file)))
    for size in range(400, 440):
        monkeypatch.setattr(dialects, "HEAD_BYTES", size)
        assert dialect_of(locate(str(file))) == whole


@pytest.mark.parametrize(
    ("cells", "unsure"),
    [
        (["1.234", "12.500", "-3.000"], "1.234"),  # both readings fit
        (["1.234", "12.5"], ""),
        (["0.234", "1.500"], ""),
        (["1.234"], ""),
        (["1234", "1500"], ""),
        (["1,234", "12,500"], "1,234"),
    ],
)
def test_numbers_that_can_have_thousands_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cells: list[str], unsure: str
) -> None:
    file = tmp_path / "prices.csv"
    file.write_text("id;price\n" + "".join(f"a{n};{cell}\n" for n, cell in enumerate(cells)))
    with caplog.at_level(logging.INFO):
        assert table_dialect(locate(str(file)), log=True).unsure == unsure
    if unsure:
        option = f"source.options.dialect.thousands='{unsure[1]}'"
        assert f"{unsure} is read as 1.234 (if it is 1234: {option})" in caplog.text
    assert not dialect_of(locate(str(file)), DialectOptions(decimal=".")).unsure
