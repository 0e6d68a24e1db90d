"""New configurations for images with labels in columns: a folder, a table with images, and tar files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from dmtg_core.names import listed
from pipelines.data.sources.folder import EXTENSIONS
from pipelines.data.sources.labelled_images.webdataset import sample_head
from pipelines.data.sources.rows import SPLIT_COLUMN, Row, read_head, split_name
from pipelines.data.sources.tables.images import image_columns
from pipelines.errors import UserError
from pipelines.scaffold.comments import Draft, Written
from pipelines.scaffold.drafts import (
    DROPOUT,
    inferred_from,
    of_options,
    row_options,
    row_uses,
    tasks_and_rest,
    training_sections,
)
from pipelines.scaffold.inference import HEAD_ROWS, ColumnSummary, Use, split_use, summaries
from pipelines.storage import Location

VAL_SHARE = 0.1
CONVNET = {"widths": [16, 32, 64, 96], "dropout": DROPOUT}


def folder_draft(data: str, place: Location, given: Sequence[str]) -> Draft:
    """The configuration for a folder of images with a table of labels."""
    labels = _labels_file(place)
    rows, more = read_head(place / labels, HEAD_ROWS)
    columns = summaries(rows)
    tasks, rest = tasks_and_rest(columns, given, place / labels, more)
    images, image_column, suffix = _images(place, rest)
    rest.pop(image_column)
    split = split_use(rest)
    options, why = row_options([split] if split else [], place / labels)
    options = {"labels": labels, "images": images, "image_column": image_column, "suffix": suffix, **options}
    why["suffix"] = "added to a name without an extension"
    options["size"] = 64
    why["size"] = "images are stored 64 × 64; larger images hold more detail and train longer"
    options["tasks"] = [dict(use.options) for use in tasks]
    values = {
        "source": {"kind": "folder", "root": data, "options": options},
        **training_sections("convnet", 1, dict(CONVNET), len(tasks), len(rows), 2e-3),
    }
    about = f"{len(tasks)} tasks on the images of {data}"
    uses = [*tasks, *([split] if split else []), Use(image_column, "id", f"names the images in {images}/")]
    return Draft("folder", inferred_from(about, len(rows), more), values, of_options(why), uses)


def _labels_file(place: Location) -> str:
    tables = [name for name in place.files(recursive=False) if name.lower().endswith((".csv", ".tsv"))]
    if "labels.csv" in tables:
        return "labels.csv"
    if len(tables) == 1:
        return tables[0]
    raise UserError(
        f"{len(tables)} tables in the folder, and none is named labels.csv" if tables else "no table of labels",
        where=str(place),
        remedy="add labels.csv, with a line for each image: its name and its labels",
    )


def _images(place: Location, columns: Mapping[str, ColumnSummary]) -> tuple[str, str, str]:
    """The folder of images, the column that names them, and the file extension that its cells lack."""
    for folder in sorted(place.folders(), key=lambda name: name != "images"):
        there = set((place / folder).files(recursive=False))
        for column in columns.values():
            cells = [cell for cell in column.cells if cell][:100]
            for suffix in ("", *EXTENSIONS):
                if cells and 2 * sum(f"{cell}{suffix}" in there for cell in cells) > len(cells):
                    return folder, column.name, suffix or PurePosixPath(cells[0]).suffix
    raise UserError(
        "no column names the images of a folder",
        where=str(place),
        remedy="move the images to the folder images/, and write their names to the column image of the table",
    )


def image_table_draft(data: str, place: Location, given: Sequence[str]) -> Draft:
    """The configuration for a table with a column of images."""
    rows, more = read_head(place, HEAD_ROWS)
    tasks, rest = tasks_and_rest(summaries(rows), given, place, more)
    columns = image_columns(place)
    if not columns:
        raise UserError(
            "no column of images in the table", where=str(place), remedy="read it with --source table or text"
        )
    options: Written = {"image_column": columns[0]}
    why = {"image_column": f"columns of images: {listed(columns)}"}
    uses = [use for use in row_uses(rest) if use.use in ("id", "split by")]
    if split := rest.get(SPLIT_COLUMN):
        uses += [use for use in (split_use({split.name: split}),) if use is not None and use.use == "split"]
    found, reasons = row_options(uses, place) if uses else ({}, {})
    shared, shared_why = _shared(tasks, set(split.counts) if split else set())
    draft = _draft("image_table", data, {**options, **found, **shared}, (rows, more), [*tasks, *uses])
    draft.why.update(of_options(why | reasons | shared_why))
    return draft


def webdataset_draft(data: str, place: Location, given: Sequence[str]) -> Draft:
    """The configuration for tar files of WebDataset."""
    rows, splits, more = sample_head(place, HEAD_ROWS)
    tasks, _ = tasks_and_rest(summaries(rows), given, place, more)
    options, why = _shared(tasks, splits)
    draft = _draft("webdataset", data, options, (rows, more), tasks)
    draft.why.update(of_options(why))
    return draft


def _shared(tasks: Sequence[Use], splits: set[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The options that both readers have, and the reasons for them; `splits` are the names of the splits."""
    options: dict[str, Any] = {"size": 64, "tasks": [dict(use.options) for use in tasks]}
    why = {"size": "images are stored 64 × 64; larger images hold more detail and train longer"}
    named = {split_name(split) for split in splits}
    if named and None not in named and "val" not in named:
        options["val_share"] = VAL_SHARE
        why["val_share"] = f"there is no split for validation: {listed(sorted(splits))}"
    return options, why


def _draft(kind: str, data: str, options: Written, head: tuple[Sequence[Row], bool], uses: Sequence[Use]) -> Draft:
    rows, more = head
    tasks = sum(use.use == "target" for use in uses)
    values = {
        "source": {"kind": kind, "root": data, "options": options},
        **training_sections("convnet", 1, dict(CONVNET), tasks, len(rows), 2e-3),
    }
    about = f"{tasks} tasks on the images of {data}"
    return Draft(kind, inferred_from(about, len(rows), more), values, {}, list(uses))
