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

from pydantic import ConfigDict

from dmtg_core.addresses import FORM, CodeError, allow_code, full_name, is_address, load, short_names
from pipelines.config.validation import Section
from pipelines.data.sources.base import Source
from pipelines.errors import UserError
from pipelines.storage import locate

# kind → module, class, and class of the options; the libraries of a reader are imported only if it is used
SOURCES: Mapping[str, tuple[str, str, str]] = {
    "celeba": ("celeba", "CelebaSource", "CelebaOptions"),
    "folder": ("folder", "FolderSource", "FolderOptions"),
    "image_table": ("labelled_images.table", "ImageTableSource", "ImageTableOptions"),
    "nuclei": ("nuclei", "NucleiSource", "NucleiOptions"),
    "nyuv2": ("nyuv2.source", "Nyuv2Source", "Nyuv2Options"),
    "planted": ("planted", "PlantedSource", "PlantedOptions"),
    "rooms": ("rooms.source", "RoomsSource", "RoomsOptions"),
    "table": ("table", "TableSource", "TableOptions"),
    "taskonomy": ("taskonomy.source", "TaskonomySource", "TaskonomyOptions"),
    "text": ("text", "TextSource", "TextOptions"),
    "webdataset": ("labelled_images.webdataset", "WebDatasetSource", "WebDatasetOptions"),
}


class FreeOptions(Section):
    """Any options, of a reader of another package whose class names no model in `options_model`."""

    model_config = ConfigDict(extra="allow")


def build_source(kind: str, root: str, options: Mapping[str, Any]) -> Source:
    """The reader of a raw format that a configuration names.

    Args:
        kind: A key of `SOURCES`, the address of a class, or the short name of an entry point.
        root: Where the raw data is.
        options: Options of the reader.

    Raises:
        UserError: For an unknown kind or option, and for a root that does not exist.
    """
    if kind not in SOURCES:
        reader: Any = _own(kind)
    else:
        reader = getattr(_module(kind), SOURCES[kind][1])
    source: Source = reader(locate(root), options)
    return source


def options_model(kind: str) -> type[Section]:
    """The model of `source.options` for a raw format that a configuration names.

    Raises:
        UserError: For an unknown kind.
    """
    if kind not in SOURCES:
        own: type[Section] = getattr(_own(kind), "options_model", FreeOptions)
        return own
    _, _, name = SOURCES[kind]
    model: type[Section] = getattr(_module(kind), name)
    return model


def _own(kind: str) -> Any:
    """The reader of another package. It is the configuration that names it, so it is imported."""
    address = full_name("source", kind, SOURCES)
    if not is_address(address):
        names = [*SOURCES, *short_names("source")]
        nearest = difflib.get_close_matches(kind, names, n=1)
        meant = f"did you mean {nearest[0]}? Otherwise " if nearest else ""
        raise UserError(
            f"unknown source kind {kind!r}",
            where="source.kind",
            remedy=f"{meant}use one of {', '.join(names)}, or {FORM}",
            wrong_use=True,
        )
    allow_code(address)
    try:
        return load("source", address)
    except CodeError as error:
        raise UserError(error.problem, where="source.kind", remedy=error.remedy, wrong_use=True) from error


def _module(kind: str) -> ModuleType:
    return import_module(f"{__name__}.{SOURCES[kind][0]}")
