"""`TrainContext` of a run, and of a task of the executor. A write that fails does not stop training."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmtg_core.training.checkpoint import read_json, write_json
from dmtg_core.training.context import LocalContext, Save
from pipelines.errors import UserError
from pipelines.runs.checkpoints import Checkpoints
from pipelines.runs.events import RESIZED, RESUMED, UNWRITTEN, Emit
from pipelines.runs.files import CHECKPOINTS, GATE, METRICS
from pipelines.runs.writer import BackgroundWriter, PendingWrite
from pipelines.scratch import STACKS
from pipelines.storage import PATIENCE_S, Location, finite
from pipelines.training.failures import PermanentError
from pipelines.training.watchdog import Watchdog, worker_scratch

CLOSING_S = 5.0  # on Ray, the process is ended then
PROGRESS = "progress.json"  # in a checkpoint: what a context stores of the training before it
SPACING = 20  # least time from one checkpoint of a task to the next, in times that writing one takes


class RecordTexts:
    """The records of all epochs as JSON. Each record is encoded once, because a long run has many."""

    def __init__(self, records: Sequence[Mapping[str, Any]] = ()) -> None:
        self.whole: list[str] = []
        self.lines: dict[str, list[str]] = {GATE: [], METRICS: []}
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Add the record of an epoch."""
        gate = {key: record[key] for key in ("stage", "epoch", "phase", "temperature", "probabilities")}
        plain = {key: value for key, value in record.items() if key != "probabilities"}
        self.whole.append(_encoded(record))
        self.lines[GATE].append(_encoded(gate) + "\n")
        self.lines[METRICS].append(_encoded(plain) + "\n")


def _damaged(error: ValueError, checkpoints: Checkpoints) -> PermanentError:
    remedy = "delete them to train again from the start"
    return PermanentError(str(error), where=str(checkpoints.folder), remedy=remedy)


def _encoded(record: Mapping[str, Any]) -> str:
    return json.dumps(finite(record), allow_nan=False)


