"""Raw data on disk or in a bucket, read into rows: one reader a format.

A reader is cheap to make and safe to send to a worker. `entries` lists what there is without opening images;
`read` opens one sample and either gives all of its columns or says why it cannot.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from dmtg_core.tasks import InputSpec, Task
from pipelines.config.validation import Section
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


# kind → module, class, and the class of its options: a reader's libraries are imported only where it is used
SOURCES: Mapping[str, tuple[str, str, str]] = {
    "celeba": ("celeba", "CelebaSource", "CelebaOptions"),
    "folder": ("folder", "FolderSource", "FolderOptions"),
    "nuclei": ("nuclei", "NucleiSource", "NucleiOptions"),
    "planted": ("planted", "PlantedSource", "PlantedOptions"),
    "rooms": ("rooms", "RoomsSource", "RoomsOptions"),
    "table": ("table", "TableSource", "TableOptions"),
    "taskonomy": ("taskonomy", "TaskonomySource", "TaskonomyOptions"),
    "text": ("text", "TextSource", "TextOptions"),
}


def build_source(kind: str, root: str, options: Mapping[str, Any]) -> Source:
    """The reader of a raw format.

    Raises:
        UserError: For an unknown kind or option, and for a root that does not exist.
    """
    _, name, _ = _named(kind)
    reader: Source = getattr(_module(kind), name)(locate(root), options)
    return reader


def options_model(kind: str) -> type[Section]:
    """What `source.options` can be for a raw format.

    Raises:
        UserError: For an unknown kind.
    """
    _, _, name = _named(kind)
    model: type[Section] = getattr(_module(kind), name)
    return model


def _named(kind: str) -> tuple[str, str, str]:
    if kind not in SOURCES:
        nearest = difflib.get_close_matches(kind, SOURCES, n=1)
        raise UserError(
            f"unknown source kind {kind!r}",
            where="source.kind",
            remedy=f"did you mean {nearest[0]}?" if nearest else f"use one of {', '.join(SOURCES)}",
            wrong_use=True,
        )
    return SOURCES[kind]


def _module(kind: str) -> ModuleType:
    return import_module(f"{__name__}.{SOURCES[kind][0]}")
