"""Features and targets of a data set as columns of numbers or classes: their distribution and association.

All figures are of a random sample of the training split, which bounds time and memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dmtg_core.tasks import Task
from dmtg_core.training.data import Arrays
from pipelines.data.reader import Reader
from pipelines.data.statistics import class_name
from pipelines.data.stream import all_units
from pipelines.report.association import of_classes, of_number_and_class, of_numbers
from pipelines.report.formatting import figure, in_unit

SEED = 22
MOST_ROWS = 20_000  # rows of the sample
MOST_BYTES = 64 * 2**20  # bytes of the sample
MOST_FEATURES = 60  # features on the page, those with the strongest association
MOST_TARGETS = 8  # targets with a column of their own; of more, each feature names the strongest ones
STRONGEST = 3
BINS = 12
TOP = 5  # categories of a feature on the page
OUTER = 1.0  # percentile at each end of a histogram; the outer bars hold what is beyond


@dataclass(frozen=True)
class Values:
    """A column of a sample: `numbers` (n,) with NaN for missing, or `classes` (n,) with -1 for missing.

    `names` has the name of each class; it is empty for numbers.
    """

    name: str
    array: np.ndarray
    names: tuple[str, ...] = ()
    unit: str = ""

    @property
    def missing(self) -> float:
        """Share of missing values."""
        gaps = self.array < 0 if self.names else np.isnan(self.array)
        return float(gaps.mean()) if len(gaps) else 0.0


@dataclass(frozen=True)
class Features:
    """The features of a data set on the page.

    Args:
        rows, of: Rows of the sample, and of the training split.
        targets: Names of the targets with a column of their own; empty if each feature names the strongest ones.
        table: A row for each feature: `name`, `missing`, `bars`, `words`, and `measures` or `strongest`.
        left_out: Features that are not on the page.
        histograms: Target of numbers → its bars and words.
    """

    rows: int
    of: int
    targets: tuple[str, ...]
    table: list[dict[str, Any]]
    left_out: int
    histograms: Mapping[str, Mapping[str, Any]]


def features_of(reader: Reader, without: Collection[str] = ()) -> Features | None:
    """Features of tables and lengths of texts, with their association with each target that is not dense.

    Args:
        reader: Reader of the shards.
        without: Unreadable shards.

    Returns:
        None for images, and if no row is readable.
    """
    spec, preparation = reader.manifest.description.input, reader.manifest.description.preparation
    tasks = tuple(task for task in reader.tasks if not task.dense and (task.classes or task.channels == 1))
    drawn = sample(replace(reader, tasks=tasks), without) if spec.kind in ("features", "tokens") else None
    if drawn is None:
        return None
    targets = [target_values(task, drawn) for task in tasks]
    texts = spec.kind == "tokens"
    inputs = text_length(drawn.inputs, spec.padding) if texts else table_values(drawn.inputs, preparation)
    rows = [feature_row(one, targets) for one in inputs]
    shown = most_associated(rows)
    return Features(
        rows=len(drawn.inputs),
        of=reader.manifest.rows("train"),
        targets=tuple(one.name for one in targets) if len(targets) <= MOST_TARGETS else (),
        table=shown,
        left_out=len(rows) - len(shown),
        histograms={one.name: distribution(one) for one in targets if not one.names},
    )


def sample(reader: Reader, without: Collection[str] = ()) -> Arrays | None:
    """Random row groups of the training split, up to `MOST_ROWS` and `MOST_BYTES`; None if there are none."""
    units = [unit for unit in all_units(reader, "train") if unit.file not in without]
    most = max(min(MOST_ROWS, MOST_BYTES // max(reader.row_bytes(), 1)), 1)
    parts: list[Arrays] = []
    for place in np.random.default_rng(SEED).permutation(len(units)):
        left = most - sum(len(part.inputs) for part in parts)
        if left <= 0:
            break
        parts.append(_first_rows(reader.read(units[place].file, units[place].group), left))
    if not parts:
        return None
    every = {name: [_present(part, name) for part in parts] for name in parts[0].labels}
    return Arrays(
        np.concatenate([part.inputs for part in parts]),
        {name: np.concatenate([part.labels[name] for part in parts]) for name in parts[0].labels},
        {name: np.concatenate(masks) for name, masks in every.items()},
    )


def _first_rows(part: Arrays, most: int) -> Arrays:
    """At most `most` rows; row groups are shuffled."""
    return Arrays(
        part.inputs[:most],
        {name: values[:most] for name, values in part.labels.items()},
        {name: mask[:most] for name, mask in part.present.items()},
    )


def _present(part: Arrays, name: str) -> np.ndarray:
    return part.present.get(name, np.ones(len(part.inputs), bool))


def target_values(task: Task, drawn: Arrays) -> Values:
    """The labels of a target that is not dense."""
    labels, present = drawn.labels[task.name].reshape(len(drawn.inputs)), _present(drawn, task.name)
    if task.classes or task.kind == "binary":
        classes = np.where(present & (labels != task.ignore_index), labels, -1).astype(np.int64)
        count = task.channels if task.classes else 2
        return Values(task.name, classes, tuple(class_name(task, i) for i in range(count)))
    return Values(
        task.name,
        np.where(present, in_unit(1.0, task.unit)[0] * labels.astype(np.float64), np.nan),
        unit=in_unit(1.0, task.unit)[1],
    )


def text_length(ids: np.ndarray, padding: int) -> list[Values]:
    """Lengths of texts `(n, L)` in tokens without padding."""
    return [Values("length of the text", (ids != padding).sum(1).astype(np.float64), unit="tokens")]


def table_values(inputs: np.ndarray, preparation: Mapping[str, Any]) -> list[Values]:
    """The features of stored rows `(n, F)`, as `TablePreparation` stores them.

    Stored values without such a preparation are numbers with their place as name. Hashed features are left out.
    """
    if preparation and preparation.get("kind") != "table":
        return []
    described = preparation.get("features", [{"column": f"feature {i}", "type": "number", "gaps": False}
                                             for i in range(inputs.shape[1])])  # fmt: skip
    edges = [0, *itertools.accumulate(map(_size, described))]
    return [
        column
        for one, (start, stop) in zip(described, itertools.pairwise(edges), strict=True)
        for column in _columns(one, inputs[:, start:stop])
    ]


def _size(described: Mapping[str, Any]) -> int:
    """Number of stored values of a feature."""
    if described["type"] == "category":
        return len(described["values"]) + 1
    places = described["size"] if described["type"] == "hashed" else len(described.get("means", [0]))
    return int(places) + int(described["gaps"])


def _columns(described: Mapping[str, Any], stored: np.ndarray) -> list[Values]:
    """The columns of a feature: one, or the descriptors of a molecule."""
    if described["type"] == "molecule":
        return [Values(name, stored[:, place].astype(np.float64)) for place, name in enumerate(described["parts"])]
    return [_feature(described, stored)]


def _feature(described: Mapping[str, Any], stored: np.ndarray) -> Values:
    if described["type"] == "hashed":  # a place can hold several values
        places = stored[:, : described["size"]]
        found = np.where(places.any(1), places.argmax(1), -1)
        return Values(described["column"], found, tuple(f"hash {place}" for place in range(described["size"])))
    if described["type"] != "category":
        numbers, unit = stored[:, 0].astype(np.float64), ""
        if described["type"] == "date":  # the first part is a count of days
            unit = f"days since {described['first']}"
        gaps = stored[:, -1] > 0 if described["gaps"] else np.zeros(len(stored), bool)
        return Values(described["column"], np.where(gaps, np.nan, numbers), unit=unit)
    classes, names = stored.argmax(1), (*described["values"], "other values")
    gap = described["values"].index("") if "" in described["values"] else -1
    return Values(described["column"], np.where(classes == gap, -1, classes), names)


def associated(a: Values, b: Values) -> float | None:
    """The association of two columns, by the measure for their kinds."""
    if a.names and b.names:
        return of_classes(a.array, b.array)
    if not a.names and not b.names:
        return of_numbers(a.array, b.array)
    numbers, classes = (b, a) if a.names else (a, b)
    return of_number_and_class(numbers.array, classes.array)


def feature_row(one: Values, targets: Sequence[Values]) -> dict[str, Any]:
    """A row of `Features.table`."""
    measures = [associated(one, target) for target in targets]
    known = sorted(
        ((value, target.name) for value, target in zip(measures, targets, strict=True) if value is not None),
        key=lambda pair: -abs(pair[0]),
    )
    return {
        "name": one.name,
        "missing": one.missing,
        **distribution(one),
        "measures": measures,
        "strongest": known[:STRONGEST],
    }


def most_associated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in their order; of more than `MOST_FEATURES` those with the strongest association."""

    def strength(row: Mapping[str, Any]) -> float:
        return max((abs(value) for value, _ in row["strongest"]), default=0.0)

    kept = sorted(range(len(rows)), key=lambda i: -strength(rows[i]))[:MOST_FEATURES]
    return [rows[i] for i in sorted(kept)]


