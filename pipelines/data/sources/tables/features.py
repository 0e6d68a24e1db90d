"""Cells of columns in Arrow's memory, and what Hugging Face's `datasets` records of the columns of a table.

A class label of `datasets` is a number in the table. Its cell is the name of the class, and empty for -1, which
`datasets` writes for a missing label. A list of class labels becomes one column `<column>.<class>` for each class,
with 1 or 0. Columns of images have no cells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from dmtg_core.tables.cells import cell_text

METADATA = b"huggingface"  # key of the metadata of a schema


@dataclass(frozen=True)
class Classes:
    """Names of the classes of columns: of one label, and of lists of labels."""

    single: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    listed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def columns(self, name: str) -> list[str]:
        """The columns of cells that a column of the table becomes."""
        return [f"{name}.{one}" for one in self.listed[name]] if name in self.listed else [name]


def classes_of(schema: pa.Schema) -> Classes:
    """The classes that a schema records; none if `datasets` did not write it."""
    held = (schema.metadata or {}).get(METADATA)
    try:
        features = json.loads(held)["info"]["features"] if held else {}
    except (ValueError, KeyError, TypeError):
        return Classes()
    single = {name: names for name, feature in features.items() if (names := _names(feature))}
    inner = {name: _inner(feature) for name, feature in features.items()}
    return Classes(single, {name: names for name, feature in inner.items() if (names := _names(feature))})


def _names(feature: Any) -> tuple[str, ...]:
    known = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    return tuple(map(str, feature.get("names") or ())) if known else ()


def _inner(feature: Any) -> Any:
    """The feature of the elements of a list; earlier versions of `datasets` write a list of one feature."""
    if isinstance(feature, list):
        return feature[0] if feature else None
    return feature.get("feature") if isinstance(feature, dict) else None


def is_image(kind: pa.DataType) -> bool:
    """Whether a column can hold images: bytes, or a struct with bytes."""
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and is_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return is_bytes(kind)


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds byte strings of any length."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def cell_names(schema: pa.Schema) -> list[str]:
    """The columns of cells of a table, in its order."""
    classes = classes_of(schema)
    return [one for held in schema if not is_image(held.type) for one in classes.columns(held.name)]


def stored_columns(schema: pa.Schema, wanted: Sequence[str]) -> list[str]:
    """The columns of a table from which the wanted columns of cells are made."""
    classes = classes_of(schema)
    chosen = set(wanted)
    return [name for name in schema.names if not chosen.isdisjoint(classes.columns(name))]


def batch_cells(batch: pa.RecordBatch) -> dict[str, list[str]]:
    """The cells of a batch, by column."""
    classes, cells = classes_of(batch.schema), {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if is_image(column.type):
            continue
        values = column.to_pylist()
        if name in classes.listed:
            for place, label in enumerate(classes.listed[name]):
                cells[f"{name}.{label}"] = ["" if v is None else str(int(place in v)) for v in values]
        elif name in classes.single:
            cells[name] = [_class_cell(value, classes.single[name]) for value in values]
        else:
            cells[name] = [cell_text(value) for value in values]
    return cells


def _class_cell(value: int | None, names: Sequence[str]) -> str:
    if value is None or value < 0:
        return ""
    return names[value].strip() if value < len(names) else str(value)
