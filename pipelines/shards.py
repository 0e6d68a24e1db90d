"""Raw samples to Parquet shards, as a Ray Data job: one task a shard, so that memory is bounded by a shard.

A shard is a pure function of its plan. It is written whole with a small file beside it that says what it holds;
a job that was killed keeps every shard that has one and makes the rest. The manifest comes last.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import statistics
from pipelines.config import Config, DataSection, SourceSection
from pipelines.errors import UserError
from pipelines.manifest import FILE, SPLITS, Manifest, Shard, read_manifest
from pipelines.sources import BadSampleError, Column, Description, Entry, Source, build_source
from pipelines.storage import Location, locate

QUARANTINE = "_quarantine.jsonl"
PARTS = "_parts"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardPlan:
    """One shard to make: its file name, the samples that go into it, and a digest of both and the options."""

    file: str
    entries: tuple[Entry, ...]
    digest: str


@dataclass(frozen=True)
class ShardReport:
    """What `shard` did."""

    manifest: Manifest
    made: int
    kept: int


def shard(config: Config, progress: Callable[[str], None] = log.info) -> ShardReport:
    """Make the shards of `config.source` in `config.data.shards`; those already whole are kept.

    Raises:
        UserError: For a source or a place that cannot be used, and when more than `data.max_bad_fraction` of the
            samples cannot.
    """
    if config.source is None or not config.source.root:
        raise UserError(
            "there is no raw data to make shards from",
            where="source.root",
            remedy="set source.kind and source.root, or data.shards to finished shards",
            wrong_use=True,
        )
    folder = locate(config.data.shards)
    folder.check_writable()
    progress(f"listing the samples of {config.source.root}")
    source = build_source(config.source.kind, config.source.root, config.source.options)
    entries = source.entries()
    description = source.describe()
    plans = make_plans(entries, description, config.source, config.data)
    (folder / FILE).delete()  # until the end the folder is not a dataset
    parts, todo = {}, []
    for plan in plans:
        part = finished_part(folder, plan)
        if part is None:
            todo.append(plan)
        else:
            parts[plan.file] = part
    progress(f"{len(entries)} samples, {len(plans)} shards: {len(parts)} are there, {len(todo)} to make")
    for done, part in enumerate(_run(source, description, todo, folder, config), start=1):
        parts[part["shard"]["file"]] = part
        progress(f"shard {done}/{len(todo)}: {part['shard']['file']}, {part['shard']['rows']} samples")
    manifest = _finish(folder, description, [parts[plan.file] for plan in plans], config)
    return ShardReport(manifest, len(todo), len(plans) - len(todo))


def make_plans(
    entries: Sequence[Entry], description: Description, source: SourceSection, data: DataSection
) -> list[ShardPlan]:
    """Cut the samples of each split, mixed by the hash of their ids, into shards.

    Raises:
        UserError: When there are no samples, none for training, or two with one id.
    """
    twice = sorted(name for name, count in Counter(entry.id for entry in entries).items() if count > 1)
    if twice:
        raise UserError(
            f"{len(twice)} ids occur more than once: {', '.join(twice[:5])}",
            where=source.root,
            remedy="give every sample an id of its own",
        )
    by_split: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    for entry in entries:
        by_split[entry.split].append(entry)
    if not by_split["train"] or not by_split["val"]:
        raise UserError(
            f"splits hold {', '.join(f'{k}: {len(v)}' for k, v in by_split.items())} samples",
            where=source.root,
            remedy="training needs samples for train and val; check the split column or file",
        )
    described = [description.input.to_dict(), [task.to_dict() for task in description.tasks]]
    options = json.dumps([described, source.kind, source.options, data.compression], sort_keys=True, default=str)
    plans = []
    for split, members in by_split.items():
        # neighbours on disk are alike; a hash mixes them the same way on every machine
        mixed = sorted(members, key=lambda entry: hashlib.sha256(entry.id.encode()).digest())
        for start in range(0, len(mixed), data.rows_per_shard):
            chosen = tuple(mixed[start : start + data.rows_per_shard])
            file = f"{split}-{start // data.rows_per_shard:05d}.parquet"
            text = options + json.dumps([asdict(entry) for entry in chosen], sort_keys=True, default=str)
            plans.append(ShardPlan(file, chosen, hashlib.sha256(text.encode()).hexdigest()))
    return plans


def finished_part(folder: Location, plan: ShardPlan) -> dict[str, Any] | None:
    """What is known of a shard that is whole and made to the same plan; None where it has to be made."""
    note = folder / PARTS / f"{plan.file}.json"
    if not note.exists():
        return None
    part: dict[str, Any] = note.read_json()
    same = part["digest"] == plan.digest and (folder / plan.file).size() == part["shard"]["bytes"]
    return part if same else None


def _run(
    source: Source, description: Description, plans: Sequence[ShardPlan], folder: Location, config: Config
) -> Iterator[dict[str, Any]]:
    """Write the shards as Ray Data tasks; what each of them holds, as they finish."""
    if not plans:
        return
    import ray

    def make(row: dict[str, Any]) -> dict[str, Any]:
        plan = pickle.loads(row["plan"])  # noqa: S301 - written a few lines below by this very job
        return {"part": json.dumps(write_shard(source, description, plan, folder, config.data.compression))}

    dataset = ray.data.from_items([{"plan": pickle.dumps(plan)} for plan in plans], override_num_blocks=len(plans))
    for row in dataset.map(make, concurrency=math.ceil(config.ray.data_cpus)).iter_rows():
        yield json.loads(row["part"])


def write_shard(
    source: Source, description: Description, plan: ShardPlan, folder: Location, compression: str
) -> dict[str, Any]:
    """Read the samples of a plan and write its shard, then the note beside it.

    Returns:
        The note: the plan's digest, the `Shard`, sums a task, and what had to be quarantined.
    """
    rows: list[tuple[str, dict[str, np.ndarray | None]]] = []
    quarantined = []
    for entry in plan.entries:
        try:
            rows.append((entry.id, source.read(entry)))
        except BadSampleError as error:
            quarantined.append({"id": entry.id, "split": entry.split, "reason": str(error)})
    data = parquet_bytes(description, rows, compression)
    (folder / plan.file).write_bytes(data)
    written = Shard(plan.file, len(rows), len(data), hashlib.sha256(data).hexdigest())
    sums = {
        task.name: statistics.label_sums(
            task, [row[f"task.{task.name}"] for _, row in rows], [row.get(f"mask.{task.name}") for _, row in rows]
        )
        for task in description.tasks
    }
    part = {"digest": plan.digest, "shard": asdict(written), "sums": sums, "quarantined": quarantined}
    (folder / PARTS / f"{plan.file}.json").write_json(part)
    return part


def parquet_bytes(
    description: Description, rows: Sequence[tuple[str, Mapping[str, np.ndarray | None]]], compression: str
) -> bytes:
    """The rows as a Parquet file; a tensor is one binary value, a number a column of its own type.

    Raises:
        ValueError: When a value is not of the dtype and shape that the description says.
    """
    arrays = {"id": pa.array([row_id for row_id, _ in rows], pa.string())}
    for name, column in description.columns.items():
        arrays[name] = _arrow(name, column, [row.get(name) for _, row in rows])
    sink = io.BytesIO()
    # dictionaries and page statistics cost time and say nothing about pixels
    pq.write_table(
        pa.table(arrays), sink, compression=compression, use_dictionary=False, write_statistics=False,
        row_group_size=64,
    )  # fmt: skip
    return sink.getvalue()


def _arrow(name: str, column: Column, values: Sequence[np.ndarray | None]) -> pa.Array:
    for value in values:
        if value is not None and (str(value.dtype) != column.dtype or value.shape != column.shape):
            raise ValueError(
                f"column {name}: expected {column.dtype} {column.shape}, got {value.dtype} {value.shape}"
            )
    if column.shape == ():
        kind = pa.from_numpy_dtype(np.dtype(column.dtype))
        return pa.array([None if v is None else v.item() for v in values], kind)
    little = np.dtype(column.dtype).newbyteorder("<")
    return pa.array([None if v is None else v.astype(little, copy=False).tobytes() for v in values], pa.binary())


def _finish(
    folder: Location, description: Description, parts: Sequence[dict[str, Any]], config: Config
) -> Manifest:
    """Quarantine file, check of the bad share, manifest; files of an earlier plan go."""
    quarantined = [bad for part in parts for bad in part["quarantined"]]
    (folder / QUARANTINE).write_text("".join(json.dumps(bad) + "\n" for bad in quarantined))
    total = len(quarantined) + sum(part["shard"]["rows"] for part in parts)
    if len(quarantined) > config.data.max_bad_fraction * total:
        reasons = "; ".join(f"{bad['id']}: {bad['reason']}" for bad in quarantined[:3])
        raise UserError(
            f"{len(quarantined)} of {total} samples cannot be used, more than data.max_bad_fraction="
            f"{config.data.max_bad_fraction:g} allows. {reasons}",
            where=str(folder / QUARANTINE),
            remedy="mend the samples, or raise data.max_bad_fraction; finished shards are kept",
        )
    by_split = {split: [p for p in parts if p["shard"]["file"].startswith(f"{split}-")] for split in SPLITS}
    manifest = Manifest(
        description=description,
        shards={split: [Shard(**p["shard"]) for p in held] for split, held in by_split.items()},
        sums={
            split: {t.name: statistics.merge([p["sums"][t.name] for p in held]) for t in description.tasks}
            for split, held in by_split.items()
        },
        source=config.source.model_dump() if config.source else {},
        quarantined=len(quarantined),
    )
    wanted = {part["shard"]["file"] for part in parts}
    for name in folder.files(recursive=False):
        if name.endswith(".parquet") and name not in wanted:
            (folder / name).delete()
    (folder / FILE).write_json(manifest.to_dict())
    return manifest


def ensure_shards(config: Config, progress: Callable[[str], None] = log.info) -> Manifest:
    """The manifest of `data.shards`; shards that do not exist yet are made when `source` is given."""
    folder = locate(config.data.shards)
    if (folder / FILE).exists() or config.source is None or not config.source.root:
        return read_manifest(folder)
    return shard(config, progress).manifest
