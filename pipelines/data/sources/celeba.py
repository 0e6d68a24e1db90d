"""Reader of CelebA: aligned photographs of faces with 40 binary attributes.

```
root/img_align_celeba/000001.jpg     178×218; or root/Img/img_align_celeba/…
root/list_attr_celeba.txt            count, names, then `000001.jpg -1 1 …`; or root/Anno/…
root/list_eval_partition.txt         `000001.jpg 0`: 0 train, 1 validation, 2 test; or root/Eval/…
```

The licence of the data set is non-commercial and forbids redistribution, so none of it is part of this project. It
is available from its authors (mmlab.ie.cuhk.edu.hk/projects/CelebA.html) under their terms.

As in the paper, the whole aligned image is resized to a square, with its values in [0, 1] and no augmentation.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dmtg_core.input_spec import InputSpec
from dmtg_core.tasks import Task
from pipelines.config.validation import Section, checked
from pipelines.data.sources.base import INPUT, BadSampleError, Column, Description, Entry
from pipelines.data.sources.images import read_image, resize_rgb, rgb
from pipelines.data.sources.rows import SPLITS, check_root, check_unique
from pipelines.errors import UserError
from pipelines.storage import Location

logger = logging.getLogger(__name__)

ALIGNED = (178, 218)  # width and height of every aligned image
_PARTITIONS = {str(number): split for number, split in enumerate(SPLITS)}
_FLAGS = {"-1": "0", "1": "1"}
_IMAGES = ("img_align_celeba", "Img/img_align_celeba")
_ATTRIBUTES = ("list_attr_celeba.txt", "Anno/list_attr_celeba.txt")
_PARTITION = ("list_eval_partition.txt", "Eval/list_eval_partition.txt")
_LAYOUT = "img_align_celeba/<image>.jpg, list_attr_celeba.txt and list_eval_partition.txt"


class CelebaOptions(Section):
    """`attributes` are those to read, by their names in the file; images are stored `size` × `size`.

    All attributes have one `metric`, `loss` and `loss_options`.
    """

    attributes: Literal["all"] | tuple[str, ...] = Field("all", min_length=1)
    size: int = Field(64, ge=8, le=4096)
    metric: str = ""
    loss: str = ""
    loss_options: dict[str, Any] = Field(default_factory=dict)


class CelebaSource:
    """Reads CelebA as its authors distribute it. See `CelebaOptions` for the options.

    Raises:
        UserError: For a wrong option and a root that does not exist.
    """

    def __init__(self, root: Location, options: Mapping[str, Any]) -> None:
        self._options = checked(CelebaOptions, options, "source.options")
        self._root = root
        check_root(root, _LAYOUT)
        if len(set(self._asked)) < len(self._asked):
            raise UserError(
                f"an attribute is named twice: {', '.join(self._asked)}",
                where="source.options.attributes",
                remedy="name each attribute once",
                wrong_use=True,
            )

    def raw(self) -> Sequence[Location]:
        """See `Source.raw`."""
        return [_first_there(self._root, places) for places in (_ATTRIBUTES, _PARTITION, _IMAGES)]

    def describe(self) -> Description:
        """The image and one flag for each attribute. Reads the names of the attributes from their file.

        Raises:
            UserError: For an attribute that is not in the file, and for a wrong metric or loss.
        """
        size = self._options.size
        columns = {INPUT: Column("uint8", (size, size, 3))}
        columns |= {f"task.{name}": Column("uint8") for name in self._names}
        image = InputSpec("image", (size, size, 3), "uint8", (0.0,), (255.0,))
        chosen: dict[str, Any] = self._options.model_dump(include={"metric", "loss", "loss_options"})
        try:
            tasks = tuple(Task(name, "binary", **chosen) for name in self._names)
        except ValueError as error:
            raise UserError(
                str(error), where="source.options", remedy="correct the metric or the loss", wrong_use=True
            ) from error
        return Description(image, tasks, columns)

    def entries(self) -> Iterator[Entry]:
        """One sample for each row of the file of attributes, in order; no image is opened.

        Both files are held in memory: the published ones have 202,599 lines, about 60 MiB.

        Raises:
            UserError: For a missing file, a malformed row, and an image that is listed twice or has no split.
        """
        table = _first_there(self._root, _ATTRIBUTES)
        header, rows = _attribute_rows(table)
        splits = self._splits([image for image, _ in rows], table)
        self._count_unlisted(splits)
        chosen = [header.index(name) for name in self._names]
        for image, flags in rows:
            yield Entry(image, splits[image], {"flags": "".join([flags[i] for i in chosen])})

    def read(self, entry: Entry) -> dict[str, np.ndarray | None]:
        """The image and the flags of one row.

        Raises:
            BadSampleError: For an image that is missing, damaged or not of the size of the aligned images.
        """
        location = self._images / entry.id
        image = rgb(read_image(location), str(location))
        if image.size != ALIGNED:
            raise BadSampleError(
                f"{location} is {image.width}×{image.height}, an aligned image {ALIGNED[0]}×{ALIGNED[1]}"
            )
        flags = zip(self._names, entry.fields["flags"], strict=True)
        return {
            INPUT: resize_rgb(image, self._options.size),
            **{f"task.{name}": np.asarray(int(flag), np.uint8) for name, flag in flags},
        }

    @property
    def _asked(self) -> tuple[str, ...]:
        return () if self._options.attributes == "all" else self._options.attributes

    # both are cached, because a pickled reader carries them and its workers need not read the storage
    @cached_property
    def _images(self) -> Location:
        return _first_there(self._root, _IMAGES)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """The attributes to read."""
        table = _first_there(self._root, _ATTRIBUTES)
        header = _header(_lines(table), table)
        unknown = [name for name in self._asked if name not in header]
        if unknown:
            nearest = difflib.get_close_matches(unknown[0], header, n=3, cutoff=0.4) or header
            raise UserError(
                f"no attribute {', '.join(unknown)} in {table}",
                where="source.options.attributes",
                remedy=f"did you mean {', '.join(nearest)}?",
                wrong_use=True,
            )
        return self._asked or tuple(header)

    def _splits(self, images: Sequence[str], table: Location) -> dict[str, str]:
        """The split of every image that the partition lists; it must list all `images`."""
        check_unique(images, str(table))
        partition = _first_there(self._root, _PARTITION)
        splits = _read_partition(partition)
        without = [image for image in images if image not in splits]
        if without:
            raise UserError(
                f"{len(without)} images of {table.name} have no split: {', '.join(without[:5])}",
                where=str(partition),
                remedy="restore both files from the same download",
            )
        if len(splits) > len(images):
            logger.warning("%s lists %d images without attributes: left out", partition, len(splits) - len(images))
        return splits

    def _count_unlisted(self, listed: Container[str]) -> None:
        unlisted = sum(name not in listed for name in self._images.files(recursive=False))
        if unlisted:
            logger.warning("%s: %d files are in no list: left out", self._images, unlisted)


def _first_there(root: Location, places: Sequence[str]) -> Location:
    """The first of several paths that exists.

    Raises:
        UserError: When none exists; all are named.
    """
    for place in places:
        if (root / place).exists():
            return root / place
    raise UserError(
        f"no {places[0]}",
        where=str(root),
        remedy=f"move it to {' or '.join(str(root / place) for place in places)}",
    )


def _lines(location: Location) -> list[str]:
    try:
        return location.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"not a text file: {error}", where=str(location), remedy="restore the file") from error


def _read_partition(partition: Location) -> dict[str, str]:
    """The split of each image."""
    rows = [(line, text.split()) for line, text in enumerate(_lines(partition), start=1) if text.strip()]
    for line, cells in rows:
        if len(cells) != 2 or cells[1] not in _PARTITIONS:
            raise UserError(
                f"line {line} is {' '.join(cells)!r}, expected an image and 0, 1 or 2",
                where=str(partition),
                remedy="correct the line, or restore the file",
            )
    check_unique([cells[0] for _, cells in rows], str(partition))
    return {image: _PARTITIONS[number] for _, (image, number) in rows}


def _header(lines: Sequence[str], table: Location) -> list[str]:
    """The names of the attributes."""
    if len(lines) < 3 or not lines[0].strip().isdecimal():
        raise UserError(
            "not a file of attributes: it needs a line with the count of images, one with the names, and rows",
            where=str(table),
            remedy="restore list_attr_celeba.txt as its authors distribute it",
        )
    names = lines[1].split()
    check_unique(names, f"{table}, line 2")
    return names


def _attribute_rows(table: Location) -> tuple[list[str], list[tuple[str, str]]]:
    """The names of the attributes; and for every image its name and a 0 or 1 for each attribute."""
    lines = _lines(table)
    header = _header(lines, table)
    rows = [_row(line, text, header, table) for line, text in enumerate(lines[2:], start=3) if text.strip()]
    if len(rows) != int(lines[0]):
        raise UserError(
            f"line 1 says {int(lines[0])} images, the file has {len(rows)} rows",
            where=str(table),
            remedy="restore the file, or correct its first line",
        )
    return header, rows


def _row(line: int, text: str, header: Sequence[str], table: Location) -> tuple[str, str]:
    image, *cells = text.split()
    flags = "".join([_FLAGS.get(cell, "?") for cell in cells])
    if len(flags) == len(header) and "?" not in flags:
        return image, flags
    found = f"{len(cells)} cells after the image"
    if len(cells) == len(header):
        found = f"{cells[flags.index('?')]!r} for {header[flags.index('?')]}"
    raise UserError(
        f"line {line} has {found}, expected {len(header)} cells of -1 or 1",
        where=str(table),
        remedy="correct the line, or restore the file",
    )
