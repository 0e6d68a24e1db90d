"""`TrainContext` on Ray Train: data-parallel workers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero
from torch import Tensor, nn

from pipelines.runs.events import Emit
from pipelines.storage import Location
from pipelines.training.context import RunContext


class RayContext(RunContext):
    """The context of a worker of Ray Train; see `RunContext`."""

    def __init__(self, run: Location, emit: Emit, hung_after_s: float = 0) -> None:
        own = ray.train.get_context()
        self.rank: int = own.get_world_rank()
        self.world_size: int = own.get_world_size()
        self.local_world_size: int = own.get_local_world_size()
        super().__init__(run, emit, hung_after_s, ray.train.torch.get_device(), _for_dashboard)

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
