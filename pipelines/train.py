"""`dmtg train`: checks, shards, Ray Train, registry and report, each step taken up where a call before left it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from dmtg_core.network import GroupingNetwork
from dmtg_core.tasks import Task
from dmtg_core.warm_start import WarmStart
from pipelines import statistics
from pipelines.cluster import session, user_error
from pipelines.config import Config, checked
from pipelines.errors import UserError
from pipelines.ingest import Reader, keeps_in_memory, load_splits
from pipelines.manifest import Manifest, check_shards, check_targets
from pipelines.registry import Registered, register
from pipelines.shards import ensure_shards
from pipelines.storage import Location, locate
from pipelines.tracking import Tracker, enabled, open_tracker
from pipelines.warm_start import Held, explained, fairness_notes, keep_models, open_models
from pipelines.worker import CHECKPOINTS, FAILURE, GATE, GROUPING, METRICS, RESULT, Job, read_jsonl, work

CONFIG, REPORT, REGISTERED = "config.yaml", "report.html", "models.json"
POLL_S = 1.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a finished run gave.

    Args:
        run: The run folder.
        run_id: MLflow run; empty without tracking.
        result: The run's `result.json`.
        models: What was registered.
        resumed: Whether the run had been finished before and was only read.
    """

    run: Location
    run_id: str
    result: dict[str, Any]
    models: list[Registered]
    resumed: bool

    @property
    def report(self) -> Location:
        """The report page."""
        return self.run / REPORT


def train(config: Config, say: Callable[[str], None] = log.info) -> Trained:
    """Run a configuration to its end, from wherever an earlier call with the same configuration got to.

    Raises:
        UserError: For anything that stands in the way, before training starts where that can be known.
    """
    run = locate(config.run.root) / config.run_name()
    run.check_writable()
    if (run / CONFIG).exists() and checked(
        Config, yaml.safe_load((run / CONFIG).read_text())
    ).digest() != config.digest():
        raise UserError(
            "this run folder belongs to another configuration",
            where=str(run / CONFIG),
            remedy="give another run.name, or leave it out: the name then follows from the configuration",
            wrong_use=True,
        )
    config.settings()  # its numbers are checked here, not in a worker
    models = open_models(config, run)
    with session_if_needed(config):
        manifest = ensure_shards(config, say)
        folder = locate(config.data.shards)
        tasks = check_all(config, manifest, folder, models, say)
        notes = support_notes(manifest, tasks, config.data.min_support)
        for note in notes:
            say(f"note: {note}")
        tracker = open_tracker(config, run, manifest)
        finished = (run / RESULT).exists()
        if finished:
            say(f"this run is finished: {run} (another run.name trains anew)")
        else:
            (run / CONFIG).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
            reader = Reader(folder, manifest, tasks)
            start = keep_models(models, run)
            notes += fairness_notes(config, start)
            with following(run, tracker, say):
                _run_workers(config, reader, run, notes, start, say)
    return _close(config, run, tracker, manifest, say, finished)


@contextmanager
def session_if_needed(config: Config) -> Iterator[None]:
    """No cluster for a run that is finished."""
    run = locate(config.run.root) / config.run_name()
    if (run / RESULT).exists():
        yield
        return
    with session(config.ray):
        yield


def check_all(
    config: Config,
    manifest: Manifest,
    folder: Location,
    models: WarmStart | None = None,
    say: Callable[[str], None] = log.info,
) -> tuple[Task, ...]:
    """Everything about data and network that can be known before a worker starts; the chosen tasks.

    Args:
        models: What the network is to start from.

    Raises:
        UserError: For the first thing that is wrong.
    """
    tasks = manifest.tasks(config.data.tasks, str(folder))
    check_targets(manifest, tasks, str(folder))
    check_shards(folder, manifest, checksums=config.data.verify_checksums)
    try:
        spec = config.network_spec(manifest.description.input, tasks)
        GroupingNetwork(spec)
    except ValueError as error:
        raise UserError(
            str(error), where="network", remedy="correct the network section", wrong_use=True
        ) from error
    if models is not None:
        with explained():
            models.check(spec)
        for note in models.notes(spec):
            say(note)
    return tasks


def support_notes(manifest: Manifest, tasks: Sequence[Task], least: int) -> list[str]:
    """A line for each task whose figures rest on few labels, and how many."""
    notes = []
    for task in tasks:
        for split in ("train", "val", "test"):
            sums = manifest.sums.get(split, {}).get(task.name)
            thin = statistics.thin_support(task, sums, least) if sums and sums["rows"] else ""
            if thin:
                notes.append(f"task {task.name} has too little support in {split} to judge it: {thin}")
                break
    return notes


