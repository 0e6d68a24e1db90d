"""What each training worker does: data, search, results. It runs inside Ray Train."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmtg_core import checkpoint
from dmtg_core.context import Save, newest_whole
from dmtg_core.metrics import Metrics, normalized_gain
from dmtg_core.network import GroupModel
from dmtg_core.search import SearchResult, search
from dmtg_core.tasks import Task
from dmtg_core.training import NonFiniteLossError
from dmtg_core.warm_start import WarmStart
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.ingest import Reader, open_data
from pipelines.storage import Location, finite

FAILURE = "failure.json"  # why the workers gave up, where another try would end the same way
CHECKPOINTS, CHECKPOINT = "checkpoints", "checkpoint_"
METRICS, GATE, GROUPING, RESULT, MODELS = "metrics.jsonl", "gate.jsonl", "grouping.json", "result.json", "models"


@dataclass(frozen=True)
class Job:
    """Everything a worker needs, sent to it whole.

    Args:
        held: References to the tables of each split in shared memory; None to stream.
        notes: Warnings to keep beside the result, such as tasks with thin support.
        start: Names and places of the models to start from, kept in the run folder.
    """

    config: Config
    reader: Reader
    held: Mapping[str, Any] | None
    run: Location
    notes: tuple[str, ...] = ()
    start: tuple[tuple[str, Location], ...] = ()


class RayContext:
    """`TrainContext` on Ray Train: data-parallel workers, checkpoints in the run folder.

    Rank 0 also writes the figures of every epoch into the run folder, where the driver and anyone else can follow.
    """

    def __init__(self, run: Location) -> None:
        import ray.train
        import ray.train.torch

        own = ray.train.get_context()
        self.rank: int = own.get_world_rank()
        self.world_size: int = own.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self.run = run
        self.records = _read_lines(run / METRICS) if self.rank == 0 else []
        held = self._checkpoints()
        self.number = int(held[-1].name.split("_")[1]) if held else 0  # of the newest checkpoint

    def prepare(self, module: nn.Module) -> nn.Module:
        """On the device, under DDP when there are several workers."""
        import ray.train.torch

        # running statistics are averaged once an epoch, not sent around at every step
        accepted = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
        prepared: nn.Module = ray.train.torch.prepare_model(module, parallel_strategy_kwargs={option: False})
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

        if self.rank != 0:
            ray.train.report({})
            return
        folder = Path(tempfile.mkdtemp(prefix="dmtg-"))
        save(folder)
        checkpoint.seal(folder)
        self.number += 1
        ray.train.report(
            {key: record[key] for key in ("stage", "epoch", "val_score")} if record else {},
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=f"{CHECKPOINT}{self.number:08d}_{uuid.uuid4().hex[:6]}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
        if record is not None:
            self._write(dict(record))

    def _write(self, record: dict[str, Any]) -> None:
        """Add a record; what an interrupted run had written beyond its checkpoint is replaced."""
        record["time"] = time.time()
        key = (record["stage"], record["epoch"])
        self.records = [r for r in self.records if (r["stage"], r["epoch"]) != key] + [record]
        gate = [
            {k: r[k] for k in ("stage", "epoch", "phase", "temperature", "probabilities")} for r in self.records
        ]
        plain = [{k: v for k, v in r.items() if k != "probabilities"} for r in self.records]
        _write_lines(self.run / GATE, gate)
        _write_lines(self.run / METRICS, plain)

    def latest(self) -> Path | None:
        """See `TrainContext.latest`.

        The folder is asked and not Ray Train, which knows neither damage nor a checkpoint that was written just
        before the workers were lost.
        """
        try:
            return newest_whole(self._fetch(place) for place in reversed(self._checkpoints()))
        except ValueError as error:
            raise UserError(
                str(error), where=str(self.run / CHECKPOINTS), remedy="delete them to train anew from the start"
            ) from error

    def _checkpoints(self) -> list[Location]:
        held = self.run / CHECKPOINTS
        return [held / name for name in held.folders() if name.startswith(CHECKPOINT)]

    def _fetch(self, place: Location) -> Path:
        """A checkpoint as a local folder."""
        folder = Path(tempfile.mkdtemp(prefix="dmtg-"))
        for name in place.files():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((place / name).read_bytes())
        return folder


def _read_lines(file: Location) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    gate = {(g["stage"], g["epoch"]): g["probabilities"] for g in read_jsonl(file.parent / GATE)}
    return [r | {"probabilities": gate[r["stage"], r["epoch"]]} for r in read_jsonl(file)]


def read_jsonl(file: Location) -> list[dict[str, Any]]:
    """The objects of a file with one on every line; empty where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _write_lines(file: Location, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(finite(record), allow_nan=False) + "\n" for record in records))


