"""Rows of Parquet files, and of folders of them; folders called `name=value` are columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from dmtg_core.tables.cells import cell_text
from pipelines.data.sources.tables.encodings import absent
from pipelines.data.sources.tables.row import Row, check_header
from pipelines.errors import UserError
from pipelines.storage import Location

BATCH_ROWS = 1024  # rows of a Parquet file that are converted at a time
MOST_FILES = 64  # files of a folder from which the first rows are read
_EMPTY = "__HIVE_DEFAULT_PARTITION__"  # Hive, Spark and pandas write it for a missing value


def is_parquet(name: str) -> bool:
    """Whether a file is Parquet by its name."""
    return name.lower().endswith((".parquet", ".pq"))


def folder_rows(location: Location, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of all Parquet files of a folder, which have the columns of the first."""
    for file in _files(location):
        for row in parquet_rows(location / file, columns, file):
            yield row
            last = row
        columns = list(last.cells)  # no file is empty


def folder_head(location: Location, most: int) -> tuple[list[Row], bool]:
    """The first rows of a folder of Parquet files, and whether it has more rows.

    Files in folders `name=value` give the same number of rows each, as a column such as the split has one value in
    each file.
    """
    files = _files(location)
    read = files[:MOST_FILES] if partition(files[0]) else files[:1]
    heads = [parquet_head(location / file, max(most // len(read), 1), file) for file in read]
    return [row for rows, _ in heads for row in rows], len(read) < len(files) or any(more for _, more in heads)


def parquet_head(location: Location, most: int, name: str = "") -> tuple[list[Row], bool]:
    """The first rows of a Parquet file, and whether it has more rows."""
    with _opened(location) as file:
        found = pq.ParquetFile(file)
        batch = next(found.iter_batches(batch_size=most), None)
        if batch is None:
            raise _empty(location)
        return _batch_rows(batch, "row", 1, partition(name)), found.metadata.num_rows > most


def parquet_rows(location: Location, columns: Sequence[str], name: str = "") -> Iterator[Row]:
    """The rows of a Parquet file.

    Args:
        location: The file.
        columns: Required columns.
        name: Its path in a folder of files.
    """
    more = partition(name)
    with _opened(location) as file:
        found = pq.ParquetFile(file)
        if not found.metadata.num_rows:
            raise _empty(location)
        check_header([*found.schema_arrow.names, *more], columns, str(location))
        number = 1
        for batch in found.iter_batches(batch_size=BATCH_ROWS):
            yield from _batch_rows(batch, f"{name}, row" if name else "row", number, more)
            number += batch.num_rows


def partition(path: str) -> dict[str, str]:
    """The columns that the folders of a path name, as `split=train/part.parquet` does."""
    pairs = [folder.partition("=") for folder in path.split("/")[:-1] if "=" in folder.strip("=")]
    return {unquote(name): "" if value == _EMPTY else unquote(value).strip() for name, _, value in pairs}


def _files(folder: Location) -> list[str]:
    files = [name for name in folder.files() if is_parquet(name)]
    if not files:
        raise UserError(
            "no Parquet file in the folder",
            where=str(folder),
            remedy="correct source.root, or name the table with source.options.file",
        )
    return files


@contextmanager
def _opened(location: Location) -> Iterator[Any]:
    try:
        with location.filesystem.open_input_file(location.path) as file:
            yield file
    except FileNotFoundError as error:
        raise absent(location) from error
    except pa.ArrowInvalid as error:
        raise UserError(
            f"not a Parquet file: {error}", where=str(location), remedy="create the file again"
        ) from error


def _empty(location: Location) -> UserError:
    return UserError("the table has no rows", where=str(location), remedy="remove it, or add rows")


def _batch_rows(batch: pa.RecordBatch, unit: str, first: int, more: dict[str, str]) -> list[Row]:
    names = batch.schema.names
    texts = [[cell_text(cell) for cell in column.to_pylist()] for column in batch.columns]
    rows = enumerate(zip(*texts, strict=True), first)
    return [Row(number, dict(zip(names, cells, strict=True)) | more, unit) for number, cells in rows]
