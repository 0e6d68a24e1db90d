"""Preprocessing: rows of a table, texts and molecules to the stored input of a network.

The manifest of the shards describes a preprocessing as a small JSON object with its `kind` and with values from
the training split. The readers and a served model run the same code, so a model receives the input it was trained
on. The module needs numpy and dmtg_core. Some kinds need one more library, which is imported where it is used.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from dmtg_core.names import listed
from dmtg_core.tables.molecules import read_molecule, smiles_of
from dmtg_core.tables.preparation import TablePreparation, UnseenValues

logger = logging.getLogger(__name__)

MARKS = ("decimal", "thousands")  # of a preparation, for numbers that are given as texts


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
    if isinstance(how, TablePreparation):
        _warn_of_unseen(how, rows, stored)
    return stored


def _warn_of_unseen(how: TablePreparation, rows: Sequence[Mapping[str, Any]], stored: np.ndarray) -> None:
    unseen = UnseenValues()
    for cells, row in zip(rows, stored, strict=True):
        unseen.add(how, cells, row)
    if remarks := unseen.remarks():
        logger.warning("%s", "; ".join(remarks))


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
    return listed(map(str, columns), 20)


def _single(value: Any) -> Any:
    """The value, unwrapped if it is in a row of length one."""
    return value[0] if isinstance(value, list | tuple | np.ndarray) and len(value) == 1 else value


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
        """uint16 or int32 (L,), with the tokenizer's padding.

        Raises:
            ValueError: For a value that is not a text, and for an empty text.
        """
        text = cells[self._column]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"expected a text in column {self._column}, got {text!r}")
        found = self._tokenizer.encode(text)
        ids = np.array(found.ids, self._dtype)
        if not any(found.attention_mask):
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
        return self._make(smiles_of(cells[self._column], self._column))

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
        molecule = read_molecule(smiles, self._column)
        return np.asarray(self._generator.GetFingerprintAsNumPy(molecule), np.uint8)

    def example(self) -> dict[str, Any]:
        """Ethanol."""
        return {self._column: "CCO"}


PREPARATIONS: Mapping[str, Callable[[Mapping[str, Any]], Preparation]] = {
    "table": TablePreparation,
    "text": TextPreparation,
    "smiles": SmilesPreparation,
}