def work(values: dict[str, Any]) -> None:
    """The training function of Ray Train."""
    job: Job = values["job"]
    config = job.config
    torch.set_num_threads(_threads(config))
    context = RayContext(job.run)
    data = open_data(
        job.reader, job.held, config.data, seed=config.train.seed,
        rank=context.rank, world_size=context.world_size, device=context.device,
    )  # fmt: skip
    tasks = job.reader.tasks
    spec = config.network_spec(job.reader.manifest.description.input, tasks)
    splits = [split for split in ("val", "test") if job.reader.manifest.rows(split)]
    try:
        result = search(
            spec, data, config.settings(), starts=config.search.starts, baseline=config.search.baseline,
            splits=splits, context=context, warm_start=warm_start(job.start),
        )  # fmt: skip
    except NonFiniteLossError as error:
        # raised, it would make Ray Train start the workers again, only to meet the same numbers
        if context.rank == 0:
            problem, _, remedy = str(error).partition(": ")
            failure = UserError(problem, where=f"{job.run} (the last good checkpoint stays)", remedy=remedy)
            (job.run / FAILURE).write_json(failure.to_dict())
        return
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU ran out of memory: {str(error).splitlines()[0]}",
            where="training worker",
            remedy="lower train.batch_size, or set train.precision=bf16",
        ) from error
    if context.rank == 0:
        write_result(job.run, result, job.notes)


def warm_start(places: Sequence[tuple[str, Location]]) -> WarmStart | None:
    """The models at some places, by their names; None where there are no places.

    Raises:
        UserError: When one of them is damaged.
    """
    if not places:
        return None
    return WarmStart([read_model(place) for _, place in places], [name for name, _ in places])


def _threads(config: Config) -> int:
    """Each local worker gets its share of the machine's cores."""
    return max((os.cpu_count() or 1) // config.ray.workers, 1)


def _gains(tasks: Sequence[Task], metrics: Metrics, baseline: Metrics) -> dict[str, float]:
    """The gain over naive MTL in per cent: of errors, and the published forms, of scores and of losses."""
    return {
        "error": normalized_gain(tasks, metrics, baseline),
        "score": normalized_gain(tasks, metrics, baseline, form="score"),
        "loss": normalized_gain(tasks, metrics, baseline, metric="loss"),
    }


def write_model(place: Location, model: GroupModel) -> None:
    """One group's model into a folder anywhere."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_model(Path(folder), model)
        for file in sorted(Path(folder).iterdir()):
            (place / file.name).write_bytes(file.read_bytes())


def read_model(place: Location) -> GroupModel:
    """What `write_model` wrote.

    Raises:
        UserError: When a file is missing or damaged, or it is no group's model.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in place.files(recursive=False):
            (Path(folder) / name).write_bytes((place / name).read_bytes())
        try:
            return checkpoint.load_model(Path(folder))
        except ValueError as error:
            raise UserError(
                str(error).replace(folder, str(place)),
                where=str(place),
                remedy="give a folder models/group_<k> of a run that dmtg train has finished",
            ) from error


def write_result(run: Location, result: SearchResult, notes: Sequence[str] = ()) -> None:
    """Group models, grouping and figures into the run folder; the result comes last and says that all is there."""
    for name, model in result.network.specialise().items():
        write_model(run / MODELS / name, model)
    (run / GROUPING).write_text(result.grouping.to_json())
    split = "test" if "test" in result.metrics else "val"
    tasks = result.network.tasks
    gains = _gains(tasks, result.metrics[split], result.baseline[split]) if result.baseline else {}
    (run / RESULT).write_json(
        {
            "grouping": result.grouping.to_dict(),
            "grouping_name": result.grouping.name,
            "split": split,
            "metrics": result.metrics[split],
            "baseline": result.baseline.get(split, {}),
            "normalized_gain": gains.get("error"),
            "gains": gains,
            "validation": result.metrics.get("val", {}),
            "starts": result.starts,
            "headline": {task.name: task.metric for task in tasks},
            "notes": list(notes),
        }
    )
