"""Taskonomy: rooms seen from many points, with a label for every pixel.

```
root/<task>/<building>/point_<p>_view_<v>_domain_<domain>.png     or
root/<building>_<task>/point_<p>_view_<v>_domain_<domain>.png
```

The data set's licence is non-commercial and forbids passing it on: none of it is part of this project. Get it
from its authors (taskonomy.stanford.edu) and keep to their terms.

Depth, keypoints and edges are 16-bit files whose values go far above 255: they stay 16-bit from the file to the
shard. Normalising constants are those of Standley et al. (ICML 2020), which the published tables use.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from pydantic import Field

from dmtg_core.tasks import Task
from pipelines.config import Section, checked
from pipelines.errors import UserError
from pipelines.sources import INPUT, BadSampleError, Column, Description, Entry
from pipelines.sources.images import (
    SPLITS,
    Row,
    check_root,
    decode_image,
    hash_split,
    image_input,
    read_image,
    read_table,
    resize_ids,
    resize_numbers,
    resize_rgb,
    rgb,
    sixteen_bit,
    split_name,
    to_integers,
)
from pipelines.storage import Location, locate

log = logging.getLogger(__name__)

CLASSES = (
    "uncertain",
    "background",
    "bottle",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
)

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "depth_zbuffer",
            "dense_regression",
            loss="l1_shift",
            offset=(1500.0,),
            scale=(1000.0,),
            valid_below=2.0**13,  # 16 m; 65535 is "nothing there"
            unit="1/512 m",
        ),
        Task(
            "normal",
            "dense_regression",
            channels=3,
            loss="l1_shift",
            metric="within_30",
            offset=(127.5,),
            scale=(127.5,),
        ),
        Task(
            "segment_semantic",
            "dense_classification",
            channels=len(CLASSES),
            metric="miou",
            ignore_index=0,
            labels=CLASSES,
        ),
        Task("keypoints2d", "dense_regression", loss="l1", offset=(50.0,), scale=(100.0,)),
        Task("edge_texture", "dense_regression", loss="l1", offset=(718.0,), scale=(1070.0,)),
    )
}

TaskName = Literal["depth_zbuffer", "normal", "segment_semantic", "keypoints2d", "edge_texture"]

_RGB_FILE = re.compile(r"point_(?P<point>\d+)_view_(?P<view>\d+)_domain_rgb\.png")
_LAYOUT = "<task>/<building>/point_<p>_view_<v>_domain_<domain>.png or <building>_<task>/point_….png"


class TaskonomyOptions(Section):
    """Images and labels are stored `size` × `size`.

    `splits` is the address of a CSV file, either `building,split` or Taskonomy's own `id,train,val,test`;
    without it whole buildings are split by the hash of their names. A sample without one of its label files is
    a bad one (`missing: quarantine`) or has that label masked out (`missing: mask`).
    """

    tasks: tuple[TaskName, ...] = Field(get_args(TaskName), min_length=1)
    size: int = Field(256, ge=8, le=4096)
    splits: str | None = None
    missing: Literal["quarantine", "mask"] = "quarantine"


class TaskonomySource:
    """Reads Taskonomy in either of its layouts. See `TaskonomyOptions` for the options.

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

    def describe(self) -> Description:
        """The columns; no file is opened."""
        size = self._options.size
        columns = {INPUT: Column("uint8", (size, size, 3))}
        for name in self._options.tasks:
            shape = (size, size, 3) if name == "normal" else (size, size)
            dtype = "uint8" if name in ("normal", "segment_semantic") else "uint16"
            columns[f"task.{name}"] = Column(dtype, shape)
        return Description(image_input(size), tuple(TASKS[name] for name in self._options.tasks), columns)

    def entries(self) -> list[Entry]:
        """One sample an rgb file, by building and file name. Only folders are listed.

        Raises:
            UserError: For a root that does not exist or holds no rgb files, and for a building that the split
                file does not name.
        """
        check_root(self._root, _LAYOUT)
        points = self._points()
        splits = self._splits(sorted({fields["building"] for fields in points}))
        found = []
        for fields in points:
            name = f"{fields['building']}/point_{fields['point']}_view_{fields['view']}"
            split = splits[fields["building"]] if splits else hash_split(name)
            if split:
                found.append(Entry(name, split, fields))
        return found

    def read(self, entry: Entry) -> dict[str, np.ndarray | None]:
        """The image and the labels of one point of view.

        Raises:
            BadSampleError: For a file that is missing, damaged, of the wrong size or depth, or that holds a
                class id there is no class for.
        """
        location = _file(self._root, entry.fields, "rgb", "rgb")
        image = rgb(read_image(location), str(location))
        if image.width != image.height:
            raise BadSampleError(f"expected a square image, got {image.width}×{image.height}: {location}")
        columns: dict[str, np.ndarray | None] = {INPUT: resize_rgb(image, self._options.size)}
        for name in self._options.tasks:
            columns[f"task.{name}"] = self._label(entry, name, image.size)
        return columns

    def _label(self, entry: Entry, task: str, expected: tuple[int, int]) -> np.ndarray | None:
        location, data = _first_there(_file(self._root, entry.fields, task, d) for d in domains(task))
        if data is None:
            if self._options.missing == "mask":
                return None
            raise BadSampleError(f"no label file {location}")
        image = decode_image(data, str(location))
        if image.size != expected:
            raise BadSampleError(
                f"{location} is {image.width}×{image.height}, its rgb {expected[0]}×{expected[1]}"
            )
        return _READERS[task](image, str(location), self._options.size)

    def _points(self) -> list[dict[str, str]]:
        """Layout, building, point and view of each rgb file."""
        folders = self._root.folders()
        if "rgb" in folders:
            listed = [("task", *path.split("/", 1)) for path in (self._root / "rgb").files() if "/" in path]
        else:
            buildings = [name.removesuffix("_rgb") for name in folders if name.endswith("_rgb")]
            listed = [("building", b, file) for b in buildings for file in (self._root / f"{b}_rgb").files()]
        points = [
            {"layout": layout, "building": building, **match.groupdict()}
            for layout, building, file in listed
            if (match := _RGB_FILE.fullmatch(file))
        ]
        if not points:
            raise UserError("no rgb files", where=str(self._root), remedy=f"expected there: {_LAYOUT}")
        if len(points) < len(listed):
            log.warning("%s: %d files are not named as rgb files are", self._root, len(listed) - len(points))
        return points

    def _splits(self, buildings: Sequence[str]) -> dict[str, str]:
        """The split of each building, "" for one that is in none; empty where samples are split instead."""
        if self._options.splits is None:
            if len(buildings) < 3:
                log.warning("%d buildings are too few: split by sample, not by building", len(buildings))
                return {}
            return split_buildings(buildings)
        table = locate(self._options.splits)
        splits = read_splits(table)
        unknown = [building for building in buildings if building not in splits]
        if unknown:
            raise UserError(
                f"no split for building {', '.join(unknown[:5])}" + (" …" if len(unknown) > 5 else ""),
                where=str(table),
                remedy="add the building to the file, or take it out of the data",
            )
        outside = [building for building in buildings if not splits[building]]
        if outside:
            log.info("%s puts %d buildings in no split: left out", table, len(outside))
        return splits


