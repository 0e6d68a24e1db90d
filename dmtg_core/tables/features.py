"""The features of a table, from the cells of its training rows: numbers, dates, categories and molecules.

The readers of files and `dmtg_core.sklearn` describe a table with this code, and both convert its rows by the
`TablePreparation` of the result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np

from dmtg_core.input_spec import InputSpec
from dmtg_core.tables.categories import HASHED, ColumnError, category_feature
from dmtg_core.tables.cells import MISSING
from dmtg_core.tables.figures import MOST_VALUES, Figures, Rows, column_figures, date_figures, sampled_rows
from dmtg_core.tables.molecules import descriptor_names, descriptors, smiles_of
from dmtg_core.tables.preparation import TablePreparation
from dmtg_core.tables.scaling import FINEST, Scales, feature_quantiles, filled_with, robust_scales, table_codes
from dmtg_core.tables.stored import stored_column

LEAST_KNOWN = 0.9  # share of the training molecules that have a descriptor, below which it is left out


@dataclass(frozen=True)
class TableInput:
    """The input of a network for a table.

    Args:
        spec: Shape and normalisation of the stored rows.
        preparation: Values of the `TablePreparation`.
        constants: Columns that are left out, because they are constant in training.
        outliers: Sentences about numbers that are far larger than others.
        ambiguous: Column → the formats in which its dates can be read, if they are several. It is no date.
        hashed: Sentences about columns whose values are hashed.
    """

    spec: InputSpec
    preparation: dict[str, Any]
    constants: list[str]
    outliers: list[str]
    ambiguous: dict[str, tuple[str, ...]]
    hashed: list[str]


@dataclass(frozen=True)
class TableRules:
    """What decides about the features of a table.

    Args:
        categorical: The columns that are categories; other columns are dates or numbers. Without it, a column that
            is no date is a category if less than half of its filled cells are numbers, or if they are digits with
            leading zeros.
        categories: Columns that are categories whatever their cells are.
        molecules: Columns of molecules, written as SMILES.
        missing: Markers of an empty cell.
        marks: Decimal mark and separators of thousands, if they are not the usual ones; see `cells.marks_of`.
        max_values: Largest number of values of a category. Without it, a category of more than
            `categories.MOST_CATEGORIES` values is hashed.
        scaling: One of `scaling.SCALINGS`.
    """

    categorical: Collection[str] | None = None
    categories: Collection[str] = ()
    molecules: Collection[str] = ()
    missing: tuple[str, ...] = MISSING
    marks: Mapping[str, str] = field(default_factory=dict)
    max_values: int | None = None
    scaling: str = "quantile"


def table_input(rows: Rows, columns: Sequence[str], rules: TableRules) -> TableInput:
    """Describe the features of a table.

    Args:
        rows: The training rows, with numbers as Python writes them and "" for missing cells.
        columns: The columns of the features in their order.
        rules: What decides about them.

    Raises:
        ColumnError: For a column that cannot be a feature, and if all columns are constant.
    """
    return _Description(rows, rules).describe(columns)


class _Description:
    def __init__(self, rows: Rows, rules: TableRules) -> None:
        self._rows, self._rules = rows, rules
        self._ambiguous: dict[str, tuple[str, ...]] = {}
        self._hashed: list[str] = []

    def describe(self, columns: Sequence[str]) -> TableInput:
        features, scales, counts = [], list[Scales](), list[Figures]()
        constants, outliers = [], []
        most = max(MOST_VALUES, self._rules.max_values or 0)
        for column, figures in column_figures(self._rows, columns, most).items():
            if figures.outliers:
                outliers.append(f"column {column} has outliers: {figures.outliers}")
            if len(figures.values) > 1:
                feature, values = self._feature(column, figures)
                features.append(feature)
                scales.append(values)
                counts.append(figures)
            else:
                constants.append(column)
        if not features:
            raise ColumnError("no feature is left", "choose other features")
        quantiles: tuple[tuple[float, ...], ...] = ()
        if self._rules.scaling == "quantile":
            pairs = zip(features, self._stored(features), strict=True)
            quantiles = tuple(edges for one, values in pairs for edges in feature_quantiles(one, values))
        elif self._rules.scaling == "robust":
            every = zip(features, self._stored(features), scales, strict=True)
            scales = [robust_scales(*one) for one in every]
            features = [filled_with(*one) for one in zip(features, scales, strict=True)]
        mean, std = zip(*(pair for values in scales for pair in values), strict=True)
        preparation = {
            "kind": TablePreparation.kind,
            "features": features,
            "missing": list(self._rules.missing),
            **self._rules.marks,
        }
        codes = _codes(features, counts, quantiles)
        spec = InputSpec("features", (len(mean),), "float32", mean, std, quantiles=quantiles, codes=codes)
        return TableInput(spec, preparation, constants, outliers, self._ambiguous, self._hashed)

    def _stored(self, features: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        """The stored values of a sample of the training rows, `(n, S)` for each feature."""
        # without marks: the cells of the rows are written as in Python
        how = TablePreparation({"features": features, "missing": self._rules.missing})
        stored = []
        for row in sampled_rows(self._rows):
            with suppress(ValueError):  # a sample that cannot be used
                stored.append(how.row(row))
        sizes = [stored_column(feature).size for feature in features]
        return np.split(np.array(stored), np.cumsum(sizes)[:-1], axis=1)

    def _feature(self, column: str, figures: Figures) -> tuple[dict[str, Any], Scales]:
        """One feature of the preparation, with mean and standard deviation of each of its stored values."""
        if column in self._rules.molecules:
            return self._molecule(column)
        listed = self._rules.categorical
        if column in self._rules.categories or (listed is not None and column in listed):
            return self._category(column, figures)
        if len(figures.date_formats) == 1:
            return self._dates(column, figures)
        if figures.date_formats:
            self._ambiguous[column] = figures.date_formats
        if listed is None and (2 * figures.numbers < figures.filled or figures.zeros):
            return self._category(column, figures)
        return _number(column, figures)

    def _category(self, column: str, figures: Figures) -> tuple[dict[str, Any], Scales]:
        feature = category_feature(column, figures, self._rules.max_values)
        if feature["type"] == "hashed":
            count = f"{len(figures.values)}{' or more' * figures.incomplete}"
            self._hashed.append(f"column {column} has {count} values and is hashed to {HASHED} features")
        return feature, [(0.0, 1.0)] * stored_column(feature).size

    def _molecule(self, column: str) -> tuple[dict[str, Any], Scales]:
        """The descriptors that vary and that most training molecules have, from a sample of these molecules."""
        names, found = descriptor_names(), list[np.ndarray]()
        for row in sampled_rows(self._rows):
            with suppress(ValueError):  # a molecule that cannot be read
                found.append(descriptors(smiles_of(row[column], column), column))
        if not found:
            raise ColumnError(f"no molecule in the train rows of column {column}", "name another column")
        values = np.array(found, np.float64)  # (n, P)
        known = ~np.isnan(values)
        kept = np.flatnonzero(known.mean(0) >= LEAST_KNOWN)
        kept = kept[[len(np.unique(values[known[:, place], place])) > 1 for place in kept]]
        if not len(kept):
            raise ColumnError(f"the molecules in the train rows of column {column} are alike", "name another one")
        means, deviations = np.nanmean(values[:, kept], 0).tolist(), np.nanstd(values[:, kept], 0).tolist()
        gaps = not known[:, kept].all()
        feature = {"column": column, "type": "molecule", "parts": [names[place] for place in kept], "means": means}
        feature |= {"gaps": gaps, "library": f"rdkit {version('rdkit')}"}
        return feature, [*zip(means, deviations, strict=True), *[(0.0, 1.0)] * gaps]

    def _dates(self, column: str, figures: Figures) -> tuple[dict[str, Any], Scales]:
        (form,), gaps = figures.date_formats, figures.filled < figures.cells
        first, parts = date_figures(self._rows, column, form)
        means = [one.mean for one in parts.values()]
        feature = {"column": column, "type": "date", "format": form, "first": first, "parts": list(parts)}
        scales = [(one.mean, one.deviation or 1.0) for one in parts.values()]
        return {**feature, "means": means, "gaps": gaps}, scales + [(0.0, 1.0)] * gaps


def _codes(
    features: Sequence[Mapping[str, Any]], figures: Sequence[Figures], quantiles: Sequence[tuple[float, ...]]
) -> tuple[tuple[float, ...], ...]:
    """The codes of each stored value with quantiles; empty if none has codes."""
    if not quantiles:
        return ()
    found = table_codes(features, [one.values for one in figures], figures[0].cells)
    codes = tuple(values if edges else () for values, edges in zip(found, quantiles, strict=True))
    return codes if any(codes) else ()


def _number(column: str, figures: Figures) -> tuple[dict[str, Any], Scales]:
    if not figures.numbers:
        raise ColumnError(f"no number in the train rows of column {column}", "remove it", "categorical")
    mean, deviation = figures.mean, figures.deviation
    if 0 < deviation < FINEST * abs(mean):
        raise ColumnError(
            f"column {column} differs by {deviation:g} around {mean:g}: the values are equal in float32",
            "subtract an offset",
            "features",
        )
    gaps = figures.filled < figures.cells
    feature = {"column": column, "type": "number", "mean": mean, "gaps": gaps}
    return feature, [(mean, deviation or 1.0)] + [(0.0, 1.0)] * gaps
