"""Preprocessing: rows of a table, texts and molecules to the stored input of a network.

The manifest of the shards describes a preprocessing as a small JSON object with its `kind` and with values from
the training split. The readers and a served model run the same code, so a model receives the input it was trained
on. The module needs numpy. Some kinds need one more library, which is imported where it is used.
"""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from pipelines.data.cells import by_number, cell_number, cell_text, in_points, marks_of, normal_form
from pipelines.data.dates import ISO, PARTS, parts_of, read_date

logger = logging.getLogger(__name__)

MARKS = ("decimal", "thousands")  # of a preparation, for numbers that are given as texts
_UNSEEN = "\0"  # no cell
MOST_EXAMPLES = 5  # most unseen values of a column in a message


class Preparation(Protocol):
    """One conversion from raw to stored input."""

    kind: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The raw columns."""
        ...

    @property
    def libraries(self) -> tuple[str, ...]:
        """Packages that it needs in addition to numpy."""
        ...

    def row(self, cells: Mapping[str, Any]) -> np.ndarray:
        """The stored input of one sample.

        Args:
            cells: A raw value for each of `columns`.

        Raises:
            ValueError: When the sample cannot be used, with the reason.
        """
        ...

    def example(self) -> dict[str, Any]:
        """A synthetic raw sample that can be used. It discloses no sample of the data set."""
        ...


def load_preparation(values: Mapping[str, Any]) -> Preparation:
    """The preparation that a manifest describes.

    Raises:
        ValueError: For an unknown kind.
    """
    kind = values.get("kind")
    if kind not in PREPARATIONS:
        raise ValueError(f"unknown preparation {kind!r}, expected one of {', '.join(PREPARATIONS)}")
    return PREPARATIONS[str(kind)](values)


def prepare(preparation: Mapping[str, Any] | Preparation, raw: Any) -> np.ndarray:
    """Convert raw samples to stored input.

    Args:
        preparation: The object of `Description.preparation`, or the result of `load_preparation` for it.
        raw: A DataFrame or a list of dictionaries with the raw columns; if there is only one column, also a list
            or an array of its values.

    Values of categories that the training split does not have are counted and logged, in one warning.

    Returns:
        `(B, F)` or `(B, L)`, as stored in the shards.

    Raises:
        ValueError: For a missing column, and for a sample that cannot be used, with its row number from 0.
        TypeError: For samples without named columns if there are several columns.
    """
    how = load_preparation(preparation) if isinstance(preparation, Mapping) else preparation
    rows = _rows(how, raw)
    stored = np.stack([_numbered(how, number, cells) for number, cells in enumerate(rows)])
    remarks = how.remarks(rows, stored) if isinstance(how, TablePreparation) else []
    if remarks:
        logger.warning("%s", "; ".join(remarks))
    return stored


def for_plain_cells(values: Mapping[str, Any]) -> dict[str, Any]:
    """A preparation for cells of `rows.read_rows`, whose numbers are already as in Python."""
    return {key: value for key, value in values.items() if key not in MARKS}


def _numbered(how: Preparation, number: int, cells: Mapping[str, Any]) -> np.ndarray:
    try:
        return how.row(cells)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error


def _rows(how: Preparation, raw: Any) -> list[Mapping[str, Any]]:
    """The raw samples as dictionaries that have every column."""
    names = how.columns
    if hasattr(raw, "to_dict") and hasattr(raw, "columns"):  # a DataFrame; pandas is not needed
        unnamed = list(raw.columns) == [0]  # a DataFrame of a plain list
        raw = list(raw[0]) if unnamed else raw.to_dict("records")
    samples: list[Any] = [raw] if isinstance(raw, str | Mapping) else list(raw)
    if not samples:
        raise ValueError("expected at least one sample, got none")
    if len(names) == 1:
        samples = [one if isinstance(one, Mapping) else {names[0]: _single(one)} for one in samples]
    _check_columns(names, samples)
    return samples


def _check_columns(names: Sequence[str], samples: Sequence[Any]) -> None:
    for number, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            raise TypeError(f"row {number}: expected the columns {_few(names)}, got {type(sample).__name__}")
        missing = [name for name in names if name not in sample]
        if missing:
            raise ValueError(f"row {number}: no column {_few(missing)}; there are {_few(sample) or 'none'}")


def _few(columns: Iterable[Any]) -> str:
    from dmtg_core.names import listed  # imports torch, which preprocessing does not need

    return listed(map(str, columns), 20)


def _single(value: Any) -> Any:
    """The value, unwrapped if it is in a row of length one."""
    return value[0] if isinstance(value, list | tuple | np.ndarray) and len(value) == 1 else value


class TablePreparation:
    """Columns of a table as float32 features, in the order of `features`.

    A number is one feature in its own unit. A missing number is the mean of the training split; if the training
    split has missing numbers, a second feature is 1 for them. A date is one feature for each of its `parts`. A
    category has one feature for each value of the training split and one for all other values; one of them is
    1. An empty cell is a value of a category. Numbers are standardised on the device, by `InputSpec.mean` and
    `InputSpec.std`.

    The `form` of a category says when two cells are the same value: "value" if they have the same
    `normal_form`, as 1, "1.0" and 1.0 have; "digits" for texts with leading zeros, where a number is the only
    text that equals it. Without it, as in models of earlier versions, cells are compared as texts. `decimal`
    and `thousands` are the marks in numbers that are given as texts.
    """

    kind = "table"
    libraries: tuple[str, ...] = ()

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._features: Sequence[Mapping[str, Any]] = values["features"]
        self._missing = frozenset(values["missing"])
        self._marks = marks_of(values)
        self._of_column = {feature["column"]: _Feature(feature) for feature in self._features}
        self._starts = [0, *accumulate(one.size for one in self._of_column.values())]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the features."""
        return tuple(feature["column"] for feature in self._features)

    def row(self, cells: Mapping[str, Any]) -> np.ndarray:
        """float32 (F,).

        Raises:
            ValueError: For text in a column of numbers or of dates.
        """
        found = np.zeros(self._starts[-1], np.float32)  # filled in place, because a category can have many values
        for (column, feature), start in zip(self._of_column.items(), self._starts, strict=False):
            feature.fill(found[start : start + feature.size], self._text(cells[column]), cells[column])
        return found

    def _text(self, value: Any) -> str:
        text = cell_text(value)
        if text in self._missing:
            return ""
        return in_points(text, *self._marks) if self._marks and isinstance(value, str) else text

    def remarks(self, rows: Sequence[Mapping[str, Any]], stored: np.ndarray) -> list[str]:
        """What is remarkable about samples: values of categories that the training split does not have.

        Args:
            rows: Raw samples.
            stored: float32 (B, F), the result of `row` for each of them.
        """
        found: dict[str, Counter[str]] = {}
        for column, place in self._others.items():
            if (places := np.flatnonzero(stored[:, place])).size:
                found[column] = Counter(self._text(rows[i][column]) for i in places.tolist())
        return unseen_remarks(found, len(rows))

    def unseen(self, cells: Mapping[str, Any], stored: np.ndarray) -> dict[str, str]:
        """The columns of a sample whose category the training split does not have, with its value.

        Args:
            cells: The raw sample.
            stored: float32 (F,), the result of `row`.
        """
        return {column: self._text(cells[column]) for column, end in self._others.items() if stored[end]}

    @cached_property
    def _others(self) -> dict[str, int]:
        """Category → place of its stored value for other values."""
        ends = zip(self._of_column.items(), self._starts[1:], strict=True)
        return {column: end - 1 for (column, feature), end in ends if feature.kind == "category"}

    def example(self) -> dict[str, Any]:
        """The mean of each number, the first value of each category and the first day of each date."""
        return {column: feature.example for column, feature in self._of_column.items()}


