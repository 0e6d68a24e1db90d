"""`TrainContext`: the interface of a training loop to its worker, `LocalContext` for one process, collectives."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

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
        """Report the metrics of an epoch, and a function that writes the checkpoint into an empty folder.

        All workers call it. Only one needs to write. In the middle of an epoch `record` is None.
        """
        ...

    def checkpoint_due(self) -> bool:
        """Whether a checkpoint is written after this step, such as before a machine is taken away.

        All workers call it after the same steps and get the same answer.
        """
        ...

    def latest(self) -> Path | None:
        """Return the newest intact checkpoint, or None if there is no checkpoint.

        Raises:
            ValueError: If there are checkpoints and all of them are damaged.
        """
        ...


def gather(tensor: Tensor, context: TrainContext) -> list[Tensor]:
    """Return the tensors of all workers, `(m,)` of any length, in the order of the ranks, on every worker."""
    lengths = torch.zeros(context.world_size, dtype=torch.int64, device=tensor.device)
    lengths[context.rank] = len(tensor)
    sizes = context.sum(lengths).tolist()
    # each worker fills its own place: the only collective of a context is a sum
    places = [torch.zeros(size, dtype=tensor.dtype, device=tensor.device) for size in sizes]
    places[context.rank] = tensor
    return list(context.sum(torch.cat(places)).split(sizes))


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.SyncBatchNorm` for workers on CPUs, on which data-parallel training refuses torch's layer."""

    @classmethod
    def convert(cls, module: nn.Module, device: torch.device) -> None:
        """Let all batch normalisations in `module` use the batches of all workers."""
        if device.type != "cpu":
            nn.SyncBatchNorm.convert_sync_batchnorm(module)
            return
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                layer.__class__ = cls

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept vectors, sequences, maps and volumes."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, …)` to the same shape, normalised over the batches of all workers."""
        if not self.training or not torch.distributed.is_initialized():
            return super().forward(x)
        over = [d for d in range(x.dim()) if d != 1]
        shape = (1, -1, *[1] * (x.dim() - 2))
        local = torch.cat([x.sum(over), x.new_tensor([x.numel() / x.shape[1]])])
        *_, count = total = all_reduce(local)
        mean = total[:-1] / count  # (C,)
        centred = x - mean.view(shape)
        variance = all_reduce(centred.square().sum(over)) / count
        self._track(mean.detach(), (variance * count / (count - 1)).detach())
        scale = torch.rsqrt(variance + self.eps)
        found = centred * (scale if self.weight is None else scale * self.weight).view(shape)
        return found if self.bias is None else found + self.bias.view(shape)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics; without a momentum they are plain means, as in torch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        factor = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(variance, factor)


def newest_whole(folders: Iterable[Path], on_damaged: Callable[[str], None] | None = None) -> Path | None:
    """Return the first intact checkpoint, or None if there is no checkpoint.

    Args:
        folders: Checkpoints, the newest first.
        on_damaged: Called with the error of each damaged checkpoint before it. By default the error is logged.

    Raises:
        ValueError: If there are checkpoints and all are damaged.
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
                log.warning("skipped a damaged checkpoint: %s", error)
            continue
        return folder
    if problems:
        raise ValueError(f"no checkpoint is whole: {'; '.join(problems)}")
    return None


class LocalContext:
    """The context of a single process without a cluster.

    Args:
        folder: Folder of the checkpoints. Without a folder no checkpoint is written.
        device: Device of the training. The default is the GPU if there is one.
        keep: Number of checkpoints to keep.
        on_record: Called with the metrics of each epoch.
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
        """Return the tensor itself."""
        return tensor

    def report(self, record: Mapping[str, Any] | None, save: Save) -> None:
        """Write the checkpoint into a temporary folder, then rename the folder."""
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

    def checkpoint_due(self) -> bool:
        """Never."""
        return False

    def latest(self) -> Path | None:
        """See `TrainContext.latest`."""
        return newest_whole(reversed(self._checkpoints()))

    def _checkpoints(self) -> list[Path]:
        found = self.folder.glob("checkpoint_*") if self.folder is not None else ()
        return sorted(found, key=lambda place: by_number(place.name))
