"""`TrainContext` on Ray Train: data-parallel workers."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero
from torch import Tensor, nn

from dmtg_core.training.context import Save
from pipelines.runs.events import DRAINED, Emit
from pipelines.storage import Location
from pipelines.training.context import RunContext

CHECK_S = 1.0  # between two checks for a drained machine, which are a message to an actor and a barrier
STORED_S = 60.0  # longest time to store the checkpoint before a machine is taken away


class DrainedError(Exception):
    """The machine of a worker is about to be taken away, and the checkpoint is in the run folder."""


class RayContext(RunContext):
    """The context of a worker of Ray Train; see `RunContext`."""

    def __init__(self, run: Location, emit: Emit, hung_after_s: float = 0) -> None:
        own = ray.train.get_context()
        self.rank: int = own.get_world_rank()
        self.world_size: int = own.get_world_size()
        self.local_world_size: int = own.get_local_world_size()
        super().__init__(run, emit, hung_after_s, ray.train.torch.get_device(), _for_dashboard)
        self.drained: list[int] = []  # ranks of the workers whose machines are being drained
        self.steps = self.every = 1  # steps left until the next check, and between the last two
        self.checked = time.monotonic()

    def prepare(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, and wrap it in DDP if there are several workers."""
        self.checkpoints.forget()  # the fetched checkpoint has been read
        # running statistics are averaged once an epoch, not synchronised at every step
        accepted = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
        # every step uses the same heads until the next pruning, after which the module is wrapped again
        options = {option: False, "static_graph": True, "gradient_as_bucket_view": True}
        prepared: nn.Module = ray.train.torch.prepare_model(module, parallel_strategy_kwargs=options)
        return prepared

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the workers."""
        if self.world_size > 1:
            tensor = tensor.clone()
            torch.distributed.all_reduce(tensor)
        return tensor

    def checkpoint_due(self) -> bool:
        """See `TrainContext.checkpoint_due`: when a machine of the workers is being drained.

        All workers check after the same step. How many steps follow until the next check is the choice of rank 0.
        """
        self.steps -= 1
        if self.steps > 0:
            return False
        info = ray.train.get_preemption_info()
        self.steps = self.every = broadcast_from_rank_zero(self._steps_until_next_check())
        self.checked = time.monotonic()
        self.drained = info.preempted_ranks if info is not None else []
        return bool(self.drained)

    def _steps_until_next_check(self) -> int:
        """The number of steps in `CHECK_S`, by the time since the last check; at most twice as many as before."""
        seconds = (time.monotonic() - self.checked) / self.every
        return max(min(round(CHECK_S / max(seconds, 1e-6)), 2 * self.every), 1)

    def report(self, record: Mapping[str, Any] | None, save: Save) -> None:
        """See `TrainContext.report`; ends the training if a machine is being drained.

        Raises:
            DrainedError: On all workers, when the checkpoint is in the run folder. If it is not, training goes on.
        """
        super().report(record, save)
        if self.drained and broadcast_from_rank_zero(self.rank > 0 or self.writer.flush(STORED_S)):
            if self.rank == 0:
                ranks = ", ".join(map(str, self.drained))
                self.emit(
                    DRAINED, f"the machine of worker {ranks} is being taken away; training resumes elsewhere"
                )
            raise DrainedError
        self.drained = []

    def latest(self) -> Path | None:
        """See `TrainContext.latest`.

        Rank 0 chooses: a worker of an earlier attempt could still be writing while the others search.
        """
        found = super().latest() if self.rank == 0 else None
        name = broadcast_from_rank_zero(self.checkpoints.whole[-1] if found else None)
        if name is None or self.rank == 0:
            return found
        return self.checkpoints.fetch_whole(name)


def _for_dashboard(record: Mapping[str, Any]) -> None:
    ray.train.report({key: record[key] for key in ("stage", "epoch", "val_score")})