def unseen_remarks(unseen: Mapping[str, Counter[str]], rows: int) -> list[str]:
    """Sentences about values that the training split does not have.

    Args:
        unseen: Column → value → number of its cells.
        rows: Number of samples.
    """
    found = []
    for column, cells in unseen.items():
        shown = ", ".join(map(repr, list(cells)[:MOST_EXAMPLES])) + (", …" if len(cells) > MOST_EXAMPLES else "")
        count = f"{cells.total()} of {rows} cells"
        found.append(f"column {column}: {count} have a value that training did not have: {shown}")
    return found


class _Feature:
    """One column: its number of stored values, and how a cell becomes these."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._column, self.kind = values["column"], values["type"]
        self._values = values
        self.fill = {"number": self._fill_number, "date": self._fill_date, "category": self._fill_category}[
            self.kind
        ]
        if self.kind == "category":
            self.size, self.example = len(values["values"]) + 1, values["values"][0]
            self._places = {value: place for place, value in enumerate(values["values"])}
            self._form = values.get("form", "text")
            self._texts = by_number(values["values"]) if self._form == "digits" else {}
            return
        self._gaps: bool = values["gaps"]
        self._means: list[float] = values["means"] if self.kind == "date" else [values["mean"]]
        self.size = len(self._means) + self._gaps
        if self.kind == "date":
            self.example = values["first"]
            self._first = read_date(self.example, ISO)
        else:
            self.example = values["mean"]

    def _fill_category(self, found: np.ndarray, cell: str, value: Any) -> None:
        if self._form == "value":
            cell = normal_form(cell)
        elif self._form == "digits" and cell and not (isinstance(value, str) and cell in self._places):
            cell = self._texts.get(normal_form(cell), _UNSEEN)
        found[self._places.get(cell, -1)] = 1

    def _fill_number(self, found: np.ndarray, cell: str, value: Any) -> None:
        number = float(value) if isinstance(value, bool | np.bool_) else self._number(cell)
        found[0] = number
        if self._gaps:
            found[1] = not cell

    def _number(self, cell: str) -> float:
        number = cell_number(cell) if cell else float(self._means[0])
        if number is None:
            raise ValueError(f"{cell!r} in column {self._column} is not a finite number")
        return number

    def _fill_date(self, found: np.ndarray, cell: str, _value: Any) -> None:
        count = len(self._means)
        moment = read_date(cell, self._values["format"]) if cell else None
        if cell and moment is None:
            raise ValueError(
                f"{cell!r} in column {self._column} is not a date in the form {self._values['format']}"
            )
        assert self._first is not None
        found[:count] = parts_of(moment, self._first, clock=count > len(PARTS)) if moment else self._means
        if self._gaps:
            found[count] = not cell


class TextPreparation:
    """A text as token ids, by a `tokenizers` tokenizer that truncates and pads to a fixed length."""

    kind = "text"
    libraries = ("tokenizers",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._json: str = values["tokenizer"]
        self._column: str = values["column"]
        self._dtype: str = values["dtype"]

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of texts."""
        return (self._column,)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self._json)
        tokenizer.encode_special_tokens = True  # "[PAD]" in a text is text
        return tokenizer

    def row(self, cells: Mapping[str, Any]) -> np.ndarray:
        """uint16 or int32 (L,), padded with 0.

        Raises:
            ValueError: For a value that is not a text, and for an empty text.
        """
        text = cells[self._column]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"expected a text in column {self._column}, got {text!r}")
        ids = np.array(self._tokenizer.encode(text).ids, self._dtype)
        if not ids.any():
            raise ValueError(f"no token in the text {text!r} of column {self._column}")
        return ids

    def example(self) -> dict[str, Any]:
        """An English sentence."""
        return {self._column: "Thank you, that is kind."}


