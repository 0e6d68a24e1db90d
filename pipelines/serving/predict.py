"""`dmtg predict`: predictions for every sample of a split, as one Parquet file for each shard.

Embedded, the command predicts the shards itself. On Ray it is a Ray Data job: the driver loads the model and sends
it to the actors, which may not be able to access the registry. A file depends only on model and shard. It is
written as a whole, followed by a note. A job that is resumed keeps each file that has a note and writes the other
files. `_predictions.json` is written last. It describes the columns; see `pipelines.serving.columns`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dmtg_core.network.composite import Composite
from dmtg_core.network.grouping_network import GroupModel
from pipelines.config.code import allow_named
from pipelines.config.loading import Config
from pipelines.data.manifest import SPLITS, Manifest, Shard, check_shards, read_manifest
from pipelines.data.reader import Reader
from pipelines.data.renewal import stale_notes
from pipelines.data.shard_folder import PARTS
from pipelines.data.sources.base import INPUT
from pipelines.errors import UserError
from pipelines.execution.choice import open_executor
from pipelines.execution.executor import Executor, Held
from pipelines.runs.folders import check_folder
from pipelines.runs.lease import only_one
from pipelines.scratch import temporary_folder
from pipelines.serving.columns import ID, arrays_of, check_names, described, schema
from pipelines.serving.fitting import Served, check_input, open_model, same_tasks
from pipelines.storage import Location, locate

PREDICTIONS, PLAN = "_predictions.json", "_plan.json"
FORMAT = 1
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predicted:
    """The result of `predict`: rows, files, the number of files that were kept, the folder, and the columns."""

    rows: int
    files: int
    kept: int
    out: Location
    tasks: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """The input of an actor besides the model.

    Args:
        reader: Reader of the input only; its manifest lists no shards.
        out: The folder for the files.
        plan: Digest of model and data.
        batch_size: Samples in a batch.
        checksums: Whether to compare every shard with its checksum.
        gpu: Whether a GPU is reserved.
    """

    reader: Reader
    out: Location
    plan: str
    batch_size: int
    checksums: bool
    gpu: bool


def predict(
    config: Config, model: str, out: str, split: str = "test", log: Callable[[str], None] = logger.info,
    *, trust_code: bool = False,
) -> Predicted:  # fmt: skip
    """Predict every sample of a split; complete files are kept.

    Args:
        config: Names the shards; its `ray` section has the number and resources of the workers.
        model: `models:/…` address or a run folder.
        out: Folder for the files, local or in object storage.
        split: train, val, test or all.
        trust_code: As `pipelines.registry.models.load_registered`.

    Raises:
        UserError: When model and shards do not fit, or the folder has other contents.
    """
    folder, place = locate(config.data.shards), locate(out)
    manifest = read_manifest(folder)
    chosen = _chosen(manifest, split, folder)
    check_shards(folder, chosen, checksums=False)
    for note in stale_notes(config, manifest):
        log(f"note: {note}")
    allow_named(config.model_dump())
    served = open_model(model, config.track, trust_code=trust_code or config.run.trust_code)
    check_fits(served, manifest, folder)
    check_folder(place, "--out", "predictions", (place / PLAN).exists)
    place.check_writable()
    about = {
        "format": FORMAT,
        "model": {"given": model, "address": served.address, "digest": served.digest},
        "data": {"shards": str(folder), "digest": manifest.digest(), "split": split},
    }
    with only_one(place, f"job that predicts into {place}", log):
        return _predict(config, served, manifest, chosen, place, about, log)


def _predict(
    config: Config,
    served: Served,
    manifest: Manifest,
    chosen: Manifest,
    place: Location,
    about: dict[str, Any],
    log: Callable[[str], None],
) -> Predicted:
    folder, plan = locate(config.data.shards), _claim(place, about)
    shards = [shard for held in chosen.shards.values() for shard in held if shard.rows]
    parts = {shard.file: part for shard in shards if (part := _finished(place, shard, plan))}
    todo = [shard for shard in shards if shard.file not in parts]
    kept = len(parts)
    log(f"{sum(s.rows for s in shards)} samples in {len(shards)} shards: {kept} are predicted, {len(todo)} to do")
    if todo:
        reader = Reader(folder, replace(manifest, shards={}, sums={}, source={}), ())
        job = Job(
            reader, place, plan, config.train.batch_size, config.data.verify_checksums,
            config.ray.gpus_per_worker > 0 or config.ray.workers == "auto",
        )  # fmt: skip
        with open_executor(config.ray) as executor, closing(_run(job, served, todo, executor)) as written:
            for done, part in enumerate(written, start=1):
                parts[part["file"]] = part
                log(f"shard {done}/{len(todo)}: {part['file']}, {part['rows']} samples")
    files = [{k: v for k, v in parts[shard.file].items() if k != "plan"} for shard in shards]
    rows = sum(part["rows"] for part in files)
    tasks = described(served.tasks, manifest.description.input.shape)
    (place / PREDICTIONS).write_json(about | {"tasks": tasks, "rows": rows, "files": files})
    return Predicted(rows, len(files), kept, place, tasks)


def _chosen(manifest: Manifest, split: str, folder: Location) -> Manifest:
    """The manifest with only the shards of the chosen splits."""
    if split not in (*SPLITS, "all"):
        raise UserError(
            f"there is no split {split!r}",
            where="--split",
            remedy=f"use {', '.join(SPLITS)} or all",
            wrong_use=True,
        )
    names = [name for name in SPLITS if split in (name, "all") and manifest.rows(name)]
    if not names:
        raise UserError(
            f"the shards have no samples in split {split!r}", where=str(folder), remedy="use another split"
        )
    return replace(manifest, shards={name: manifest.shards[name] for name in names})


def check_fits(served: Served, manifest: Manifest, folder: Location) -> None:
    """Check that the shards have the input and the tasks of the model, and that all columns have different names.

    Raises:
        UserError: With what differs, or the columns.
    """
    found = manifest.description
    for model in served.groups.values():
        check_input(model.spec.input, served.preparation, found.input, found.preparation, str(folder))
        same_tasks(model.tasks, found.tasks, str(folder))
    check_names((task for task, _ in served.tasks.values()), ID, served.address)


def _claim(place: Location, about: Mapping[str, Any]) -> str:
    """Write the plan of the folder before any other file; its digest.

    Raises:
        UserError: When the folder has other contents.
    """
    mine = _identity(about)
    file = place / PLAN
    if file.exists():
        held = file.read_json()
        if _identity(held) != mine:
            raise UserError(
                f"this folder has predictions of {_described(held)}, not of {_described(about)}",
                where=str(place),
                remedy="give another --out, or delete the folder",
                wrong_use=True,
            )
        return mine
    file.write_json(about)
    return mine


def _described(about: Mapping[str, Any]) -> str:
    model, data = about["model"], about["data"]
    return f"{model['address']} ({model['digest']}) on {data['split']} of {data['shards']} ({data['digest']})"


def _identity(about: Mapping[str, Any]) -> str:
    parts = [about["format"], about["model"]["digest"], about["data"]["digest"], about["data"]["split"]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _finished(place: Location, shard: Shard, plan: str) -> dict[str, Any] | None:
    """The note of a complete file of this plan; None if the file has to be written."""
    note = place / PARTS / f"{shard.file}.json"
    if not note.exists():
        return None
    part: dict[str, Any] = note.read_json()
    same = part["plan"] == plan and (place / shard.file).size() == part["bytes"]
    return part if same else None


def _run(job: Job, served: Served, shards: Sequence[Shard], executor: Executor) -> Generator[dict[str, Any]]:
    """Predict shards in this process, or in an actor pool on Ray; yields the note of each shard."""
    if executor.embedded:
        predictor = Predictor(job, dict(served.groups))
        yield from (predictor.predict(shard) for shard in shards)
        return
    import ray

    section, models = executor.section, executor.hold(dict(served.groups))
    dataset = ray.data.from_items([{"shard": json.dumps(vars(shard))} for shard in shards],
                                  override_num_blocks=len(shards))  # fmt: skip
    fewest, most = (min(count, len(shards)) for count in (section.fewest, section.most))
    parts = dataset.map_batches(
        PredictorActor,
        batch_size=1,
        fn_constructor_args=(job, models),
        concurrency=(fewest, most),
        num_cpus=section.cpus_per_worker,
        num_gpus=section.gpus_per_worker or None,
    )
    for row in parts.iter_rows():
        part = json.loads(row["part"])
        if "error" in part:
            raise UserError(**part["error"])
        yield part


class Predictor:
    """Predicts shards with models on one device.

    Args:
        job: The job.
        groups: The group models.
    """

    def __init__(self, job: Job, groups: Mapping[str, GroupModel]) -> None:
        self.job = job
        device = "cuda" if job.gpu and torch.cuda.is_available() else "cpu"
        self.models = {name: model.to(device).eval() for name, model in groups.items()}

    def predict(self, shard: Shard) -> dict[str, Any]:
        """Predict a shard; its note."""
        return predict_shard(self.job, self.models, shard)


class PredictorActor:
    """An actor of Ray Data with a `Predictor`.

    Args:
        job: The job.
        models: The group models, held by the executor.
    """

    def __init__(self, job: Job, models: Held) -> None:
        self.predictor = Predictor(job, models.get())

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
        """Predict shards, given as JSON; their notes as JSON."""
        return {"part": [json.dumps(self._predict(Shard(**json.loads(text)))) for text in batch["shard"]]}

    def _predict(self, shard: Shard) -> dict[str, Any]:
        try:
            return self.predictor.predict(shard)
        except UserError as error:  # Ray Data keeps only the text of an error
            return {"error": error.to_dict()}


def predict_shard(job: Job, models: Mapping[str, GroupModel], shard: Shard) -> dict[str, Any]:
    """Write the predictions of a shard, then its note; only one row group is in memory at a time.

    Raises:
        UserError: When the shard differs from the manifest.
    """
    source = pq.ParquetFile(pa.BufferReader(_whole(job, shard)))
    tasks = [task for model in models.values() for task in model.tasks]
    with temporary_folder() as scratch:
        local, rows = scratch / shard.file, 0
        with pq.ParquetWriter(local, schema(tasks), compression="zstd") as writer:
            for group in range(source.num_row_groups):
                table = predicted(job, models, source.read_row_group(group, columns=[ID, INPUT]))
                writer.write_table(table)
                rows += len(table)
        if rows != shard.rows:
            raise _not_as_written(job, shard, f"{rows} rows, the manifest says {shard.rows}")
        (job.out / shard.file).write_file(local)
        digest = hashlib.sha256()
        with local.open("rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
        part = {"plan": job.plan, "file": shard.file, "rows": rows, "bytes": local.stat().st_size,
                "sha256": digest.hexdigest()}  # fmt: skip
    (job.out / PARTS / f"{shard.file}.json").write_json(part)
    return part


def _whole(job: Job, shard: Shard) -> bytes:
    """The bytes of a shard, checked against the manifest."""
    try:
        data = (job.reader.folder / shard.file).read_bytes()
    except FileNotFoundError as error:
        raise _not_as_written(job, shard, "no bytes at all: it is missing") from error
    if job.checksums and hashlib.sha256(data).hexdigest() != shard.sha256:
        raise _not_as_written(job, shard, "another checksum than the manifest says")
    return data


def _not_as_written(job: Job, shard: Shard, found: str) -> UserError:
    return UserError(
        f"the shard has {found}",
        where=str(job.reader.folder / shard.file),
        remedy="delete it and run dmtg shard again: it writes only missing shards",
    )


def predicted(job: Job, models: Mapping[str, GroupModel], table: pa.Table) -> pa.Table:
    """The predictions for a table of ids and stored inputs."""
    inputs = job.reader.arrays(table).inputs
    composite, pieces = Composite(models.values()), []
    tasks, device = composite.tasks, next(composite.parameters()).device
    for start in range(0, len(table), job.batch_size):
        raw = torch.from_numpy(
            np.array(inputs[start : start + job.batch_size])
        )  # the view of the file is read-only
        found = {name: value.cpu().numpy() for name, value in composite.predict(raw.to(device)).items()}
        ids = table[ID][start : start + job.batch_size].combine_chunks()
        arrays = [ids, *(array for task in tasks for array in arrays_of(task, found[task.name]))]
        pieces.append(pa.table(arrays, schema=schema(tasks)))
    return pa.concat_tables(pieces)
