"""What the cells of a comparison are trained with, and where their results are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dmtg_core.network.cost import naive_flops
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.training.context import TrainContext
from dmtg_core.training.data import Data
from dmtg_core.training.settings import TrainSettings
from pipelines.compare.cells import FORMAT, Cell, Kind, Result
from pipelines.config.loading import Config
from pipelines.data.reader import Reader
from pipelines.execution.executor import Held
from pipelines.storage import Location

CELLS = "cells"  # folder of the results


@dataclass(frozen=True)
class CellJob:
    """The input that all cells of a comparison share.

    Args:
        config: Configuration of the comparison.
        reader: Reader of what training reads: the shards, or the outputs of a frozen stem.
        held: Samples that the executor holds; None if they are streamed.
        run: Folder of the comparison.
        inputs: Reader of the shards.
    """

    config: Config
    reader: Reader
    held: Mapping[str, Sequence[Held]] | None
    run: Location
    inputs: Reader

    def samples(self, kind: Kind) -> tuple[Reader, Mapping[str, Sequence[Held]] | None]:
        """What cells of a kind are trained on. All of an encoder is trained on inputs."""
        if kind == Kind.FULL_FINETUNING and self.reader.outputs:
            return self.inputs, None
        return self.reader, self.held

    def spec(self, seed: int) -> NetworkSpec:
        """The grouping network with a seed."""
        spec = self.config.network_spec(self.reader.manifest.description.input, self.reader.tasks)
        return replace(spec, seed=seed)


@dataclass(frozen=True)
class Work:
    """What one cell is trained with: the network, data and settings of its seed, and the splits of its metrics.

    `contexts` returns the context of a training by its name, which resumes from its latest checkpoint.
    """

    cell: Cell
    spec: NetworkSpec
    data: Data
    settings: TrainSettings
    splits: Sequence[str]
    config: Config
    contexts: Callable[[str], TrainContext]

    @property
    def unit(self) -> int:
        """The operations of an epoch of naive MTL for each sample."""
        return naive_flops(self.spec)


def stored(job: CellJob, cells: Iterable[Cell]) -> dict[Cell, Result]:
    """Read the results of cells that have been written, also by earlier versions."""
    files = {cell: job.run / CELLS / f"{cell.name}.json" for cell in cells}
    return {cell: file.read_json() for cell, file in files.items() if file.exists()}


def is_current(result: Result) -> bool:
    """Whether a result has the figures of this version."""
    return result.get("format") == FORMAT
