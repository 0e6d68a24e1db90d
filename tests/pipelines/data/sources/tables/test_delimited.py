"""Every error of a table of text names the line and the column."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.sources.rows import read_rows, table_dialect
from pipelines.data.sources.tables import delimited
from pipelines.data.sources.tables.dialect import DialectOptions
from pipelines.errors import UserError
from pipelines.storage import locate

GOOD = b"1,2,x\n" * 2000


def complaint(file: Path, data: bytes) -> UserError:
    file.write_bytes(data)
    with pytest.raises(UserError) as caught:
        list(read_rows(locate(str(file)), ()))
    return caught.value


@pytest.mark.parametrize(
    ("tail", "what", "remedy"),
    [
        (b'3,4,"open\n5,6,x\n', "line 2002, column 3 (c): a quote opens and is not closed", "close it"),
        (b'3,"a" b",x\n', "line 2002, column 2 (b): a quote opens, and closes before ' b\",x'", "are doubled"),
        (b'3,"a\\" b",x\n', "line 2002, column 2 (b): a quote opens, and closes before ' b\",x'", "are doubled"),
        (
            b'"a\nb",4,"y\nz" u\n',
            "line 2003, column 3 (c): a quote opens, and closes in line 2004 before ' u'",
            "are",
        ),
        (b"3,4\n", "line 2002 has 2 cells, expected 3: it ends before column c", "a comma needs quotes"),
        (b"3,4,5,6,7\n", "line 2002 has 5 cells, expected 3: '6' is after the last column, c", "a comma needs"),
        (b"3,\x81,5\n", "line 2002, byte 3 of it: 0x81 is not UTF-8", "cp1251"),
    ],
)
def test_lines_and_columns(tmp_path: Path, tail: bytes, what: str, remedy: str) -> None:
    for more in (b"", GOOD * 100):
        found = complaint(tmp_path / "t.csv", b"a,b,c\n" + GOOD + tail + more)
        assert found.what.startswith(what)
        assert remedy in found.remedy


def test_the_line_of_a_byte_far_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a,b,c\n" + "1,ä,x\n" * 30_000
    for block in (1000, 1001, 2**16):
        monkeypatch.setattr("pipelines.data.sources.tables.encodings.BLOCK_BYTES", block)
        found = complaint(tmp_path / "t.csv", text.encode() + b"1,ab\xff,x\n")
        assert found.what == "line 30002, byte 5 of it: 0xff is not UTF-8"
        assert "cp1252" in found.remedy


def test_what_is_no_table_of_text_is_named(tmp_path: Path) -> None:
    assert "an Excel workbook" in complaint(tmp_path / "t.csv", b"PK\x03\x04" + bytes(99)).what
    whole = gzip.compress(b"a,b\n" + b"1,2\n" * 9999)
    found = complaint(tmp_path / "t.csv", whole[:-20])
    assert found.what.startswith("the file is compressed, and damaged or cut off")
    assert (
        complaint(tmp_path / "t.csv", b"a,a,b\n1,2,3\n").what == "column a occurs more than once: as columns 1, 2"
    )
    assert complaint(tmp_path / "t.csv", b"").what == "the table has no rows"


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"a,b\n1,{'z' * 500_000}\n")
    (row,) = read_rows(locate(str(tmp_path / "t.csv")), ())
    assert len(row.cells["b"]) == 500_000


def test_a_similar_column_is_proposed(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("Split,price\n1,2\n")
    for asked, near in (("split", "did you mean Split?"), ("prices", "did you mean price?")):
        with pytest.raises(UserError, match=f"no column {asked}") as caught:
            list(read_rows(locate(str(tmp_path / "t.csv")), [asked]))
        assert caught.value.remedy.startswith(near)


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)


@given(st.lists(st.lists(CELLS, min_size=3, max_size=3), min_size=1), st.sampled_from([",", ";", "\t", "|"]))
def test_cells_are_those_that_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], delimiter: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.csv"
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([["x", "y", "z"], *rows])
    where = locate(str(file))
    dialect = table_dialect(where, DialectOptions(delimiter=delimiter, decimal=".", thousands="", header=True))
    found = list(read_rows(where, (), dialect=dialect))
    assert [list(row.cells.values()) for row in found] == [[cell.strip() for cell in row] for row in rows]
    assert delimited.csv.field_size_limit() >= 2**28
