"""The training loop's view of Ray Train, and of the run folder: what it writes there never stops it."""

from __future__ import annotations

import inspect
import json
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dmtg_core.training.checkpoint import read_json
from dmtg_core.training.context import Save
from pipelines.runs.events import RESIZED, RESUMED, UNWRITTEN, Emit
from pipelines.runs.files import CHECKPOINTS, GATE, METRICS
from pipelines.runs.writer import BackgroundWriter, PendingWrite
from pipelines.storage import PATIENCE_S, Location, finite
from pipelines.training.ray.checkpoints import Checkpoints
from pipelines.training.ray.failures import PermanentError
from pipelines.training.ray.watchdog import STACKS, Scratch, Watchdog

CLOSING_S = 5.0  # no longer: Ray ends the process
PROGRESS = "progress.json"  # in a checkpoint: the records of all epochs before it, and how many workers wrote it


class RayContext:
    """`TrainContext` on Ray Train: data-parallel workers, checkpoints in the run folder.

    Rank 0 also writes the figures of every epoch into the run folder, where the driver and anyone else can follow.

    Args:
        run: The run folder.
        tell: Hears what the user should know.
        hung_after_s: See `Watchdog`.
    """

    def __init__(self, run: Location, emit: Emit, hung_after_s: float = 0) -> None:
        import ray.train
        import ray.train.torch

        own = ray.train.get_context()
        self.rank: int = own.get_world_rank()
        self.world_size: int = own.get_world_size()
        self.local_world_size: int = own.get_local_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self.run, self.emit = run, emit
        self.records: list[dict[str, Any]] = []
        self.scratch = Scratch(run, emit)
        self.watchdog = Watchdog(hung_after_s, self.scratch.path / STACKS)
        self.checkpoints = Checkpoints(run / CHECKPOINTS, self.scratch.path, emit)
        self.writer = BackgroundWriter(emit)

    def prepare(self, module: nn.Module) -> nn.Module:
        """On the device, under DDP when there are several workers."""
        import ray.train.torch

        self.checkpoints.forget()  # what was fetched has been read
        # running statistics are averaged once an epoch, not sent around at every step
        accepted = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
        # the same heads take part in every step until the next pruning, which wraps anew
        options = {option: False, "static_graph": True, "gradient_as_bucket_view": True}
        prepared: nn.Module = ray.train.torch.prepare_model(module, parallel_strategy_kwargs=options)
        return prepared

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the workers."""
        if self.world_size > 1:
            tensor = tensor.clone()
            torch.distributed.all_reduce(tensor)
        return tensor

    def report(self, record: Mapping[str, Any] | None, save: Save) -> None:
        """Checkpoint to the run folder, while training goes on; then the figures of an epoch, if there are any."""
        import ray.train

        self.watchdog.progress()
        if self.rank == 0:
            if record is not None:
                self.records.append(dict(record) | {"time": time.time()})
            self._checkpoint(save)
            if record is not None:
                self._figures()
        if record is not None:  # for Ray's own pages
            ray.train.report({key: record[key] for key in ("stage", "epoch", "val_score")})

    def _checkpoint(self, save: Save) -> None:
        name = self.checkpoints.next_name()
        folder = self.scratch.path / name
        remove = partial(shutil.rmtree, folder, ignore_errors=True)
        try:
            folder.mkdir()
            save(folder)
            progress = {"workers": self.world_size, "records": finite(self.records)}
            (folder / PROGRESS).write_text(json.dumps(progress, allow_nan=False))
        except (OSError, SafetensorError) as error:
            remove()
            self.emit(UNWRITTEN, f"{name} is lost, training goes on ({error} at {self.scratch.path.parent})")
            return
        self.writer.put("the checkpoint", PendingWrite(partial(self.checkpoints.add, folder), remove))

    def _figures(self) -> None:
        """The records as files, the gate's probabilities apart; they come first, for a reader wants both."""
        keys = ("stage", "epoch", "phase", "temperature", "probabilities")
        gate = [{key: record[key] for key in keys} for record in self.records]
        plain = [{k: v for k, v in record.items() if k != "probabilities"} for record in self.records]
        for name, records in ((GATE, gate), (METRICS, plain)):
            text = "".join(json.dumps(finite(record), allow_nan=False) + "\n" for record in records)
            self.writer.put(name, PendingWrite(partial((self.run / name).retrying(0).write_text, text)))

    def latest(self) -> Path | None:
        """See `TrainContext.latest`.

        Rank 0 chooses, for a worker that was given up could still be writing while the others look.
        """
        from ray.train.collective import broadcast_from_rank_zero

        found = self._newest() if self.rank == 0 else None
        name = broadcast_from_rank_zero(self.checkpoints.whole[-1] if found else None)
        if name is None or self.rank == 0:
            return found
        return self.checkpoints.fetch_whole(name)

    def _newest(self) -> Path | None:
        try:
            found = self.checkpoints.newest()
            if found is None:
                return None
            progress = read_json(found / PROGRESS, "records", "workers")
        except ValueError as error:
            raise PermanentError(
                str(error), where=str(self.checkpoints.folder), remedy="delete them to train anew from the start"
            ) from error
        self.records = progress["records"]
        self._figures()  # the checkpoint was written first
        self._resumed(self.checkpoints.whole[-1], progress["workers"])
        return found

    def _resumed(self, name: str, before: int) -> None:
        last = self.records[-1] if self.records else None
        after = f" after epoch {last['epoch']} of {last['stage']}" if last else ""
        workers = f"{self.world_size} worker{'s' * (self.world_size > 1)}"
        if before != self.world_size:
            self.emit(RESIZED, f"going on from {name}{after} with {workers} (it was written by {before})")
        else:
            self.emit(RESUMED, f"going on from {name}{after} with {workers}")

    def flush(self) -> bool:
        """Wait until the last checkpoint is in the run folder, and no longer than for any other file."""
        self.watchdog.progress()
        return self.writer.flush(PATIENCE_S)

    def close(self) -> None:
        """Leave nothing behind on this machine."""
        self.watchdog.close()
        self.writer.flush(CLOSING_S)  # the others may have been lost while it was being written
        self.writer.close()
        self.scratch.close()
