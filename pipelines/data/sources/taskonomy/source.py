"""Reader of Taskonomy: rooms from many points of view, with a label for every pixel.

```
root/<task>/<building>/point_<p>_view_<v>_domain_<domain>.png                 or
root/<task>/taskonomy/<building>/point_<p>_view_<v>_domain_<domain>.png       or
root/<building>_<task>/point_<p>_view_<v>_domain_<domain>.png
```

(`.npy` for `class_object` and `class_scene`.) The Omnidata tool downloads the second layout.

The licence of the data set is non-commercial and forbids redistribution, so none of it is part of this project. It
is available from its authors (taskonomy.stanford.edu) under their terms.

Depth, keypoints and edges are 16-bit files with values far above 255; they stay 16-bit from the file to the shard.
`pipelines.data.sources.taskonomy.tasks` documents the content of each task and the sources of its constants.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field

from dmtg_core.names import listed
from pipelines.config.validation import Section, checked
from pipelines.data.sources.base import INPUT, BadSampleError, Column, Description, Entry
from pipelines.data.sources.columns import Replayed
from pipelines.data.sources.images import (
    decode_image,
    image_input,
    read_image,
    resize_mask,
    resize_rgb,
    rgb,
    sixteen_bit,
)
from pipelines.data.sources.row_splits import hash_split
from pipelines.data.sources.rows import check_root
from pipelines.data.sources.taskonomy.splits import read_splits, split_buildings
from pipelines.data.sources.taskonomy.tasks import (
    CLASSES,
    MESH,
    TASKS,
    AnyTaskName,
    TaskName,
    column,
    domains,
    read_label,
    suffix,
)
from pipelines.errors import UserError
from pipelines.storage import Location, locate

__all__ = ["CLASSES", "TASKS", "TaskName", "TaskonomyOptions", "TaskonomySource", "domains"]

logger = logging.getLogger(__name__)

LAYOUTS: Mapping[str, str] = {
    "task": "{task}/{building}",
    "component": "{task}/taskonomy/{building}",
    "building": "{building}_{task}",
}
_RGB_FILE = re.compile(r"point_(?P<point>\d+)_view_(?P<view>\d+)_domain_rgb\.png")
_EXPECTED = "<task>/<building>/point_<p>_view_<v>_domain_<domain>.png or <building>_<task>/point_….png"
_LISTERS = 16  # buildings that are listed at the same time, so that waits for a network overlap


class TaskonomyOptions(Section):
    """Images and labels are stored `size` × `size`.

    `tasks` are by default the five of the published experiments. `splits` is the address of a CSV file with the
    columns `building,split` or those of Taskonomy, `id,train,val,test`; without it, whole buildings are split by
    the hash of their names. A building that the file does not name stops the job (`unlisted: refuse`) or is left
    out (`unlisted: leave_out`, for a small split of a large download). A sample without one of its label files is
    a bad sample (`missing: quarantine`) or has that label masked out (`missing: mask`). With `depth_mask`, the
    labels that are rendered from the mesh are annotated only where `depth_zbuffer` is valid, as in the published
    losses; this needs the depth files.
    """

    tasks: tuple[AnyTaskName, ...] = Field(get_args(TaskName), min_length=1)
    size: int = Field(256, ge=8, le=4096)
    splits: str | None = None
    unlisted: Literal["refuse", "leave_out"] = "refuse"
    missing: Literal["quarantine", "mask"] = "quarantine"
    depth_mask: bool = False


class TaskonomySource:
    """Reads Taskonomy in any of its layouts. See `TaskonomyOptions` for the options.

    Raises:
        UserError: For a wrong option.
    """

    def __init__(self, root: Location, options: Mapping[str, Any]) -> None:
        self._options = checked(TaskonomyOptions, options, "source.options")
        self._root = root
        names = self._options.tasks
        if len(set(names)) < len(names):
            raise UserError(
                f"a task is named twice: {', '.join(names)}",
                where="source.options.tasks",
                remedy="name each task once",
                wrong_use=True,
            )
        self._masked = [name for name in names if self._options.depth_mask and name in MESH]

    def raw(self) -> Sequence[Location]:
        """See `Source.raw`: the folders of the images and of the labels that are read, in any layout."""
        layout, buildings = self._buildings()
        names = dict.fromkeys(["rgb", *self._options.tasks, *(["depth_zbuffer"] if self._masked else [])])
        folders = [self._root / name for name in names]
        if layout == "building":
            folders = [_folder(self._root, layout, name, one) for one in buildings for name in names]
        return folders + ([locate(self._options.splits)] if self._options.splits else [])

    def describe(self) -> Description:
        """The columns; no file is opened."""
        size, names = self._options.size, self._options.tasks
        columns = {INPUT: Column("uint8", (size, size, 3))}
        columns |= {f"task.{name}": column(name, size) for name in names}
        columns |= {f"mask.{name}": Column("uint8", (size, size)) for name in self._masked}
        return Description(image_input(size), tuple(TASKS[name] for name in names), columns)

    def entries(self) -> Iterator[Entry]:
        """One sample for each rgb file, by building and file name. Only folders of rgb files are listed.

        More than `columns.HELD_ROWS` files are listed twice, because the split of a building depends on all
        buildings that have samples. The names of `_LISTERS` buildings are then in memory at a time.

        Raises:
            UserError: For a root that does not exist or has no rgb files, and for a building that the split file
                does not name.
        """
        check_root(self._root, _EXPECTED)
        splits = None if self._options.splits is None else read_splits(locate(self._options.splits))
        layout, wanted = self._wanted_buildings(splits)
        files = Replayed(lambda _: self._listed(layout, wanted))
        splits = self._splits(self._with_samples(files), splits)
        for building, file in files:
            if match := _RGB_FILE.fullmatch(file):
                fields = {"layout": layout, "building": building, **match.groupdict()}
                name = f"{building}/point_{fields['point']}_view_{fields['view']}"
                yield Entry(name, splits[building] if splits else hash_split(name), fields)

    def read(self, entry: Entry) -> dict[str, np.ndarray | None]:
        """The image and the labels of one point of view.

        Raises:
            BadSampleError: For a file that is missing, damaged, of the wrong size or depth, or with an unknown
                class id.
        """
        location = _file(self._root, entry.fields, "rgb", "rgb")
        image = rgb(read_image(location), str(location))
        if image.width != image.height:
            raise BadSampleError(f"expected a square image, got {image.width}×{image.height}: {location}")
        columns: dict[str, np.ndarray | None] = {INPUT: resize_rgb(image, self._options.size)}
        for name in self._options.tasks:
            columns[f"task.{name}"] = self._label(entry, name, image.size)
        if self._masked:
            valid = self._valid_depth(entry)
            for name in self._masked:
                columns[f"mask.{name}"] = valid
                if valid is None:  # without the depth, the annotated pixels are unknown
                    columns[f"task.{name}"] = None
        return columns

    def _label(self, entry: Entry, task: str, frame: tuple[int, int]) -> np.ndarray | None:
        location, data = self._bytes(entry, task)
        return None if data is None else read_label(task, data, str(location), frame, self._options.size)

    def _valid_depth(self, entry: Entry) -> np.ndarray | None:
        """1 where the depth is valid, uint8 (size, size); None without a file of depths."""
        location, data = self._bytes(entry, "depth_zbuffer")
        if data is None:
            return None
        depth = sixteen_bit(decode_image(data, str(location)), str(location))
        return resize_mask(depth < TASKS["depth_zbuffer"].valid_below, self._options.size)

    def _bytes(self, entry: Entry, task: str) -> tuple[Location, bytes | None]:
        location, data = _first_there(_file(self._root, entry.fields, task, d) for d in domains(task))
        if data is None and self._options.missing == "quarantine":
            raise BadSampleError(f"no label file {location}")
        return location, data

    def _with_samples(self, files: Iterable[tuple[str, str]]) -> list[str]:
        """The buildings that have rgb files, sorted."""
        found, others = set(), 0
        for building, file in files:
            if _RGB_FILE.fullmatch(file):
                found.add(building)
            else:
                others += 1
        if not found:
            raise UserError("no rgb files", where=str(self._root), remedy=f"expected in this folder: {_EXPECTED}")
        if others:
            logger.warning("%s: %d files are not named as rgb files are", self._root, others)
        return sorted(found)

    def _listed(self, layout: str, wanted: Sequence[str]) -> Iterator[tuple[str, str]]:
        """The building and the name of each file in the rgb folders."""

        def names(building: str) -> list[str]:
            return _folder(self._root, layout, "rgb", building).files(recursive=False)

        with ThreadPoolExecutor(_LISTERS) as pool:
            for start in range(0, len(wanted), _LISTERS):
                some = wanted[start : start + _LISTERS]
                for building, files in zip(some, pool.map(names, some), strict=True):
                    yield from ((building, file) for file in files)

    def _wanted_buildings(self, splits: Mapping[str, str] | None) -> tuple[str, list[str]]:
        """The layout, and the buildings that are in a split."""
        layout, buildings = self._buildings()
        wanted = [building for building in buildings if self._wanted(building, splits)]
        if buildings and not wanted:
            raise UserError(
                f"none of the {len(buildings)} buildings is in a split: {listed(buildings)}",
                where=str(self._options.splits),
                remedy="correct source.options.splits or source.root",
            )
        return layout, wanted

    def _buildings(self) -> tuple[str, list[str]]:
        """The layout and the buildings, from the names of folders alone. No building is named taskonomy."""
        folders = self._root.folders()
        if "rgb" not in folders:
            return "building", [name.removesuffix("_rgb") for name in folders if name.endswith("_rgb")]
        below = (self._root / "rgb").folders()
        if "taskonomy" in below:
            return "component", (self._root / "rgb" / "taskonomy").folders()
        return "task", below

    def _wanted(self, building: str, splits: Mapping[str, str] | None) -> bool:
        """Whether to list a building. One that the split file does not name is listed, to be refused later."""
        if splits is None:
            return True
        return splits[building] != "" if building in splits else self._options.unlisted == "refuse"

    def _splits(self, buildings: Sequence[str], splits: dict[str, str] | None) -> dict[str, str]:
        """The split of each building; empty if samples are split instead."""
        if splits is None:
            if len(buildings) < 3:
                logger.warning("%d buildings are too few: split by sample, not by building", len(buildings))
                return {}
            return split_buildings(buildings)
        unknown = [building for building in buildings if building not in splits]
        if unknown:
            raise UserError(
                f"no split for building {listed(unknown)}",
                where=str(self._options.splits),
                remedy="add it to the file, remove it from the data, or set source.options.unlisted to leave_out",
            )
        absent = sorted({name for name, split in splits.items() if split} - set(buildings))
        if absent:
            logger.warning("%d buildings of the split file do not exist: %s", len(absent), listed(absent))
        return splits


def _folder(root: Location, layout: str, task: str, building: str) -> Location:
    return root / LAYOUTS[layout].format(task=task, building=building)


def _file(root: Location, fields: Mapping[str, str], task: str, domain: str) -> Location:
    folder = _folder(root, fields["layout"], task, fields["building"])
    return folder / f"point_{fields['point']}_view_{fields['view']}_domain_{domain}{suffix(task)}"


def _first_there(locations: Iterable[Location]) -> tuple[Location, bytes | None]:
    """The first file that exists, with its bytes; else the first location, without bytes."""
    tried = []
    for location in locations:
        try:
            return location, location.read_bytes()
        except FileNotFoundError:
            tried.append(location)
    return tried[0], None
