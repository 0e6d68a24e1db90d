"""Raw data on disk or in a bucket, read into rows: one reader a format.

A reader is cheap to make and safe to send to a worker. `entries` lists what there is without opening images;
`read` opens one sample and either gives all of its columns or says why it cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from dmtg_core.tasks import InputSpec, Task
from pipelines.errors import UserError
from pipelines.storage import locate

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
    input; see `pipelines.preparation`. It is empty where the stored input is what a user has: an image.
    """

    input: InputSpec
    tasks: tuple[Task, ...]
    columns: Mapping[str, Column]
    preparation: Mapping[str, Any] = field(default_factory=dict)


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


# kind → module and class: a reader's libraries are imported only where its raw format is read
SOURCES: Mapping[str, tuple[str, str]] = {
    "celeba": ("celeba", "CelebaSource"),
    "folder": ("folder", "FolderSource"),
    "nuclei": ("nuclei", "NucleiSource"),
    "planted": ("planted", "PlantedSource"),
    "rooms": ("rooms", "RoomsSource"),
    "table": ("table", "TableSource"),
    "taskonomy": ("taskonomy", "TaskonomySource"),
    "text": ("text", "TextSource"),
}


def build_source(kind: str, root: str, options: Mapping[str, Any]) -> Source:
    """The reader of a raw format.

    Raises:
        UserError: For an unknown kind or option, and for a root that does not exist.
    """
    if kind not in SOURCES:
        raise UserError(
            f"unknown source kind {kind!r}",
            where="source.kind",
            remedy=f"use one of {', '.join(SOURCES)}",
            wrong_use=True,
        )
    module, name = SOURCES[kind]
    reader: Source = getattr(import_module(f"{__name__}.{module}"), name)(locate(root), options)
    return reader