class SmilesPreparation:
    """A molecule, written as SMILES, as a vector of features.

    "ngrams" counts the strings of 1 to `longest` neighbouring characters, with markers at both ends, at the index
    that CRC-32 assigns to each string, and stores the square root of the count. "morgan" is the Morgan fingerprint
    of rdkit.
    """

    kind = "smiles"

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._column: str = values["column"]
        self._bits: int = values["bits"]
        self._make = {"ngrams": self._ngrams, "morgan": self._morgan}[values["features"]]

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of SMILES."""
        return (self._column,)

    @property
    def libraries(self) -> tuple[str, ...]:
        """The library of fingerprints, if they are used."""
        return ("rdkit",) if self._values["features"] == "morgan" else ()

    def row(self, cells: Mapping[str, Any]) -> np.ndarray:
        """float16 (bits,) of n-grams, uint8 (bits,) of a fingerprint.

        Raises:
            ValueError: For a value that is not a text, and for a molecule that rdkit cannot read.
        """
        smiles = cells[self._column]
        if not isinstance(smiles, str) or not smiles.strip():
            raise ValueError(f"expected a SMILES string in column {self._column}, got {smiles!r}")
        return self._make(smiles.strip())

    def _ngrams(self, smiles: str) -> np.ndarray:
        # neither character occurs in SMILES
        text = f"^{smiles}|".encode()
        counts = np.zeros(self._bits, np.float32)
        for length in range(1, self._values["longest"] + 1):
            for start in range(len(text) - length + 1):
                counts[zlib.crc32(text[start : start + length]) % self._bits] += 1
        return np.sqrt(counts).astype(np.float16)

    @cached_property
    def _generator(self) -> Any:
        from rdkit.Chem import rdFingerprintGenerator

        return rdFingerprintGenerator.GetMorganGenerator(radius=self._values["radius"], fpSize=self._bits)

    def _morgan(self, smiles: str) -> np.ndarray:
        from rdkit import Chem, rdBase

        with rdBase.BlockLogs():  # rdkit would write the error to stderr as well
            molecule = Chem.MolFromSmiles(smiles)
        if molecule is None:
            raise ValueError(f"{smiles!r} in column {self._column} is not a molecule that rdkit can read")
        return np.asarray(self._generator.GetFingerprintAsNumPy(molecule), np.uint8)

    def example(self) -> dict[str, Any]:
        """Ethanol."""
        return {self._column: "CCO"}


PREPARATIONS: Mapping[str, Callable[[Mapping[str, Any]], Preparation]] = {
    "table": TablePreparation,
    "text": TextPreparation,
    "smiles": SmilesPreparation,
}
