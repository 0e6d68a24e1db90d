import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmtg_core.tables.cells import cell_number, cell_text
from pipelines.data.preprocessing import load_preparation, prepare
from pipelines.data.sources.tokens import train_tokenizer

AGE = {"column": "age", "type": "number", "mean": 30.0, "gaps": True}
DOSE = {"column": "dose", "type": "number", "mean": 1.5, "gaps": False}
WORK = {"column": "work", "type": "category", "values": ["", "1", "sea"]}
TABLE = {"kind": "table", "features": [AGE, WORK, DOSE], "missing": ["NA"]}
NGRAMS = {"kind": "smiles", "column": "drug", "features": "ngrams", "bits": 64, "longest": 2}
MORGAN = {"kind": "smiles", "column": "drug", "features": "morgan", "bits": 64, "radius": 2}


@pytest.fixture(scope="module")
def text():
    tokenizer = train_tokenizer(["a day at sea", "no day at all"] * 20, 300, 6, lowercase=True)
    return {"kind": "text", "column": "note", "dtype": "uint16", "tokenizer": tokenizer.to_str()}


# age, age is missing, work: empty, 1, sea, other, dose
EXPECTED = [[20, 0, 0, 0, 1, 0, 0.5], [30, 1, 0, 1, 0, 0, 1.5], [30, 1, 1, 0, 0, 0, 2], [30, 1, 0, 0, 0, 1, 1.5]]


def test_a_frame_of_typed_columns():
    frame = pd.DataFrame(
        {
            "age": [20, None, None, float("nan")],
            "work": ["sea", 1.0, None, "air"],
            "dose": [0.5, None, 2, None],
            "more": [0, 0, 0, 0],
        }
    )
    found = prepare(TABLE, frame)
    assert found.dtype == np.float32
    assert found.tolist() == EXPECTED
    assert prepare(TABLE, frame.convert_dtypes()).tolist() == EXPECTED


def test_rows_as_dictionaries_of_texts_or_values():
    rows = [
        {"age": "20", "work": " sea ", "dose": "0.5"},
        {"age": "NA", "work": "1", "dose": ""},
        {"age": "", "work": "NA", "dose": "2"},
        {"age": None, "work": True, "dose": float("nan")},
    ]
    assert prepare(TABLE, rows).tolist() == EXPECTED
    assert prepare(TABLE, rows[0]).tolist() == EXPECTED[:1]


@pytest.mark.parametrize(
    ("raw", "error", "reason"),
    [
        ([{"age": 1, "work": "", "dose": "x"}], ValueError, "row 0: 'x' in column dose is not a finite number"),
        ([{"age": 1, "work": "", "dose": float("inf")}], ValueError, "'inf' in column dose"),
        (
            [{"age": 1, "work": "", "dose": 1}, {"age": 1}],
            ValueError,
            "row 1: no column work, dose; there are age",
        ),
        (pd.DataFrame({"work": ["sea"]}), ValueError, "row 0: no column age, dose; there are work"),
        ([[1, 2, 3]], TypeError, "row 0: expected the columns age, work, dose, got list"),
        ([], ValueError, "expected at least one sample"),
    ],
)
def test_rows_that_cannot_be_used(raw, error, reason):
    with pytest.raises(error, match=reason):
        prepare(TABLE, raw)


def test_texts_in_every_form(text):
    notes = ["A day", "no day at all at sea, no day"]
    expected = prepare(text, notes)
    assert (expected.shape, expected.dtype) == ((2, 6), np.uint16)
    assert expected[0, 2:].tolist() == [0] * 4
    assert expected[1].all()
    frame = pd.DataFrame({"id": [1, 2], "note": notes})
    for raw in (np.array(notes), np.array([[n] for n in notes]), frame["note"], frame, frame.to_dict("records")):
        assert np.array_equal(prepare(text, raw), expected)
    assert np.array_equal(prepare(text, notes[0]), expected[:1])
    assert np.array_equal(prepare(json.loads(json.dumps(text)), notes), expected)


def test_name_of_the_padding_token_in_a_text_is_text(text):
    assert prepare(text, ["[PAD]"])[0, 0] != 0


@pytest.mark.parametrize("note", ["", "  ", None, 3.0])
def test_value_that_is_not_a_text_is_refused(text, note):
    with pytest.raises(ValueError, match="row 1: expected a text in column note, got"):
        prepare(text, [{"note": "day"}, {"note": note}])


def test_ngrams_are_the_same_on_every_machine():
    found = np.rint(prepare(NGRAMS, ["CCO"])[0].astype(float) ** 2)
    # CRC-32 of ^, C, O, |, ^C, CC, CO and O|, modulo 64
    assert {int(i): int(found[i]) for i in found.nonzero()[0]} == {
        12: 1,
        15: 1,
        19: 1,
        26: 1,
        34: 1,
        39: 2,
        56: 1,
        62: 1,
    }


@given(st.text(min_size=1).filter(str.strip))
def test_ngrams_take_any_text(smiles):
    found = prepare(NGRAMS, [smiles])
    length = len(smiles.strip().encode()) + 2
    assert found.shape == (1, 64)
    assert (found.astype(float) ** 2).sum() == pytest.approx(2 * length - 1, rel=0.01)


def test_fingerprints_do_not_depend_on_how_a_molecule_is_written():
    pytest.importorskip("rdkit")
    assert load_preparation(MORGAN).libraries == ("rdkit",)
    first, second = prepare(MORGAN, ["OCC", "C(O)C"])
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)
    with pytest.raises(ValueError, match=r"row 1: 'C\(' in column drug is not a molecule"):
        prepare(MORGAN, ["CC", "C("])


def test_examples_can_be_prepared(text):
    for values in (TABLE, NGRAMS, text):
        how = load_preparation(values)
        assert set(how.example()) == set(how.columns)
        assert len(prepare(values, [how.example()])) == 1


def test_unknown_kind():
    with pytest.raises(ValueError, match="unknown preparation 'sound', expected one of table, text, smiles"):
        prepare({"kind": "sound"}, ["a"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), (float("nan"), ""), (pd.NA, ""), (pd.NaT, ""), (np.float32(2), "2"), (2.5, "2.5"),
        (True, "True"), (np.int64(7), "7"), (" a ", "a"), (-0.0, "0"), (1e300, str(int(1e300))),
    ],
)  # fmt: skip
def test_cell_text(value, text):
    assert cell_text(value) == text


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_number_survives_its_text(number):
    assert cell_number(cell_text(number)) == number


def test_preprocessing_needs_no_library_of_the_drivers():
    row = {"age": 1, "work": "", "dose": 2}
    code = "from pipelines.data.preprocessing import prepare"
    code += f"; prepare({NGRAMS!r}, ['CCO']); prepare({TABLE!r}, {row!r})"
    code += "; import sys; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    held = set(done.stdout.split())
    assert "numpy" in held
    assert not held & {"ray", "mlflow", "pyarrow", "pydantic", "pandas", "rdkit", "tokenizers", "torch"}
