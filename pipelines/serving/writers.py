"""Files of predictions for new samples: CSV, Parquet or JSON lines, written a block at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import UserError

FORMATS = {"csv": (".csv",), "parquet": (".parquet", ".pq"), "jsonl": (".jsonl", ".ndjson")}
STREAM = "-"  # stdin or stdout


class Writer(Protocol):
    """Writes tables with the same columns to one file."""

    def write(self, table: pa.Table) -> None:
        """Write the rows of a table."""
        ...


def format_of(out: str, given: str) -> str:
    """The format of a file by its name; CSV for stdout.

    Args:
        out: The file, or "-" for stdout.
        given: The format that the user names; empty for none.

    Raises:
        UserError: When neither is known.
    """
    found = [name for name, ends in FORMATS.items() if out.lower().endswith(ends)]
    if not given and not found and out != STREAM:
        raise UserError(
            "the name of the file says no format",
            where=out,
            remedy="let it end with .csv, .parquet or .jsonl, or give --format",
            wrong_use=True,
        )
    return given or next(iter(found), "csv")


@contextmanager
def opened(file: Path, kind: str, schema: pa.Schema) -> Iterator[Writer]:
    """A writer of a new local file.

    Args:
        file: The file.
        kind: A key of `FORMATS`.
        schema: The columns.
    """
    if kind == "parquet":
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            yield _Parquet(writer)
        return
    with file.open("w", encoding="utf-8", newline="") as text:
        yield _Csv(text, schema) if kind == "csv" else _JsonLines(text)


class _Parquet:
    def __init__(self, writer: pq.ParquetWriter) -> None:
        self.writer = writer

    def write(self, table: pa.Table) -> None:
        self.writer.write_table(table)


class _Csv:
    def __init__(self, text: Any, schema: pa.Schema) -> None:
        self.writer = csv.writer(text, lineterminator="\n")
        self.writer.writerow(schema.names)

    def write(self, table: pa.Table) -> None:
        # Arrow writes the shortest decimals that give the same float32
        columns = (pc.cast(column, pa.string()).to_pylist() for column in table.columns)
        self.writer.writerows(zip(*columns, strict=True))


class _JsonLines:
    def __init__(self, text: Any) -> None:
        self.text = text

    def write(self, table: pa.Table) -> None:
        columns = [json_values(column) for column in table.columns]
        for cells in zip(*columns, strict=True):
            row = dict(zip(table.column_names, cells, strict=True))
            self.text.write(json.dumps(row, ensure_ascii=False) + "\n")


def json_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values of a column for JSON; a float32 has the shortest decimals that give it."""
    if pa.types.is_floating(column.type):
        return [float(text) for text in pc.cast(column, pa.string()).to_pylist()]
    found: list[Any] = column.to_pylist()
    return found
