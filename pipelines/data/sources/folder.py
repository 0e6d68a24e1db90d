"""Reader of a folder of images with a CSV file of labels.

```
root/labels.csv        image,label,kids,split
root/images/<image>.jpg
```

A task reads one column. An empty cell is a missing label. Rows with a value in the `drop` of a task are left out
of the data set. Any other row whose image or label cannot be used is a bad sample with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from pipelines.config.validation import checked
from pipelines.data.sources.base import INPUT, Description, Entry
from pipelines.data.sources.columns import Replayed, RowsOf
from pipelines.data.sources.images import fitted, read_image, rgb
from pipelines.data.sources.labelled_images.options import ImageOptions
from pipelines.data.sources.labels import (
    LabelTask,
    Target,
    kept_rows,
    label_markers,
    label_targets,
    without_markers,
)
from pipelines.data.sources.row_splits import SplitOptions
from pipelines.data.sources.rows import (
    Dialect,
    DialectOptions,
    Row,
    check_root,
    read_rows,
    table_dialect,
    with_ids,
)
from pipelines.storage import Location

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class FolderOptions(ImageOptions, SplitOptions):
    """Paths of images and labels below the root, and the tasks.

    `suffix` is added to an id without an extension. Images are stored `size` × `size`: `resize` is "pad" (the
    whole image with its aspect ratio, on mid-grey, which is near zero after normalisation), "crop" (the central
    square) or "stretch" (the whole image, without its aspect ratio). Without a split column, the split follows
    from the hash of the id, or of the column `split_by`: all rows with the same value of it are in one split.
    `labels` is a table of text or Parquet; `dialect` says how it is written.

    `preprocessing` names a model of `timm`: mean and std of the input are those of the model, and so are, unless
    they are set, `size`, `interpolation` and `crop_share`, with `resize: crop`. `crop_share` is the side of the
    part that "crop" keeps ÷ the shorter side of the image.
    """

    labels: str = "labels.csv"
    images: str = "images"
    image_column: str = "image"
    suffix: str = ".jpg"
    dialect: DialectOptions = DialectOptions()
    tasks: tuple[LabelTask, ...] = Field(min_length=1)


class FolderSource:
    """Reads an image folder with a CSV file of labels. See `FolderOptions` for the options.

    Raises:
        UserError: For a wrong option, and for a root or a folder of images that does not exist.
    """

    def __init__(self, root: Location, options: Mapping[str, Any]) -> None:
        self._options = checked(FolderOptions, options, "source.options")
        self._root = root
        layout = f"{self._options.labels} and the folder {self._options.images}/"
        check_root(root, layout)
        check_root(root / self._options.images, "the images")

    def raw(self) -> Sequence[Location]:
        """See `Source.raw`."""
        return (self._table, self._root / self._options.images)

    def describe(self) -> Description:
        """The image and one number for each task. Reads classes and statistics from the CSV file."""
        return self._options.description(self._targets)

    def entries(self) -> Iterator[Entry]:
        """One sample for each row that is not dropped, in the order of the file.

        Raises:
            UserError: For a missing column, an id that is empty, an unknown split.
        """
        return iter(self._samples)

    def read(self, entry: Entry) -> dict[str, np.ndarray | None]:
        """The image and the labels of one row.

        Raises:
            BadSampleError: For an image that is missing or damaged, and for a label that does not fit its task.
        """
        values = {f"task.{t.task.name}": t.value(entry.fields["row"]) for t in self._targets}
        location = self._root / self._options.images / entry.fields["file"]
        return {INPUT: self._options.stored(read_image(location), str(location)), **values}

    def __getstate__(self) -> dict[str, Any]:
        # a worker receives its rows with their entries
        return {name: value for name, value in vars(self).items() if name != "_samples"}

    @property
    def _table(self) -> Location:
        return self._root / self._options.labels

    @cached_property
    def _samples(self) -> Replayed[Entry]:
        return Replayed(self._listed)

    def _needed(self) -> list[str]:
        """The columns that the options name; they are required."""
        options = self._options
        tasks = (task.column for task in options.tasks)
        return list(dict.fromkeys((options.image_column, *tasks, *options.split_columns)))

    @cached_property
    def _dialect(self) -> Dialect:
        return table_dialect(self._table, self._options.dialect, columns=self._needed(), log=True)

    def _listed(self, first: bool) -> Iterator[Entry]:
        options, where = self._options, str(self._table)
        words = [name for name in (options.image_column, options.split_by) if name is not None]
        rows = read_rows(self._table, self._needed(), dialect=self._dialect, words=words)
        rows = without_markers(rows, label_markers(options.tasks))
        named = with_ids(rows, options.image_column, "", where)
        for row, name in kept_rows(named, options.tasks, where, log=first):
            has_extension = PurePosixPath(name).suffix.lower() in EXTENSIONS
            cells = {task.column: row.cells[task.column] for task in options.tasks}
            file = name if has_extension else name + options.suffix
            split = options.split_of(row, name, where)
            yield Entry(name, split, {"file": file, "row": Row(row.line, cells)})

    @cached_property
    def _targets(self) -> tuple[Target, ...]:
        # cached, because a pickled reader carries it and its workers need not read the table
        return label_targets(self._options.tasks, RowsOf(self._samples), str(self._table))


def stored_image(location: Location, **form: Any) -> np.ndarray:
    """An image file as uint8 (size, size, 3), in RGB; `form` has the other arguments of `fitted_image`.

    Raises:
        BadSampleError: For an image that is missing or damaged.
    """
    return fitted_image(read_image(location), str(location), **form)


def fitted_image(
    image: Image.Image, name: str, *, size: int, how: str, interpolation: str = "bilinear", share: float = 1.0
) -> np.ndarray:
    """An image as uint8 (size, size, 3), in RGB.

    Args:
        image: The image.
        name: Its name, for a message.
        size: Height and width.
        how: "pad", "crop" or "stretch"; see `FolderOptions`.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        share: Side of the part that "crop" keeps ÷ the shorter side of the image.

    Raises:
        BadSampleError: For an image whose colours cannot be converted.
    """
    return fitted(rgb(image, name), size, how, interpolation=interpolation, share=share)
