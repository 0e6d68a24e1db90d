"""Images in a column of a table: rows with the place of their image, and the image at such a place.

A column has bytes, a struct with `bytes` and `path` (as `datasets` writes it), or paths of files. In an Arrow file
an image is a range of bytes. In a Parquet file it is a row of a row group, which is read as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmtg_core.names import listed
from pipelines.data.sources.tables.arrow_stream import Stored, is_arrow, stored_batches
from pipelines.data.sources.tables.features import is_bytes, is_image, stored_columns
from pipelines.data.sources.tables.folders import Part, table_parts
from pipelines.data.sources.tables.parquet import (
    BATCH_ROWS,
    batch_rows,
    empty,
    file_schema,
    opened,
    table_columns,
)
from pipelines.data.sources.tables.row import ImageRow, check_header
from pipelines.errors import UserError
from pipelines.storage import Location

HELD_GROUPS = 2  # row groups of images in memory


def image_rows(table: Location, part: Part, columns: Sequence[str], image: str) -> Iterator[ImageRow]:
    """The rows of a file of a table; no image is read.

    Args:
        table: The table: a folder or a file.
        part: The file.
        columns: Required columns of labels, ids and splits.
        image: Column of images.

    Raises:
        UserError: When the file cannot be read, is empty or lacks a column, and for a column without images.
    """
    location = table / part.file if part.file else table
    schema = file_schema(location)
    check_header(table_columns(location, part), columns, str(location))
    _check_images(schema, image, location)
    wanted = stored_columns(schema, columns)
    count = 0
    for batch, places in _arrow(location, image) if is_arrow(location.name) else _parquet(location, wanted):
        rows = batch_rows(batch.select(wanted), part, count + 1)
        for row, place in zip(rows, places, strict=True):
            yield ImageRow(row.line, row.cells, row.unit, image={"file": part.file, **place})
        count += batch.num_rows
    if not count:
        raise empty(location)


def image_columns(table: Location) -> list[str]:
    """The columns of a table that can hold images, from its first file."""
    part = table_parts(table)[0] if table.is_dir() else Part("")
    return [one.name for one in file_schema(table / part.file if part.file else table) if is_image(one.type)]


def _check_images(schema: pa.Schema, image: str, location: Location) -> None:
    found = [one.name for one in schema if is_image(one.type)]
    remedy = f"set source.options.image_column; columns of images: {listed(found) or 'none'}"
    if image not in schema.names:
        raise UserError(f"no column {image}", where=str(location), remedy=remedy)
    kind = schema.field(image).type
    if not (is_image(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"column {image} holds {kind}, not images", where=str(location), remedy=remedy)


def _parquet(location: Location, wanted: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, list[dict[str, Any]]]]:
    with opened(location) as file:
        found = pq.ParquetFile(file)
        for group in range(found.num_row_groups):
            row = 0
            for batch in found.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=list(wanted)):
                yield batch, [{"group": group, "row": row + i} for i in range(batch.num_rows)]
                row += batch.num_rows


def _arrow(location: Location, image: str) -> Iterator[tuple[pa.RecordBatch, list[dict[str, Any]]]]:
    for stored in stored_batches(location):
        yield stored.batch, _ranges(stored, stored.batch.column(image), location)


def _ranges(stored: Stored, column: pa.Array, location: Location) -> list[dict[str, Any]]:
    """The ranges of bytes of the images of a batch; a path if a row has no bytes, else nothing."""
    paths = [None] * len(column)
    if pa.types.is_struct(column.type):
        if column.type.get_field_index("path") >= 0:
            paths = column.field("path").to_pylist()
        column = column.flatten()[column.type.get_field_index("bytes")]  # null where the struct is
    elif not is_bytes(column.type):
        return [{"path": path} if path else {} for path in column.to_pylist()]
    if not column.null_count < len(column):
        return [{"path": path} if path else {} for path in paths]
    _, offsets, values = column.buffers()
    start = stored.place(values)
    if start < 0:
        raise UserError(
            "the Arrow file is compressed, so its images have no place in it",
            where=str(location),
            remedy="write it with save_to_disk of the datasets library, or as Parquet",
        )
    wide = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    ends = np.frombuffer(offsets, wide)[column.offset : column.offset + len(column) + 1].tolist()
    places: list[dict[str, Any]] = []
    for row, known in enumerate(column.is_valid().to_pylist()):
        if known:
            places.append({"start": start + ends[row], "size": ends[row + 1] - ends[row]})
        else:
            places.append({"path": paths[row]} if paths[row] else {})
    return places


class TableImages:
    """The images of a column of a table. A copy in another process holds no row groups.

    Args:
        table: The table: a folder or a file.
        image: Column of images.
    """

    def __init__(self, table: Location, image: str) -> None:
        self._table, self._image = table, image
        self._lock = threading.Lock()
        self._held: dict[tuple[str, int], pa.ChunkedArray] = {}

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return TableImages, (self._table, self._image)

    def read(self, place: Mapping[str, Any]) -> bytes | None:
        """The bytes at a place of `image_rows`; None without an image.

        Raises:
            FileNotFoundError, PermissionError: For a path of a file that cannot be read.
            UserError: When the storage does not answer.
        """
        file = self._table / place["file"] if place["file"] else self._table
        if "start" in place:
            return file.read_bytes(place["start"], place["size"])
        value: Any = self._of_group(file, place["group"], place["row"]) if "group" in place else place.get("path")
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value.get("path")
        return self._of_path(value, file) if isinstance(value, str) else value

    def _of_path(self, path: str, file: Location) -> bytes | None:
        """A file that a cell names, from the folder of the table or absolute."""
        if not path:
            return None
        folder = self._table if self._table != file else self._table.parent
        absolute = path.startswith("/") and folder.local is not None
        return (Location(path) if absolute else folder / path).read_bytes()

    def _of_group(self, file: Location, group: int, row: int) -> Any:
        """A value of a row group. Threads that need the same row group wait until one has read it."""
        with self._lock:
            key = (str(file), group)
            if key not in self._held:
                while len(self._held) >= HELD_GROUPS:
                    del self._held[next(iter(self._held))]
                with opened(file) as source:
                    table = pq.ParquetFile(source).read_row_group(group, columns=[self._image])
                self._held[key] = table.column(self._image)
            values = self._held[key]
        return values[row].as_py()
