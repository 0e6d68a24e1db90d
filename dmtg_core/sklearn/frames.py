"""The columns of a DataFrame or an array, as cells of a table."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dmtg_core.tables.categories import ColumnError
from dmtg_core.tables.cells import MISSING, cell_text
from dmtg_core.tables.features import TableInput, TableRules, table_input
from dmtg_core.tables.preparation import TablePreparation

log = logging.getLogger(__name__)

_EMPTY = frozenset(MISSING)
_CONTAINERS = (Mapping, list, tuple, set, np.ndarray)


def is_frame(values: Any) -> bool:
    """Whether values are a DataFrame of pandas. pandas is not imported for the answer."""
    return hasattr(values, "iloc") and hasattr(values, "columns")


def column_names(values: Any) -> list[str]:
    """The names of the columns of a DataFrame, `x0`, `x1`, … of an array."""
    return list(map(str, values.columns)) if is_frame(values) else [f"x{i}" for i in range(values.shape[1])]


def columns_of(values: Any) -> list[list[Any]]:
    """The values of each column. A duration is its seconds.

    Raises:
        TypeError: For a cell that is a container.
    """
    if is_frame(values):
        columns = [values.iloc[:, place] for place in range(values.shape[1])]
        columns = [one.dt.total_seconds() if one.dtype.kind == "m" else one for one in columns]
    else:
        columns = list(np.asarray(values).T)
    found = [column.tolist() for column in columns]
    for column, cells in zip(columns, found, strict=True):
        odd = (
            next((cell for cell in cells if isinstance(cell, _CONTAINERS)), None) if column.dtype == "O" else None
        )
        if odd is not None:
            raise TypeError(f"a cell of X: argument must be a string or a number, got {type(odd).__name__}")
    return found


def category_columns(values: Any) -> list[str]:
    """The columns of a DataFrame that are categories by their dtype."""
    if not is_frame(values):
        return []
    return [
        str(name) for name, dtype in zip(values.columns, values.dtypes, strict=True) if str(dtype) == "category"
    ]


def describe(
    values: Any,
    names: Sequence[str],
    rows: np.ndarray,
    scaling: str = "quantile",
    max_values: int | None = None,
    molecules: Sequence[str] = (),
) -> TableInput:
    """The features of a table, with figures of its training rows.

    Args:
        values: `(n, F)`, a DataFrame or an array.
        names: Names of the columns.
        rows: The training rows.
        scaling, max_values, molecules: See `dmtg_core.tables.features.TableRules`.

    Raises:
        ValueError: For a column that cannot be a feature, with its remedy, and for an unknown name in `molecules`.
    """
    unknown = [name for name in molecules if name not in names]
    if unknown:
        raise ValueError(f"X has no column {unknown[0]!r}, which molecules names")
    texts = [[_filled(cell_text(cell)) for cell in column] for column in columns_of(values)]
    cells = [{name: column[row] for name, column in zip(names, texts, strict=True)} for row in rows]
    rules = TableRules(
        categories=category_columns(values), molecules=molecules, scaling=scaling, max_values=max_values
    )
    try:
        found = table_input(cells, names, rules)
    except ColumnError as error:
        raise ValueError(f"X: {error}") from error
    for sentence in found.hashed:
        log.info("X: %s; for a feature for each value, set max_values", sentence)
    return found


def stored_rows(preparation: Mapping[str, Any], values: Any, names: Sequence[str]) -> np.ndarray:
    """The rows of a table as float32 `(n, F)`.

    Raises:
        ValueError: For a cell that cannot be used, with its row from 0.
    """
    how = TablePreparation(preparation)
    rows = zip(*columns_of(values), strict=True)
    return np.stack([_row(how, number, zip(names, row, strict=True)) for number, row in enumerate(rows)])


def _row(how: TablePreparation, number: int, cells: Iterable[tuple[str, Any]]) -> np.ndarray:
    try:
        return how.row(dict(cells))
    except ValueError as error:
        raise ValueError(f"row {number} of X: {error}") from error


def _filled(text: str) -> str:
    return "" if text in _EMPTY else text
