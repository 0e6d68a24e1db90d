"""Interface of the readers of raw data, and the types that they return."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from dmtg_core.input_spec import InputSpec
from dmtg_core.tasks import Task
from pipelines.storage import Location

INPUT = "input"  # column of the network's input


class BadSampleError(Exception):
    """A sample cannot be used. The message is the reason, which is written to the quarantine file."""


@dataclass(frozen=True)
class Column:
    """Storage of one column: numpy dtype name, and shape of the value of one sample (`()` for a number)."""

    dtype: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Description:
    """Content of every row of a source.

    `notes` say what is remarkable about the raw data, such as outliers; they are for people alone.
    `columns` has `INPUT`, `task.<name>` for each task and, if pixels can lack a label, `mask.<name>` (uint8,
    1 = annotated). `preparation` describes how a raw sample (a text, a row of a table) becomes the stored input;
    see `pipelines.data.preprocessing`. It is empty if the raw sample is the stored input, as for an image.
    """

    input: InputSpec
    tasks: tuple[Task, ...]
    columns: Mapping[str, Column]
    preparation: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def row_bytes(self) -> int:
        """Decoded size of one sample."""
        return sum(int(np.dtype(c.dtype).itemsize * math.prod(c.shape)) for c in self.columns.values())


@dataclass(frozen=True)
class Entry:
    """A sample before it is read: its unique id, its split ("train", "val" or "test") and fields for `read`.

    Samples with the same `block` are read much faster one after another, such as those of a row group of Parquet.
    They are neighbours in the shards. It is empty if the order does not matter, as for a file for each sample.
    """

    id: str
    split: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    block: str = ""


class Source(Protocol):
    """A reader of a raw format."""

    def raw(self) -> Sequence[Location]:
        """The files, and the folders of files, that are read; none for data that follows from the options."""
        ...

    def describe(self) -> Description:
        """The columns of every row. A reader may open a few files for them."""
        ...

    def entries(self) -> Iterator[Entry]:
        """All samples in a fixed order, without holding them in memory: there can be a hundred million.

        Problems of the whole data set raise `UserError`, at the latest after the last sample.
        """
        ...

    def read(self, entry: Entry) -> dict[str, np.ndarray | None]:
        """All columns of one sample in the dtype and shape of `describe`; None is a missing label.

        Raises:
            BadSampleError: When the sample cannot be used.
        """
        ...
