"""Reader of the planted problem (`dmtg_core.evaluation.planted`), which is generated from its options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field

from dmtg_core.evaluation.planted import planted
from pipelines.config.validation import Section, Seed, checked
from pipelines.data.sources.base import INPUT, Column, Description, Entry
from pipelines.errors import UserError
from pipelines.storage import Location


class PlantedOptions(Section):
    """See `dmtg_core.evaluation.planted.planted`."""

    tasks: int = Field(9, ge=1)
    groups: int = Field(3, ge=1)
    features: int = Field(16, ge=2)
    rows: int = Field(4000, ge=100)
    seed: Seed = 0


class PlantedSource:
    """Tasks `task_0`, … on a vector of features; task n belongs to group n mod `groups`.

    Raises:
        UserError: For a wrong option, or options that do not fit each other.
    """

    def __init__(self, _root: Location, options: Mapping[str, Any]) -> None:
        self._options = checked(PlantedOptions, options, "source.options")

    @cached_property
    def _generated(self) -> Any:
        held = self._options.model_dump()
        try:
            return planted(held.pop("seed"), **held)
        except ValueError as error:
            raise UserError(
                str(error), where="source.options", remedy="change groups, tasks or features", wrong_use=True
            ) from error

    def raw(self) -> Sequence[Location]:
        """See `Source.raw`."""
        return ()

    def describe(self) -> Description:
        """Features and a flag for each task."""
        spec, tasks, _, _ = self._generated
        columns = {INPUT: Column("float32", spec.shape)} | {f"task.{task.name}": Column("uint8") for task in tasks}
        return Description(spec, tasks, columns)

    def entries(self) -> Iterator[Entry]:
        """All rows."""
        _, _, splits, _ = self._generated
        for split, arrays in splits.items():
            yield from (Entry(f"{split}_{row}", split, {"row": row}) for row in range(len(arrays)))

    def read(self, entry: Entry) -> dict[str, np.ndarray | None]:
        """One row."""
        _, tasks, splits, _ = self._generated
        arrays, row = splits[entry.split], entry.fields["row"]
        found: dict[str, np.ndarray | None] = {INPUT: arrays.inputs[row]}
        return found | {f"task.{task.name}": arrays.labels[task.name][row] for task in tasks}
