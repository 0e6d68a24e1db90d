"""Base of the readers of photographs with labels in columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field

from pipelines.data.sources.base import INPUT, BadSampleError, Description, Entry
from pipelines.data.sources.columns import Replayed, RowsOf
from pipelines.data.sources.images import decode_image, read_problem
from pipelines.data.sources.labelled_images.options import ImageOptions
from pipelines.data.sources.labels import LabelTask, Target, label_targets
from pipelines.storage import Location


class LabelledOptions(ImageOptions):
    """How photographs are stored, and the tasks.

    `val_share` of the training samples are for validation, by the hash of their ids: for a data set without a
    split for it.
    """

    val_share: float = Field(0.0, ge=0, lt=1)
    tasks: tuple[LabelTask, ...] = Field(min_length=1)


class LabelledImages(ABC):
    """Samples of a photograph and labels in columns. Subclasses list the samples and read the bytes of an image.

    A pickled reader does not carry the samples: a worker receives them with its entries.
    """

    _options: LabelledOptions
    _where: Location

    @abstractmethod
    def _listed(self, first: bool) -> Iterator[Entry]:
        """All samples; their fields are `row` (a `Row` with the cells of the labels) and those of `_image`."""

    @abstractmethod
    def _image(self, entry: Entry) -> tuple[bytes | None, str]:
        """The bytes of the image, None if there is none, and its name for a message."""

    @cached_property
    def _samples(self) -> Replayed[Entry]:
        return Replayed(self._listed)

    @cached_property
    def _targets(self) -> tuple[Target, ...]:
        # cached, because a pickled reader carries it and its workers need not read the labels
        return label_targets(self._label_tasks, RowsOf(self._samples), str(self._where))

    @property
    def _label_tasks(self) -> tuple[LabelTask, ...]:
        return self._options.tasks

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_samples"}

    def describe(self) -> Description:
        """The image and one number for each task. Reads classes and statistics from all labels."""
        return self._options.description(self._targets)

    def entries(self) -> Iterator[Entry]:
        """One sample for each row that is not dropped, in the order of the files.

        Raises:
            UserError: For a missing column, an empty id, an unknown split, and a file that cannot be read.
        """
        return iter(self._samples)

    def read(self, entry: Entry) -> dict[str, np.ndarray | None]:
        """The image and the labels of one sample.

        Raises:
            BadSampleError: For an image that is missing or damaged, and for a label that does not fit its task.
        """
        row = entry.fields["row"]
        if row.problem:
            raise BadSampleError(row.problem)
        values: Mapping[str, np.ndarray | None] = {f"task.{t.task.name}": t.value(row) for t in self._targets}
        try:
            data, name = self._image(entry)
        except (FileNotFoundError, PermissionError) as error:
            raise BadSampleError(f"cannot open the image of {entry.id}: {read_problem(error)}") from error
        if not data:
            raise BadSampleError(f"no image in {name}")
        return {INPUT: self._options.stored(decode_image(data, name), name), **values}