def _run_workers(
    config: Config, reader: Reader, run: Location, notes: Sequence[str], start: Held, say: Callable[[str], None]
) -> None:
    import ray.train
    import ray.train.torch

    memory = keeps_in_memory(reader, config.data)
    held = load_splits(reader) if memory else None
    say(f"training on {config.ray.workers} workers, samples {'in shared memory' if memory else 'streamed'}")
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config={"job": Job(config, reader, held, run, tuple(notes), start)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.ray.workers,
            use_gpu=config.ray.gpus_per_worker > 0,
            resources_per_worker={"CPU": config.ray.cpus_per_worker}
            | ({"GPU": config.ray.gpus_per_worker} if config.ray.gpus_per_worker else {}),
        ),
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if config.ray.gpus_per_worker else "gloo", timeout_s=config.ray.timeout_s
        ),
        run_config=ray.train.RunConfig(
            # the same name in the same place is how Ray Train finds the checkpoint to go on from
            name=CHECKPOINTS,
            storage_path=run.path,
            storage_filesystem=run.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.ray.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    (run / FAILURE).delete()
    try:
        trainer.fit()
    except Exception as error:
        raise _explained(error, run) from error
    if (run / FAILURE).exists():
        raise UserError(**(run / FAILURE).read_json())


def _explained(error: Exception, run: Location) -> Exception:
    found = user_error(error)
    if found is not None:
        return found
    text = str(error)
    last = [line for line in text.splitlines() if line.strip()]
    return UserError(
        f"training failed: {last[-1].strip() if last else type(error).__name__}",
        where=str(run),
        remedy="run the same command again to go on from the last checkpoint; --debug shows where it failed",
    )


@contextmanager
def following(run: Location, tracker: Tracker, say: Callable[[str], None]) -> Iterator[None]:
    """Print and track the figures of every epoch while workers write them into the run folder."""
    told = {(r["stage"], r["epoch"]) for r in read_jsonl(run / METRICS)}
    if told:
        say(f"going on from the last checkpoint; {len(told)} epochs were done before")
    stop = threading.Event()

    def once() -> None:
        gate = {(g["stage"], g["epoch"]): g for g in read_jsonl(run / GATE)}
        for record in read_jsonl(run / METRICS):
            key = (record["stage"], record["epoch"])
            if key not in told and key in gate:
                told.add(key)
                say(epoch_line(record, gate[key]["probabilities"]))
                tracker.record(record)

    def loop() -> None:
        while not stop.wait(POLL_S):
            once()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        tracker.fail()
        raise
    finally:
        stop.set()
        thread.join()
        once()


def epoch_line(record: dict[str, Any], probabilities: list[list[float]]) -> str:
    """One epoch in one line: stage, losses, and the groups as they stand with the least certain task's share."""
    tasks = list(record["val"])
    line = f"{record['stage']:>10} epoch {record['epoch']:>3}  score {_short(record['val_score'])}"
    line += f"  {record['samples_per_second']:.0f} samples/s, {record['data_share']:.0%} waiting for data"
    if len(probabilities[0]) == 1:
        return line
    groups: dict[int, list[str]] = {}
    for task, row in zip(tasks, probabilities, strict=True):
        groups.setdefault(int(np.argmax(row)), []).append(task)
    sure = min(max(row) for row in probabilities)
    shown = " | ".join(", ".join(members) for members in groups.values())
    return f"{line}  {record['heads']} heads  least sure {sure:.0%}  {_clip(shown, 100)}"


def _short(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _close(
    config: Config,
    run: Location,
    tracker: Tracker,
    manifest: Manifest,
    say: Callable[[str], None],
    finished: bool,
) -> Trained:
    """Registry and report. What an earlier call has done is read, not repeated."""
    from pipelines.report import write_report

    result = (run / RESULT).read_json()
    models: list[Registered] = []
    if (run / REGISTERED).exists():
        models = [Registered(**entry) for entry in (run / REGISTERED).read_json()]
    elif config.track.register_models and enabled(config.track):
        say("registering the grouping and its group models")
        example = stored_example(locate(config.data.shards), manifest)
        models = register(config, run, tracker.run_id, manifest, example, result)
        (run / REGISTERED).write_json([vars(model) for model in models])
    if not (run / REPORT).exists():
        write_report(run)
        files = {name: (run / name).read_text() for name in (REPORT, GROUPING, CONFIG)}
        tracker.finish(result, files)
    return Trained(run, tracker.run_id, result, models, finished)


def stored_example(folder: Location, manifest: Manifest, rows: int = 2) -> np.ndarray:
    """The first stored inputs of the training split."""
    import pyarrow.parquet as pq

    first = next(shard for shard in manifest.shards["train"] if shard.rows >= rows)
    with (folder / first.file).filesystem.open_input_file((folder / first.file).path) as file:
        table = pq.ParquetFile(file).read_row_group(0, columns=["input"]).slice(0, rows)
    spec = manifest.description.input
    values = [np.frombuffer(value.as_py(), np.dtype(spec.dtype).newbyteorder("<")) for value in table["input"]]
    return np.stack(values).reshape(len(values), *spec.shape).astype(spec.dtype)
