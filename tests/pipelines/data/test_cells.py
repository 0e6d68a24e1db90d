"""A cell has one normal form, whichever type it has."""

from __future__ import annotations

import io
import json
import logging
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmtg_core.tables.cells import cell_text, in_points, normal_form, number_pattern
from dmtg_core.tables.dates import FORMATS, formats_of, parts_of, read_date
from pipelines.data.preprocessing import prepare

NUMBERS = st.one_of(
    st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), st.booleans()
)  # fmt: skip


def form(value: Any) -> str:
    return normal_form(cell_text(value))


@given(NUMBERS)
def test_a_value_and_its_text_are_the_same(value: float) -> None:
    assert form(str(value)) == form(value) == form(json.loads(json.dumps(value)))
    assert form(normal_form(cell_text(value))) == form(value)
    assert form(np.asarray(value)[()]) == form(value)


@given(st.lists(st.integers(-(2**31), 2**31), min_size=1), st.booleans())
def test_pandas_reads_the_same_values(numbers: list[int], gap: bool) -> None:
    cells = [*map(str, numbers), *([""] if gap else [])]  # with a gap pandas makes floats of whole numbers
    read = pd.read_csv(io.StringIO("a,b\n" + "".join(f"{cell},x\n" for cell in cells)))
    assert [form(cell) for cell in read["a"]] == list(map(normal_form, cells))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1", "1.0", "1.", "+1", "1e0", "01", 1, 1.0, np.int8(1), np.float32(1), Decimal("1.00")], "1"),
        (["0", "-0", "-0.0", 0, -0.0], "0"),
        (["TRUE", "True", "true", True, np.True_], "true"),
        (["1.50", "1.5", 1.5, Decimal("1.5")], "1.5"),
        (["", None, float("nan"), pd.NA, pd.NaT], ""),
        (["tRUE"], "tRUE"),
        (["1_000"], "1_000"),
        (["1.2.3"], "1.2.3"),
        (["12345678901234567891", 12345678901234567891], "12345678901234567891"),
    ],
)
def test_normal_form(values: list[Any], expected: str) -> None:
    assert [form(value) for value in values] == [expected] * len(values)


@given(st.integers(-(10**9), 10**9), st.integers(0, 10**6))
def test_decimal_marks_and_thousands(whole: int, part: int) -> None:
    shown = f"{whole:,}.{part:06d}"
    assert float(in_points(shown, ".", ",")) == float(f"{whole}.{part:06d}")
    german = shown.translate(str.maketrans(",.", ".,"))
    assert float(in_points(german, ",", ".")) == float(f"{whole}.{part:06d}")
    assert in_points(shown, ".", "") == shown
    assert bool(number_pattern(".", "").fullmatch(shown)) == ("," not in shown)


@pytest.mark.parametrize("cell", ["1,2,3", "a,b", "1.2.2020", "0.123,x", "12.34,5", "", "-"])
def test_other_cells_are_unchanged(cell: str) -> None:
    assert in_points(cell, ",", ".") == cell


PLANT = {"column": "plant", "type": "category", "values": ["001", "002", "010"], "form": "digits"}
MIXED = {"column": "mixed", "type": "category", "values": ["1", "001", "2"], "form": "digits"}
GRADE = {"column": "grade", "type": "category", "values": ["", "1", "2.5", "true"], "form": "value"}
OLD = {"column": "old", "type": "category", "values": ["1.0", "True"]}
DOSE = {"column": "dose", "type": "number", "mean": 2.0, "gaps": False}


def places(feature: dict[str, Any], cells: list[Any], **more: Any) -> list[int]:
    raw = [{feature["column"]: cell} for cell in cells]
    return (
        prepare({"kind": "table", "features": [feature], "missing": ["NA"], **more}, raw).argmax(axis=1).tolist()
    )


def test_categories_by_value() -> None:
    assert places(GRADE, ["1.0", 1, 1.0, "2.50", 2.5, True, "TRUE", "NA", None, "3"]) == [
        1,
        1,
        1,
        2,
        2,
        3,
        3,
        0,
        0,
        4,
    ]


def test_a_number_finds_the_only_text_with_leading_zeros() -> None:
    assert places(PLANT, ["001", 1, 1.0, "1", 10, "10", 3, "003"]) == [0, 0, 0, 0, 2, 2, 3, 3]
    assert places(MIXED, ["001", "1", 1, 2]) == [1, 0, 3, 2]


def test_categories_of_earlier_versions_are_compared_as_texts() -> None:
    assert places(OLD, ["1.0", 1.0, True, "TRUE"]) == [0, 2, 1, 2]


def test_texts_have_the_recorded_marks_and_numbers_have_none() -> None:
    german = {"kind": "table", "features": [DOSE], "missing": [], "decimal": ",", "thousands": "."}
    raw = [{"dose": cell} for cell in ("1,5", 1.5, "1.234", 1.234, "1.234,5", "7.25", "", True)]
    found = prepare(german, raw)[:, 0].tolist()
    assert found == pytest.approx([1.5, 1.5, 1234, 1.234, 1234.5, 7.25, 2, 1])


def test_unseen_values_are_counted_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    table = {"kind": "table", "features": [GRADE, PLANT, DOSE], "missing": []}
    rows = [{"grade": cell, "plant": "001", "dose": 1} for cell in ["1", "x", "y", "x", *"abcd"]]
    prepare(table, rows)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "column grade: 7 of 8 cells have a value that training did not have: 'x', 'y', 'a', 'b', 'c', …"
    )
    caplog.clear()
    prepare(table, rows[:1])
    assert not caplog.records


@given(st.datetimes(pd.Timestamp("1678-01-01").to_pydatetime(), pd.Timestamp("2261-01-01").to_pydatetime()))
def test_dates_are_those_of_pandas(moment: datetime) -> None:
    moment = moment.replace(microsecond=0)
    shown = {"yyyy": f"{moment.year}", "mm": f"{moment.month:02d}", "dd": f"{moment.day}"}
    known = pd.Timestamp(moment)
    for name in FORMATS:
        cell = name
        for key, value in shown.items():
            cell = cell.replace(key, value)
        for clock in (f" {moment:%H:%M:%S}", f"T{moment:%H:%M:%S}Z", f" {moment:%I:%M:%S %p}"):
            found = read_date(cell + clock, name)
            assert found is not None
            assert found.replace(tzinfo=None) == moment
            assert name in formats_of(cell + clock)
            first = found.replace(year=1600, month=1, day=1, hour=0, minute=0, second=0)
            days, *parts, hour = parts_of(found, first, clock=True)
            expected = [known.year, known.month, known.day, known.weekday(), known.day_of_year]
            assert parts == expected
            assert days == (known.date() - date(1600, 1, 1)).days
            assert hour == pytest.approx(known.hour + known.minute / 60 + known.second / 3600)
    assert read_date(str(known), "dd.mm.yyyy") == read_date(moment.isoformat(), "mm/dd/yyyy")


@pytest.mark.parametrize("cell", ["2020-13-01", "31.02.2020", "20200131", "1.5", "2020", "10:30", "1.2.20", ""])
def test_what_is_no_date(cell: str) -> None:
    assert list(formats_of(cell)) == []


def test_days_and_months_that_can_be_exchanged() -> None:
    assert list(formats_of("03/04/2020")) == ["dd/mm/yyyy", "mm/dd/yyyy"]
    assert list(formats_of("13/04/2020")) == ["dd/mm/yyyy"]
