"""What a reader of raw data is, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from dmtg_core.tasks import InputSpec, Task

INPUT = "input"  # the column of what the network reads


class BadSampleError(Exception):
    """A sample that cannot be used; its message is the reason, and goes to the quarantine file."""


@dataclass(frozen=True)
class Column:
    """How one column is stored: numpy dtype name and the shape of one sample's value (`()` for a number)."""

    dtype: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Description:
    """What every row of a source holds.

    `columns` has `INPUT`, `task.<name>` for each task and, where pixels can lack a label, `mask.<name>`
    (uint8, 1 = annotated). `preparation` says how what a user has (a text, a row of a table) becomes the stored
    input; see `pipelines.data.preprocessing`. It is empty where the stored input is what a user has: an image.
    """

    input: InputSpec
    tasks: tuple[Task, ...]
    columns: Mapping[str, Column]
    preparation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def row_bytes(self) -> int:
        """Decoded size of one sample."""
        return sum(int(np.dtype(c.dtype).itemsize * math.prod(c.shape)) for c in self.columns.values())


@dataclass(frozen=True)
class Entry:
    """One sample before it is read: its unique id, its split ("train", "val" or "test") and what `read` needs."""

    id: str
    split: str
    fields: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """What a reader of a raw format does."""

    def describe(self) -> Description:
        """The columns of every row. May look at a few files."""
        ...

    def entries(self) -> list[Entry]:
        """All samples in a fixed order. Problems of the whole set raise `UserError`."""
        ...

    def read(self, entry: Entry) -> dict[str, np.ndarray | None]:
        """All columns of one sample in the dtype and shape of `describe`; None is a missing label.

        Raises:
            BadSampleError: When the sample cannot be used.
        """
        ...
