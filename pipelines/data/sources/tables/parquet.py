"""Rows of Parquet and Arrow files, and of tables that are folders of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.sources.tables.arrow_stream import arrow_schema, is_arrow, stored_batches
from pipelines.data.sources.tables.encodings import absent
from pipelines.data.sources.tables.features import batch_cells, cell_names, is_image
from pipelines.data.sources.tables.folders import Part, is_parquet, partition, table_parts
from pipelines.data.sources.tables.row import Row, check_header
from pipelines.errors import UserError
from pipelines.storage import Location

BATCH_ROWS = 1024  # rows of a Parquet file that are converted at a time
MOST_FILES = 64  # files of a folder from which the first rows are read


def is_columnar(name: str) -> bool:
    """Whether a file is Parquet or Arrow by its name."""
    return is_parquet(name) or is_arrow(name)


def folder_rows(location: Location, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of all files of a folder, which have the columns of the first."""
    for part in table_parts(location):
        for row in file_rows(location / part.file, columns, part):
            yield row
            last = row
        columns = list(last.cells)  # no file is empty


def folder_head(location: Location, most: int) -> tuple[list[Row], bool]:
    """The first rows of a folder, and whether it has more rows.

    Files that have columns with one value, such as the split, give the same number of rows each.
    """
    parts = table_parts(location)
    read = parts[:: max(-(-len(parts) // MOST_FILES), 1)] if parts[0].more else parts[:1]
    heads = [file_head(location / part.file, max(most // len(read), 1), part) for part in read]
    return [row for rows, _ in heads for row in rows], len(read) < len(parts) or any(more for _, more in heads)


def file_head(location: Location, most: int, part: Part | None = None) -> tuple[list[Row], bool]:
    """The first rows of a file, and whether it has more rows."""
    rows = file_rows(location, (), part)
    found = list(islice(rows, most))
    return found, next(rows, None) is not None


def file_rows(location: Location, columns: Sequence[str], part: Part | None = None) -> Iterator[Row]:
    """The rows of a Parquet or Arrow file.

    Args:
        location: The file.
        columns: Required columns.
        part: What the file is in a table that is a folder.

    Raises:
        UserError: When the file does not exist, cannot be read, is empty or lacks a column.
    """
    part = part or Part("")
    check_header(table_columns(location, part), columns, str(location))
    batches = _arrow_batches(location) if is_arrow(location.name) else _parquet_batches(location)
    number = 1
    for batch in batches:
        yield from batch_rows(batch, part, number)
        number += batch.num_rows
    if number == 1:
        raise empty(location)


def table_columns(location: Location, part: Part) -> list[str]:
    """The columns of the cells of a file; those of the part alone come last."""
    names = cell_names(file_schema(location))
    own = partition(part.file)  # twice the same column is an error, unless the second is the split of a file name
    return [*names, *(name for name in part.more if name not in names or name in own)]


def file_schema(location: Location) -> pa.Schema:
    """The columns of a Parquet or Arrow file."""
    if is_arrow(location.name):
        return arrow_schema(location)
    with opened(location) as file:
        return pq.ParquetFile(file).schema_arrow


def _parquet_batches(location: Location) -> Iterator[pa.RecordBatch]:
    with opened(location) as file:
        found = pq.ParquetFile(file)
        columns = [one.name for one in found.schema_arrow if not is_image(one.type)]  # images are no cells
        yield from found.iter_batches(batch_size=BATCH_ROWS, columns=columns)


def _arrow_batches(location: Location) -> Iterator[pa.RecordBatch]:
    for stored in stored_batches(location):
        for start in range(0, stored.batch.num_rows, BATCH_ROWS):
            yield stored.batch.slice(start, BATCH_ROWS)


@contextmanager
def opened(location: Location) -> Iterator[Any]:
    """A Parquet file for reading.

    Raises:
        UserError: When it does not exist or is no Parquet file.
    """
    try:
        with location.filesystem.open_input_file(location.path) as file:
            yield file
    except FileNotFoundError as error:
        raise absent(location) from error
    except pa.ArrowInvalid as error:
        raise UserError(
            f"not a Parquet file: {error}", where=str(location), remedy="create the file again"
        ) from error


def empty(location: Location) -> UserError:
    """The error of a table without rows."""
    return UserError("the table has no rows", where=str(location), remedy="remove it, or add rows")


def batch_rows(batch: pa.RecordBatch, part: Part, first: int) -> list[Row]:
    """The rows of a batch; the first has the number `first` in its file."""
    cells = batch_cells(batch)
    unit = f"{part.file}, row" if part.file else "row"
    more = {name: value for name, value in part.more.items() if name not in cells}
    rows = enumerate(zip(*cells.values(), strict=True) if cells else [()] * batch.num_rows, first)
    return [Row(number, dict(zip(cells, values, strict=True)) | more, unit) for number, values in rows]
