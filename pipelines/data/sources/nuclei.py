"""Reader of nuclei: microscope images with an id map of their nuclei, and four tasks from this annotation.

```
root/labels.csv            image,n_nuclei_128,split, ...
root/images/<image>.png    8-bit RGB
root/masks/<image>.png     16-bit, one channel: 0 = background, any other value = one nucleus
```

The id map is first resized to the training resolution by nearest neighbour, so every task is exact there:

* `mask`: whether a pixel is inside a nucleus.
* `boundary`: pixels of a nucleus with a pixel above, below, left or right that is not of this nucleus. Where two
  nuclei touch, both sides are boundary.
* `distance`: Euclidean distance of a pixel's centre to the nearest pixel centre that is not of its nucleus, in
  pixels of the training resolution; 0 in the background and 1 at a boundary pixel.
* `count`: number of nuclei, from the column `n_nuclei_128`. It is not transformed, so that a prediction is a
count;
  the smooth L1 loss handles the long tail (median 27, maximum 375).

Pixels beyond the frame of the image are unknown: they count neither as nucleus nor as background.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field
from scipy import ndimage

from dmtg_core.tasks import Task
from pipelines.config.validation import Section, checked
from pipelines.data.sources.base import INPUT, BadSampleError, Column, Description, Entry
from pipelines.data.sources.images import (
    image_input,
    read_image,
    resize_ids,
    resize_rgb,
    rgb,
    sixteen_bit,
)
from pipelines.data.sources.rows import check_root, read_rows, split_name, with_ids
from pipelines.errors import UserError
from pipelines.storage import Location

_COUNT = "n_nuclei_128"

# Mean .20 and standard deviation .59 over all train pixels at 64 × 64, background included; lengths in pixels
# grow with the resolution.
_DISTANCE_OFFSET, _DISTANCE_SCALE = 0.2 / 64, 0.6 / 64


class NucleiOptions(Section):
    """Images and maps are stored `size` × `size`; the data set was created without the aspect ratio."""

    size: int = Field(64, ge=8, le=4096)


class NucleiSource:
    """Reads the nuclei data set. See `NucleiOptions` for the options.

    Raises:
        UserError: For a wrong option and a root that does not exist.
    """

    def __init__(self, root: Location, options: Mapping[str, Any]) -> None:
        self._size = checked(NucleiOptions, options, "source.options").size
        self._root = root
        check_root(root, "labels.csv, images/<image>.png and masks/<image>.png")

    def raw(self) -> Sequence[Location]:
        """See `Source.raw`."""
        return [self._root / name for name in ("labels.csv", "images", "masks")]

    def describe(self) -> Description:
        """An image, three maps and a count. Reads labels.csv for the statistics of the count."""
        size = self._size
        offset, scale = self._count_statistics
        tasks = (
            Task("mask", "dense_classification", 2, labels=("background", "nucleus")),
            Task("boundary", "dense_classification", 2, labels=("elsewhere", "boundary")),
            Task(
                "distance",
                "dense_regression",
                loss="mse",  # most pixels are 0, and L1 would learn their median, which is 0 everywhere
                offset=(_DISTANCE_OFFSET * size,),
                scale=(_DISTANCE_SCALE * size,),
                unit="pixels",
            ),
            Task("count", "regression", loss="smooth_l1", offset=(offset,), scale=(scale,), unit="nuclei"),
        )
        columns = {
            INPUT: Column("uint8", (size, size, 3)),
            "task.mask": Column("uint8", (size, size)),
            "task.boundary": Column("uint8", (size, size)),
            "task.distance": Column("float16", (size, size)),
            "task.count": Column("float32"),
        }
        return Description(image_input(size), tasks, columns)

    def entries(self) -> Iterator[Entry]:
        """The rows of labels.csv, in order.

        Raises:
            UserError: For a missing column, an empty id, an unknown split.
        """
        table = self._root / "labels.csv"
        for row, name in with_ids(read_rows(table, ("image", "split", _COUNT)), "image", "", str(table)):
            split = split_name(row.cells["split"])
            if split is None:
                raise UserError(
                    f"unknown split {row.cells['split']!r} in line {row.line}",
                    where=str(table),
                    remedy="use train, val or test",
                )
            yield Entry(name, split, {"count": row.cells[_COUNT], "line": row.line})

    def read(self, entry: Entry) -> dict[str, np.ndarray | None]:
        """The image and its four targets.

        Raises:
            BadSampleError: For an image or mask that is missing, damaged or of another depth, for different sizes
                of both, and for a cell that is not a count.
        """
        image_at = self._root / "images" / f"{entry.id}.png"
        mask_at = self._root / "masks" / f"{entry.id}.png"
        image = rgb(read_image(image_at), str(image_at))
        ids = sixteen_bit(read_image(mask_at), str(mask_at))
        if ids.shape != (image.height, image.width):
            raise BadSampleError(
                f"{mask_at} is {ids.shape[1]}×{ids.shape[0]}, its image {image.width}×{image.height}"
            )
        ids = resize_ids(ids, self._size)
        if ids.min() == ids.max() != 0:
            raise BadSampleError(f"one nucleus covers the whole image: {mask_at}")
        return {
            INPUT: resize_rgb(image, self._size),
            "task.mask": (ids > 0).astype(np.uint8),
            "task.boundary": boundary(ids),
            "task.distance": distance(ids),
            "task.count": _count(entry),
        }

    @cached_property
    def _count_statistics(self) -> tuple[float, float]:
        """Mean and standard deviation over the train rows, whose counts are held in memory: 8 bytes each."""
        train = (entry.fields["count"] for entry in self.entries() if entry.split == "train")
        counts = np.fromiter((float(count) for count in train if count.isdecimal()), np.float64)
        if not counts.size:
            raise UserError(
                f"no count in the train rows of column {_COUNT}",
                where=str(self._root / "labels.csv"),
                remedy="restore the file",
            )
        return float(np.mean(counts)), float(np.std(counts)) or 1.0


def _count(entry: Entry) -> np.ndarray | None:
    count = entry.fields["count"]
    if not count:
        return None
    if not count.isdecimal():
        raise BadSampleError(f"{count!r} in column {_COUNT}, line {entry.fields['line']}, is not a count")
    return np.asarray(int(count), np.float32)


def boundary(ids: np.ndarray) -> np.ndarray:
    """Pixels of a nucleus that have a 4-neighbour of another id or of the background.

    Args:
        ids: (H, W), 0 = background.

    Returns:
        uint8 (H, W), 1 = boundary.
    """
    edge = np.zeros(ids.shape, bool)
    for axis in (0, 1):
        changes = np.diff(ids.astype(np.int32), axis=axis) != 0
        before, after = [(0, 0), (0, 0)], [(0, 0), (0, 0)]
        before[axis], after[axis] = (1, 0), (0, 1)
        edge |= np.pad(changes, before) | np.pad(changes, after)
    return (edge & (ids > 0)).astype(np.uint8)


def distance(ids: np.ndarray) -> np.ndarray:
    """Distance of each pixel of a nucleus to the nearest pixel that is not of this nucleus.

    Each nucleus is measured separately, because a transform of the whole foreground would cross touching nuclei.

    Args:
        ids: (H, W), 0 = background; not all of one nucleus.

    Returns:
        float16 (H, W), 0 in the background.
    """
    result = np.zeros(ids.shape, np.float16)
    for nucleus, found in enumerate(ndimage.find_objects(ids.astype(np.int32)), start=1):
        if found is None:
            continue  # ids may have gaps
        # one more pixel on each side: the nearest outside pixel is never farther away
        window = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in found)
        inside = ids[window] == nucleus
        result[window][inside] = ndimage.distance_transform_edt(inside)[inside]
    return result
