"""The stored values of one column of a table, by values of the training rows that a JSON object holds."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from dmtg_core.tables.cells import cell_number, normal_form, unique_forms
from dmtg_core.tables.dates import ISO, PARTS, parts_of, read_date
from dmtg_core.tables.molecules import descriptor_names, descriptors, smiles_of

_UNSEEN = "\0"  # no cell


class StoredColumn(Protocol):
    """Conversion of the cells of a column.

    `size` is the number of stored values of a cell. `example` is a raw cell that can be used.
    """

    size: int
    example: Any

    def fill(self, found: np.ndarray, cell: str, value: Any, /) -> None:
        """Write the stored values of a cell to zeros.

        Args:
            found: float32 `(size,)`, zeros.
            cell: Text of the cell, "" for a missing one.
            value: The raw cell.

        Raises:
            ValueError: For text in a column of numbers or of dates, and for a cell that is no molecule in a column
                of molecules.
        """
        ...


class NumberColumn:
    """A number, and 1 for a missing number if training has missing ones."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._column, self._gaps = values["column"], bool(values["gaps"])
        self.example: float = values["mean"]
        self.size = 1 + self._gaps

    def fill(self, found: np.ndarray, cell: str, value: Any) -> None:
        """See `StoredColumn.fill`."""
        found[0] = float(value) if isinstance(value, bool | np.bool_) else self._number(cell)
        if self._gaps:
            found[1] = not cell

    def _number(self, cell: str) -> float:
        number = cell_number(cell) if cell else float(self.example)
        if number is None:
            raise ValueError(f"{cell!r} in column {self._column} is not a finite number")
        return number


class DateColumn:
    """The parts of a date, and 1 for a missing date if training has missing ones."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._column, self._format, self._gaps = values["column"], values["format"], bool(values["gaps"])
        self._means: Sequence[float] = values["means"]
        self.example: str = values["first"]
        self._first = read_date(self.example, ISO)
        self.size = len(self._means) + self._gaps

    def fill(self, found: np.ndarray, cell: str, _value: Any) -> None:
        """See `StoredColumn.fill`."""
        count = len(self._means)
        moment = read_date(cell, self._format) if cell else None
        if cell and moment is None:
            raise ValueError(f"{cell!r} in column {self._column} is not a date in the form {self._format}")
        assert self._first is not None
        found[:count] = parts_of(moment, self._first, clock=count > len(PARTS)) if moment else self._means
        if self._gaps:
            found[count] = not cell


class MoleculeColumn:
    """The descriptors of a molecule, and 1 if one of them is missing, if training has such molecules."""

    example = "CCO"  # ethanol

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._column, self._gaps = values["column"], bool(values["gaps"])
        self._names: Sequence[str] = values["parts"]
        self._means = np.array(values["means"], np.float32)
        self._library = values["library"]
        self.size = len(self._means) + self._gaps

    def fill(self, found: np.ndarray, _cell: str, value: Any) -> None:
        """See `StoredColumn.fill`. A missing descriptor has the mean of training."""
        numbers = descriptors(smiles_of(value, self._column), self._column)[self._places]
        missing = np.isnan(numbers)
        found[: len(numbers)] = np.where(missing, self._means, numbers)
        if self._gaps:
            found[-1] = missing.any()

    @cached_property
    def _places(self) -> list[int]:
        every = descriptor_names()
        unknown = [name for name in self._names if name not in every]
        if unknown:
            raise ImportError(f"rdkit has no descriptor {unknown[0]}: install {self._library}")
        return [every.index(name) for name in self._names]


class CategoryColumn:
    """A feature for each value, and one for rare values and for values that training does not have."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        listed: Sequence[str] = values["values"]
        self.size, self.example = len(listed) + 1, listed[0]
        self._places = {value: place for place, value in enumerate(listed)}
        self._places |= dict.fromkeys(values.get("rare", ()), len(listed))
        self._form = values.get("form", "text")
        self._texts = unique_forms(self._places) if self._form == "digits" else {}

    def fill(self, found: np.ndarray, cell: str, value: Any) -> None:
        """See `StoredColumn.fill`."""
        found[self._places.get(self._value(cell, value), -1)] = 1

    def known(self, cell: str, value: Any) -> bool:
        """Whether training has the value of a cell."""
        return self._value(cell, value) in self._places

    def _value(self, cell: str, value: Any) -> str:
        if self._form == "value":
            return normal_form(cell)
        if self._form == "digits" and cell and not (isinstance(value, str) and cell in self._places):
            return self._texts.get(normal_form(cell), _UNSEEN)
        return cell


class HashedColumn:
    """A category of many values: 1 in one of its features, and 1 for a missing cell if training has missing ones.

    The place of a value is the CRC-32 of its normal form in UTF-8, modulo the number of features. Values can share
    a place. No value is -1, as by scikit-learn's `FeatureHasher(alternate_sign=False)`, which has another hash.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._places, self._gaps = int(values["size"]), bool(values["gaps"])
        self.example: str = values["example"]
        self.size = self._places + self._gaps

    def fill(self, found: np.ndarray, cell: str, _value: Any) -> None:
        """See `StoredColumn.fill`. A missing cell without a feature for it is 0 everywhere."""
        if cell:
            found[hash_place(cell, self._places)] = 1
        elif self._gaps:
            found[-1] = 1


def hash_place(cell: str, places: int) -> int:
    """The place of the text of a cell; see `HashedColumn`."""
    return zlib.crc32(normal_form(cell).encode("utf-8", "surrogatepass")) % places


_COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], StoredColumn]] = {
    "number": NumberColumn,
    "date": DateColumn,
    "molecule": MoleculeColumn,
    "category": CategoryColumn,
    "hashed": HashedColumn,
}


def stored_column(values: Mapping[str, Any]) -> StoredColumn:
    """The conversion that a feature of a preparation describes."""
    return _COLUMNS[values["type"]](values)
