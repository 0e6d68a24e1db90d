"""Where a training loop runs: the loop sees this small object and nothing of what is behind it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dmtg_core.names import by_number
from dmtg_core.training.checkpoint import check_seal, seal

log = logging.getLogger(__name__)
Save = Callable[[Path], None]


class TrainContext(Protocol):
    """One worker's view of the run."""

    rank: int
    world_size: int
    device: torch.device

    def prepare(self, module: nn.Module) -> nn.Module:
        """Move to the device and wrap for data-parallel training."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, on every worker."""
        ...

    def report(self, record: Mapping[str, Any] | None, save: Save) -> None:
        """Hand over the figures of an epoch, and a function that writes the checkpoint into an empty folder.

        Every worker calls it; only one needs to write. In the middle of an epoch there are no figures.
        """
        ...

    def latest(self) -> Path | None:
        """The newest whole checkpoint, if there is any.

        Raises:
            ValueError: When there are checkpoints and all of them are damaged.
        """
        ...


def gather(tensor: Tensor, context: TrainContext) -> list[Tensor]:
    """The tensors of all workers, `(m,)` of any length, in the order of the ranks, on every worker."""
    lengths = torch.zeros(context.world_size, dtype=torch.int64, device=tensor.device)
    lengths[context.rank] = len(tensor)
    sizes = context.sum(lengths).tolist()
    # each worker fills its own place: a sum is all that a context has to offer
    places = [torch.zeros(size, dtype=tensor.dtype, device=tensor.device) for size in sizes]
    places[context.rank] = tensor
    return list(context.sum(torch.cat(places)).split(sizes))


def newest_whole(folders: Iterable[Path], on_damaged: Callable[[str], None] | None = None) -> Path | None:
    """The first of some checkpoints that is what was written, None where there are none.

    Args:
        folders: The newest one first.
        passed_over: Called with what is wrong with each one before it; by default it is logged.

    Raises:
        ValueError: When there are some and all are damaged.
    """
    problems = []
    for folder in folders:
        try:
            check_seal(folder)
        except ValueError as error:
            problems.append(str(error))
            if on_damaged is not None:
                on_damaged(str(error))
            else:
                log.warning("going back to the checkpoint before: %s", error)
            continue
        return folder
    if problems:
        raise ValueError(f"no checkpoint is whole: {'; '.join(problems)}")
    return None


class LocalContext:
    """One process, no cluster.

    Args:
        folder: Where checkpoints go; without it none is written.
        device: Where to train; by default the GPU if there is one.
        keep: How many checkpoints stay.
        on_record: Called with the figures of every epoch.
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        folder: Path | None = None,
        *,
        device: torch.device | str | None = None,
        keep: int = 2,
        on_record: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.folder = folder
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.keep = keep
        self.on_record = on_record

    def prepare(self, module: nn.Module) -> nn.Module:
        """Move to the device."""
        return module.to(self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def report(self, record: Mapping[str, Any] | None, save: Save) -> None:
        """Write the checkpoint beside its place, then move it there whole."""
        if self.on_record is not None and record is not None:
            self.on_record(record)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self._checkpoints()
        number = int(done[-1].name.split("_")[1]) + 1 if done else 0
        part = self.folder / ".part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        save(part)
        seal(part)
        part.rename(self.folder / f"checkpoint_{number:06d}")
        for old in self._checkpoints()[: -self.keep]:
            shutil.rmtree(old)

    def latest(self) -> Path | None:
        """See `TrainContext.latest`."""
        return newest_whole(reversed(self._checkpoints()))

    def _checkpoints(self) -> list[Path]:
        found = self.folder.glob("checkpoint_*") if self.folder is not None else ()
        return sorted(found, key=lambda place: by_number(place.name))