def domains(task: str) -> tuple[str, ...]:
    """How files name a task, the usual way first: published copies differ in the underscore."""
    plain = task.replace("_", "")
    return (plain, task) if task == "segment_semantic" else tuple(dict.fromkeys((task, plain)))


def _file(root: Location, fields: Mapping[str, str], task: str, domain: str) -> Location:
    building = fields["building"]
    folder = root / task / building if fields["layout"] == "task" else root / f"{building}_{task}"
    return folder / f"point_{fields['point']}_view_{fields['view']}_domain_{domain}.png"


def _first_there(locations: Iterable[Location]) -> tuple[Location, bytes | None]:
    """The first file that exists with its bytes, or the first one tried without."""
    tried = []
    for location in locations:
        try:
            return location, location.read_bytes()
        except FileNotFoundError:
            tried.append(location)
    return tried[0], None


def split_buildings(buildings: Sequence[str]) -> dict[str, str]:
    """About 70 % of the buildings to train, 15 % to val and to test, at least one each.

    The order is that of the sha256 of the name, so it does not depend on how they are listed. Whole buildings,
    because two points in one building see the same room.

    Args:
        buildings: At least three.
    """
    order = sorted(buildings, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    held = max(1, round(0.15 * len(order)))
    names = ["val"] * held + ["test"] * held + ["train"] * (len(order) - 2 * held)
    return dict(zip(order, names, strict=True))


def read_splits(table: Location) -> dict[str, str]:
    """The split of each building in a CSV file; "" for one whose flags are all 0.

    Raises:
        UserError: For a file of neither form, or a building in two splits.
    """
    rows = read_table(table, ())
    columns = set(rows[0].cells)
    if {"building", "split"} <= columns:
        pairs = [(row.cells["building"], split_name(row.cells["split"]), row) for row in rows]
    elif {"id", *SPLITS} <= columns:
        pairs = [(row.cells["id"], _flagged(row), row) for row in rows]
    else:
        raise UserError(
            f"not a split file: its columns are {', '.join(rows[0].cells)}",
            where=str(table),
            remedy="use the columns building,split or id,train,val,test",
        )
    splits: dict[str, str] = {}
    for building, split, row in pairs:
        if split is None or splits.get(building, split) != split:
            raise UserError(
                f"building {building!r} in line {row.line} has no one split",
                where=str(table),
                remedy="give each building one of train, val, test",
            )
        splits[building] = split
    return splits


def _flagged(row: Row) -> str | None:
    flags = [row.cells[split] for split in SPLITS]
    if set(flags) - {"0", "1"} or flags.count("1") > 1:
        return None
    return SPLITS[flags.index("1")] if "1" in flags else ""


def _read_depth(image: Image.Image, name: str, size: int) -> np.ndarray:
    # nearest: an average of a depth and of 65535 ("nothing there") would be neither
    return resize_ids(sixteen_bit(image, name), size)


def _read_response(image: Image.Image, name: str, size: int) -> np.ndarray:
    values = sixteen_bit(image, name)
    return values if values.shape == (size, size) else to_integers(resize_numbers(values, size), np.uint16)


def _read_normal(image: Image.Image, name: str, size: int) -> np.ndarray:
    """Averages of unit vectors are shorter than one, so they are stretched again."""
    values = np.asarray(rgb(image, name))
    if values.shape[:2] == (size, size):
        return values
    vectors = resize_numbers(values, size) / 127.5 - 1
    length = np.linalg.norm(vectors, axis=2, keepdims=True)
    # (127, 127, 127) is "no surface": its tiny vector has no direction and must not get one
    vectors = np.where(length > 0.5, vectors / np.maximum(length, 0.5), vectors)
    return to_integers((vectors + 1) * 127.5, np.uint8)


def _read_classes(image: Image.Image, name: str, size: int) -> np.ndarray:
    if len(image.getbands()) != 1:
        raise BadSampleError(f"expected one channel of class ids, got {image.mode}: {name}")
    ids = np.asarray(image)
    if ids.max() >= len(CLASSES):
        raise BadSampleError(f"class id {ids.max()}, the highest there is is {len(CLASSES) - 1}: {name}")
    return resize_ids(ids.astype(np.uint8), size)


_READERS: Mapping[str, Callable[[Image.Image, str, int], np.ndarray]] = {
    "depth_zbuffer": _read_depth,
    "normal": _read_normal,
    "segment_semantic": _read_classes,
    "keypoints2d": _read_response,
    "edge_texture": _read_response,
}