def distribution(one: Values) -> dict[str, Any]:
    """The distribution of a column: `bars` of a histogram as shares of the highest one, or `top` categories."""
    if one.names:
        return {"top": _top(one), "words": _others(one)}
    known = one.array[~np.isnan(one.array)]
    if not len(known):
        return {"bars": [], "words": "no value"}
    low, high = np.percentile(known, [OUTER, 100 - OUTER])
    counts, _ = np.histogram(
        np.clip(known, low, high), BINS, (low, high) if low < high else (low - 0.5, low + 0.5)
    )
    ends = (known.min(), np.median(known), known.max())
    return {
        "bars": (counts / counts.max()).tolist(),
        "words": " · ".join(figure(end) for end in ends),
        "unit": one.unit,
    }


def _counts(one: Values) -> np.ndarray:
    return np.bincount(one.array[one.array >= 0], minlength=len(one.names))


def _top(one: Values) -> list[tuple[str, float]]:
    """The most frequent categories with their shares of the known values."""
    counts = _counts(one)
    order = np.argsort(-counts, kind="stable")[:TOP]
    return [(one.names[i], float(counts[i] / counts.sum())) for i in order if counts[i]]


def _others(one: Values) -> str:
    rest = int((_counts(one) > 0).sum()) - TOP
    return f"and {rest} more" if rest > 0 else ""
