"""Record batches of Arrow files (`.arrow`), as `save_to_disk` of Hugging Face's `datasets` writes them.

Arrow's IPC format stores the values of a column as they are in memory, so a value has a place in the file. A
reader keeps this place and reads one value without the rest of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.data.sources.tables.encodings import absent
from pipelines.errors import UserError
from pipelines.storage import Location

_MAGIC, _HEAD = b"ARROW1", 8  # of a file with a footer, in which the stream begins after eight bytes
_ENDINGS = (".arrow", ".feather")


@dataclass(frozen=True)
class Stored:
    """A record batch, and where its body is in the file."""

    batch: pa.RecordBatch
    body: pa.Buffer
    start: int

    def place(self, values: pa.Buffer) -> int:
        """Position in the file of a buffer of the batch; -1 if it is not in the body, as of compressed batches."""
        offset = values.address - self.body.address
        return self.start + offset if 0 <= offset <= self.body.size - values.size else -1


def is_arrow(name: str) -> bool:
    """Whether a file is in Arrow's IPC format by its name."""
    return name.lower().endswith(_ENDINGS)


def stored_batches(location: Location) -> Iterator[Stored]:
    """The record batches of a file, one in memory at a time. Values of a local file stay on the disk until used.

    Raises:
        UserError: When the file does not exist, or is damaged.
    """
    with _opened(location) as (file, schema):
        while True:
            message = _next_message(file, location)
            if message is None:
                return
            if message.type != "record batch":
                raise UserError(
                    f"the file has a {message.type}, expected record batches alone",
                    where=str(location),
                    remedy="write it with save_to_disk of the datasets library, or as Parquet",
                )
            batch = pa.ipc.read_record_batch(message, schema)
            yield Stored(batch, message.body, file.tell() - message.body.size)


def arrow_schema(location: Location) -> pa.Schema:
    """The columns of a file.

    Raises:
        UserError: As `stored_batches`.
    """
    with _opened(location) as (_, schema):
        return schema


def _next_message(file: Any, location: Location) -> Any:
    """The next message; None at the end."""
    try:
        return pa.ipc.read_message(file)
    except EOFError:
        return None
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(location, error) from error


@contextmanager
def _opened(location: Location) -> Iterator[tuple[Any, pa.Schema]]:
    """The file after its schema, and the schema. A local file is mapped into memory."""
    filesystem = pafs.LocalFileSystem(use_mmap=True) if location.local is not None else location.filesystem
    try:
        with filesystem.open_input_file(location.path) as file:
            file.seek(_HEAD if file.read(len(_MAGIC)) == _MAGIC else 0)
            try:
                schema = pa.ipc.read_schema(pa.ipc.read_message(file))
            except (pa.ArrowInvalid, EOFError) as error:
                raise _damaged(location, error) from error
            yield file, schema
    except FileNotFoundError as error:
        raise absent(location) from error


def _damaged(location: Location, error: BaseException) -> UserError:
    return UserError(
        f"the Arrow file is damaged: {error}", where=str(location), remedy="copy or create the file again"
    )
