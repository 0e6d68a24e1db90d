"""Sources: readers of raw data on disk or in a bucket, one for each format.

A reader is cheap to create and safe to send to a worker. `entries` lists the samples without opening images.
`read` opens one sample and returns all its columns, or raises an error with the reason.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from pipelines.config.validation import Section
from pipelines.data.sources.base import Source
from pipelines.errors import UserError
from pipelines.storage import locate

# kind → module, class, and class of the options; the libraries of a reader are imported only if it is used
SOURCES: Mapping[str, tuple[str, str, str]] = {
    "celeba": ("celeba", "CelebaSource", "CelebaOptions"),
    "folder": ("folder", "FolderSource", "FolderOptions"),
    "nuclei": ("nuclei", "NucleiSource", "NucleiOptions"),
    "planted": ("planted", "PlantedSource", "PlantedOptions"),
    "rooms": ("rooms.source", "RoomsSource", "RoomsOptions"),
    "table": ("table", "TableSource", "TableOptions"),
    "taskonomy": ("taskonomy.source", "TaskonomySource", "TaskonomyOptions"),
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
    """The model of `source.options` for a raw format.

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