class RunContext:
    """`TrainContext` of one process, with checkpoints in the run folder. `RayContext` is that of several workers.

    Rank 0 also writes the metrics of every epoch into the run folder.

    Args:
        run: The run folder.
        emit: Emits an event of the run.
        hung_after_s: See `Watchdog`.
        device: Device of the training.
        on_record: Called with the record of every epoch, after it has been given to the writer.
    """

    rank = 0
    world_size = local_world_size = 1

    def __init__(
        self,
        run: Location,
        emit: Emit,
        hung_after_s: float = 0,
        device: torch.device | None = None,
        on_record: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.run, self.emit, self.on_record = run, emit, on_record
        self.device = device or torch.device("cpu")
        self.records: list[dict[str, Any]] = []
        self.texts = RecordTexts()
        self.scratch = worker_scratch(run, emit)
        self.watchdog = Watchdog(hung_after_s, self.scratch.path / STACKS)
        self.checkpoints = Checkpoints(run / CHECKPOINTS, self.scratch.path, emit)
        self.writer = BackgroundWriter(emit)
        self.checkpoint_seconds: float | None = None  # of the last whole checkpoint, from its start

    def prepare(self, module: nn.Module) -> nn.Module:
        """Move a module to the device."""
        self.checkpoints.forget()  # the fetched checkpoint has been read
        return module.to(self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the workers."""
        return tensor

    def report(self, record: Mapping[str, Any] | None, save: Save) -> None:
        """Write a checkpoint, and the metrics of an epoch if it has ended, in the background."""
        self.watchdog.progress()
        if self.rank == 0:
            if record is not None:
                self.records.append(dict(record) | self._figures())
                self.texts.add(self.records[-1])
            self._checkpoint(save)
            if record is not None:
                self._write_metrics()
        if record is not None and self.on_record is not None:
            self.on_record(self.records[-1] if self.rank == 0 else record)

    def _figures(self) -> dict[str, Any]:
        """The figures of this process at the end of an epoch."""
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return {"time": time.time(), "gpu_memory": memory, "checkpoint_seconds": self.checkpoint_seconds}

    def checkpoint_due(self) -> bool:
        """See `TrainContext.checkpoint_due`: never, but on Ray."""
        return False

    def _checkpoint(self, save: Save) -> None:
        name, started = self.checkpoints.next_name(), time.monotonic()
        folder = self.scratch.path / name
        remove = partial(shutil.rmtree, folder, ignore_errors=True)
        try:
            folder.mkdir()
            save(folder)
            records = ", ".join(self.texts.whole)
            (folder / PROGRESS).write_text(f'{{"workers": {self.world_size}, "records": [{records}]}}')
        except OSError as error:
            remove()
            self.emit(UNWRITTEN, f"{name} is lost, training continues ({error} at {self.scratch.path.parent})")
            return
        self.writer.put("the checkpoint", PendingWrite(partial(self._add, folder, started), remove))

    def _add(self, folder: Path, started: float) -> None:
        self.checkpoints.add(folder)
        self.checkpoint_seconds = time.monotonic() - started

    def _write_metrics(self) -> None:
        """Write the records: the gate's probabilities, then the metrics, as a reader of metrics needs both."""
        for name, lines in self.texts.lines.items():
            text = "".join(lines)
            self.writer.put(name, PendingWrite(partial((self.run / name).retrying(0).write_text, text)))

    def latest(self) -> Path | None:
        """See `TrainContext.latest`."""
        return self._newest()

    def _newest(self) -> Path | None:
        try:
            found = self.checkpoints.newest()
            if found is None:
                return None
            progress = read_json(found / PROGRESS, "records", "workers")
        except ValueError as error:
            raise _damaged(error, self.checkpoints) from error
        self.records = progress["records"]
        self.texts = RecordTexts(self.records)
        self._write_metrics()  # the checkpoint may have been written before them
        self._emit_resumed(self.checkpoints.whole[-1], progress["workers"])
        return found

    def _emit_resumed(self, name: str, before: int) -> None:
        last = self.records[-1] if self.records else None
        after = f" after epoch {last['epoch']} of {last['stage']}" if last else ""
        workers = f"{self.world_size} worker{'s' * (self.world_size > 1)}"
        if before != self.world_size:
            self.emit(RESIZED, f"resuming from {name}{after} with {workers} (it was written by {before})")
        else:
            self.emit(RESUMED, f"resuming from {name}{after} with {workers}")

    def flush(self) -> bool:
        """Wait until the last checkpoint is in the run folder, at most `PATIENCE_S`; whether it is."""
        self.watchdog.progress()
        return self.writer.flush(PATIENCE_S)

    def close(self) -> None:
        """Stop the threads and remove the local folder."""
        self.watchdog.close()
        self.writer.flush(CLOSING_S)  # other workers may have been lost while the checkpoint was being written
        self.writer.close()
        self.scratch.close()


class TaskContext(LocalContext):
    """`TrainContext` of a task of the executor: one process, with checkpoints in a folder.

    Args:
        folder: Folder of the checkpoints.
        scratch: Local folder for temporary files.
        emit: Called if a checkpoint is damaged or could not be written.
        every_s: Least seconds between two checkpoints, which are written within epochs too. It is longer if
            writing takes more than a twentieth of it. With 0 there is one after each epoch.
    """

    def __init__(self, folder: Location, scratch: Path, emit: Emit, every_s: float = 0) -> None:
        super().__init__()
        self.scratch, self.emit, self.every_s = scratch, emit, every_s
        self.checkpoints = Checkpoints(folder, scratch, emit)
        self.started = time.monotonic()
        self.due = self.started + every_s
        self.before = 0.0  # seconds of training before the checkpoint from which it resumed

    def checkpoint_due(self) -> bool:
        """See `TrainContext.checkpoint_due`."""
        return bool(self.every_s) and time.monotonic() >= self.due

    def report(self, record: Mapping[str, Any] | None, save: Save) -> None:
        """Write a checkpoint, if it is time for one."""
        del record  # the state that is saved has it
        if self.every_s and not self.checkpoint_due():
            return
        local, began = self.scratch / self.checkpoints.next_name(), time.monotonic()
        try:
            local.mkdir()
            save(local)
            write_json(local / PROGRESS, {"seconds": self.before + began - self.started})
            self.checkpoints.add(local)
        except (OSError, UserError) as error:
            self.emit(UNWRITTEN, f"{local.name} is lost, training continues ({error})")
        finally:
            shutil.rmtree(local, ignore_errors=True)
            now = time.monotonic()
            self.due = now + max(self.every_s, SPACING * (now - began))

    def latest(self) -> Path | None:
        """See `TrainContext.latest`.

        Raises:
            PermanentError: If there are checkpoints and all of them are damaged.
        """
        try:
            found = self.checkpoints.newest()
        except ValueError as error:
            raise _damaged(error, self.checkpoints) from error
        if found is not None and (found / PROGRESS).exists():  # earlier versions wrote none
            self.before = read_json(found / PROGRESS, "seconds")["seconds"]
        return found
