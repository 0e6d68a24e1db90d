"""A source: a class that lists the samples of a raw format and reads them."""

import io
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field

from dmtg_core import InputSpec, Task
from pipelines.config.validation import Section, checked
from pipelines.data.sources.base import INPUT, Column, Description, Entry
from pipelines.storage import Location


class ArrayOptions(Section):
    """Options of the source, the keys of `source.options`."""

    loss: str = Field("", description="Loss of the tasks that are numbers.")
    metric: str = Field("", description="Headline metric of the tasks that are numbers.")


class ArraySource:
    """An `.npz` file with the array `features`, `(rows, F)`, and an array `(rows,)` for each task.

    Arrays of floats are regression tasks, with NaN for a missing label. Other arrays are 0 and 1.
    """

    options_model = ArrayOptions

    def __init__(self, root: Location, options: Mapping[str, Any]) -> None:
        self.root = root
        self.options = checked(ArrayOptions, options, "source.options")

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the file."""
        with np.load(io.BytesIO(self.root.read_bytes())) as held:
            return dict(held)

    def raw(self) -> list[Location]:
        """The files that are read."""
        return [self.root]

    def describe(self) -> Description:
        """The columns of every row."""
        features = self.arrays["features"]
        mean, std = features.mean(0), features.std(0)
        spec = InputSpec("features", features.shape[1:], mean=tuple(mean.tolist()), std=tuple(std.tolist()))
        tasks = tuple(self._task(name, values) for name, values in self._labels())
        columns = {INPUT: Column("float32", features.shape[1:])}
        columns |= {f"task.{task.name}": Column("uint8" if task.kind == "binary" else "float32") for task in tasks}
        return Description(spec, tasks, columns)

    def _labels(self) -> list[tuple[str, np.ndarray]]:
        return [(name, values) for name, values in self.arrays.items() if name != "features"]

    def _task(self, name: str, values: np.ndarray) -> Task:
        if values.dtype.kind != "f":
            return Task(name, "binary")
        offset, scale = float(np.nanmean(values)), float(np.nanstd(values))
        loss, metric = self.options.loss, self.options.metric
        return Task(name, "regression", loss=loss, metric=metric, offset=(offset,), scale=(scale,))

    def entries(self) -> Iterator[Entry]:
        """All samples: of ten rows, seven are for training and two for validation."""
        for row in range(len(self.arrays["features"])):
            split = "train" if row % 10 < 7 else "val" if row % 10 < 9 else "test"
            yield Entry(f"row_{row}", split, {"row": row})

    def read(self, entry: Entry) -> dict[str, np.ndarray | None]:
        """All columns of a sample; None is a missing label."""
        row = entry.fields["row"]
        found: dict[str, np.ndarray | None] = {INPUT: self.arrays["features"][row].astype(np.float32)}
        for name, values in self._labels():
            number = values.dtype.kind == "f"
            missing = number and np.isnan(values[row])
            found[f"task.{name}"] = (
                None if missing else np.asarray(values[row], np.float32 if number else np.uint8)
            )
        return found
