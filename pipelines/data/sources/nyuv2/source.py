"""Reader of NYUv2: rooms with a class, a depth and a surface normal for every pixel.

```
root/train/image/0.npy, 1.npy, …     (288, 384, 3), 0 to 1
root/train/label/0.npy, …            (288, 384), 0 to 12, and -1 for no class
root/train/depth/0.npy, …            (288, 384, 1), metres, and 0 for no measurement
root/train/normal/0.npy, …           (288, 384, 3), unit vectors, and (0, 0, 0) for no surface
root/val/…
```

or `root/train.h5`, `root/val.h5` with the datasets `image`, `label`, `depth` and `normal`, whose first axis is
that of the samples.

These are the files of Liu et al. 2019 ("End-to-End Multi-Task Learning with Attention", CVPR; repository
lorenmt/mtan) that LibMTL and others read: 795 images for training and 654 for validation. The classes are the 13
of Couprie et al. 2013. The data are those of Silberman et al. 2012. None of it is part of this project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field

from dmtg_core.tasks import Task
from pipelines.config.validation import Section, checked
from pipelines.data.sources.base import INPUT, BadSampleError, Column, Description, Entry
from pipelines.data.sources.images import image_input
from pipelines.data.sources.nyuv2.arrays import CLASSES, H5, STORED, UNKNOWN, opened_h5, read_npy
from pipelines.data.sources.rows import check_root, split_name
from pipelines.errors import UserError
from pipelines.storage import Location

TaskName = Literal["segmentation", "depth", "normal"]
FOLDERS: Mapping[str, str] = {"segmentation": "label", "depth": "depth", "normal": "normal"}
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("segmentation", "dense_classification", len(CLASSES), ignore_index=UNKNOWN, labels=CLASSES),
        Task("depth", "dense_regression", metric="mae", unit="m"),
        Task("normal", "dense_regression", 3, metric="mean_angle", flip=(-1.0, 1.0, 1.0)),
    )
}
_LAYOUT = "train/image/0.npy, train/label/0.npy, train/depth/0.npy, train/normal/0.npy, …, val/…; or train.h5, …"


class Nyuv2Options(Section):
    """`tasks` are those to read, by default all three. Images have the size of their files."""

    tasks: tuple[TaskName, ...] = Field(get_args(TaskName), min_length=1)


class Nyuv2Source:
    """Reads NYUv2. See `Nyuv2Options` for the options.

    Raises:
        UserError: For a wrong option and a root that does not exist.
    """

    def __init__(self, root: Location, options: Mapping[str, Any]) -> None:
        self._tasks = tuple(dict.fromkeys(checked(Nyuv2Options, options, "source.options").tasks))
        self._root = root
        check_root(root, _LAYOUT)

    def raw(self) -> Sequence[Location]:
        """See `Source.raw`."""
        names = ("image", *(FOLDERS[task] for task in self._tasks))
        places = [(self._root / place, place) for place, _ in self._splits]
        return [at / name for at, place in places if not place.endswith(H5) for name in names] + [
            at for at, place in places if place.endswith(H5)
        ]

    def describe(self) -> Description:
        """An image and a map for each task. Opens the first image for the size.

        Raises:
            UserError: When there is no image, or the first one cannot be read.
        """
        height, width = self._shape
        columns = {INPUT: Column("uint8", (height, width, 3))}
        for name in self._tasks:
            task = TASKS[name]
            channels = () if task.classes or task.channels == 1 else (task.channels,)
            columns[f"task.{name}"] = Column("uint8" if task.classes else "float16", (height, width, *channels))
        return Description(image_input((height, width)), tuple(TASKS[name] for name in self._tasks), columns)

    def entries(self) -> Iterator[Entry]:
        """The samples of each split, by number.

        Raises:
            UserError: When there is no folder or file of a split, or it has no images.
        """
        for place, split in self._splits:
            if place.endswith(H5):
                with opened_h5(self._root / place) as file:
                    numbers = [str(i) for i in range(len(_dataset(file, "image", self._root / place)))]
            else:
                names = (self._root / place / "image").files(recursive=False)
                numbers = [name.removesuffix(".npy") for name in names if name.endswith(".npy")]
            if not numbers:
                raise UserError("no images", where=str(self._root / place), remedy=f"expected there: {_LAYOUT}")
            name = place.partition(".")[0]
            yield from (Entry(f"{name}/{number}", split, {"place": place, "number": number}) for number in numbers)

    def read(self, entry: Entry) -> dict[str, np.ndarray | None]:
        """The image and the maps of one sample.

        Raises:
            BadSampleError: For a file that is missing or damaged, or whose values do not fit.
        """
        wanted = {INPUT: "image"} | {f"task.{name}": FOLDERS[name] for name in self._tasks}
        place, number = entry.fields["place"], entry.fields["number"]
        if place.endswith(H5):
            with opened_h5(self._root / place) as file:
                arrays = {key: _dataset(file, key, self._root / place)[int(number)] for key in wanted.values()}
        else:
            arrays = {key: read_npy(self._root / place / key / f"{number}.npy") for key in wanted.values()}
        height, width = self._shape
        for key, values in arrays.items():
            if values.shape[:2] != (height, width):
                size = "×".join(map(str, values.shape[:2]))
                raise BadSampleError(f"{key} is {size}, the first image {height}×{width}: {entry.id}")
        return {column: STORED[key](arrays[key], f"{key} of {entry.id}") for column, key in wanted.items()}

    # both are cached, because a pickled reader carries them and its workers need not read the storage
    @cached_property
    def _splits(self) -> list[tuple[str, str]]:
        """Folders, or HDF5 files, and their splits."""
        names = [*self._root.folders(), *(name for name in self._root.files(recursive=False) if name.endswith(H5))]
        found = [(name, split) for name in names if (split := split_name(name.partition(".")[0]))]
        if not found:
            raise UserError(
                "no folder or file of a split", where=str(self._root), remedy=f"expected there: {_LAYOUT}"
            )
        return found

    @cached_property
    def _shape(self) -> tuple[int, int]:
        """Height and width of the first image."""
        first = next(self.entries())
        place, number = self._root / first.fields["place"], first.fields["number"]
        if place.name.endswith(H5):
            with opened_h5(place) as file:
                shape = _dataset(file, "image", place).shape[1:]
        else:
            try:
                shape = read_npy(place / "image" / f"{number}.npy").shape
            except BadSampleError as error:
                raise UserError(str(error), where=str(place), remedy="restore the first image") from error
        return int(shape[0]), int(shape[1])


def _dataset(file: Any, key: str, where: Location) -> Any:
    if key not in file:
        raise UserError(f"no dataset {key}", where=str(where), remedy=f"expected: {', '.join(STORED)}")
    return file[key]
