"""Sharding: raw samples to Parquet shards, with one task of the executor for each shard.

A shard is a pure function of its plan. It is written atomically, with a small note beside it that records its
content. After a job was killed, the next one keeps every shard that has a note and creates the others. Shards of
another plan have other names. The manifest is written last. The previous data set stays complete until then;
afterwards the files that only the previous data set needs are removed (`pipelines.data.shard_folder`). A task
holds one row group of samples in memory at a time, and the encoded bytes of the row groups before it.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmtg_core.tasks import Task
from pipelines.config.loading import Config
from pipelines.config.sections import DataSection, SourceSection
from pipelines.data import statistics
from pipelines.data.manifest import FILE, SPLITS, Manifest, Shard, check_shards, read_manifest
from pipelines.data.shard_folder import (
    PARTS,
    REFUSED,
    check_apart,
    read_records,
    record_job,
    remove_superseded,
)
from pipelines.data.shard_tasks import write_all
from pipelines.data.sources import build_source
from pipelines.data.sources.base import BadSampleError, Column, Description, Entry, Source
from pipelines.data.sources.encoding import encode_like
from pipelines.errors import UserError
from pipelines.execution.choice import open_executor
from pipelines.execution.executor import Executor
from pipelines.storage import Location, locate

QUARANTINE = "_quarantine.jsonl"
PLAN = b"dmtg.plan"  # metadata key of a shard: the digest of its plan
SHARD_BYTES = 64 * 2**20  # decoded size of a shard if its number of rows is not configured
GROUP_BYTES = 16 * 2**20  # decoded size of a row group, the unit that training reads
READERS = 4  # samples that a task opens at the same time, so that waits for a network overlap
Row = tuple[str, Mapping[str, "np.ndarray | None"]]  # id and columns
Sample = tuple[Entry, "dict[str, np.ndarray | None] | str"]  # columns, or the reason why they are missing
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardPlan:
    """Plan of a shard: its file name, its samples, and a digest of the samples and the options."""

    file: str
    entries: tuple[Entry, ...]
    digest: str

    @property
    def split(self) -> str:
        """The split of all its samples."""
        return self.entries[0].split


@dataclass(frozen=True)
class ShardReport:
    """Result of `shard`."""

    manifest: Manifest
    made: int
    kept: int


def shard(
    config: Config, progress: Callable[[str], None] = logger.info, executor: Executor | None = None
) -> ShardReport:
    """Create the shards of `config.source` in `config.data.shards`; complete shards are kept.

    Args:
        config: Configuration with a source.
        progress: Called with each line.
        executor: The executor of the command; by default one is opened if shards have to be created.

    Raises:
        UserError: For a source that cannot be used, for a folder that holds other files than shards, and when more
            than `data.max_bad_fraction` of the samples cannot be used. An existing data set is kept then.
    """
    if config.source is None or not config.source.given:
        raise UserError(
            "no raw data is configured",
            where="source.root",
            remedy="set source.kind and source.root, or set data.shards to finished shards",
            wrong_use=True,
        )
    folder = locate(config.data.shards)
    source = build_source(config.source.kind, config.source.root, config.source.options)
    check_apart(folder, config.source)
    records = read_records(folder)
    record_job(folder, records.files)  # first, so that a killed job leaves a folder that is known
    folder.check_writable()
    progress(f"listing the samples of {config.source.root or config.source.kind}")
    entries = source.entries()
    description = _description(source, config.data.like)
    plans = make_plans(entries, description, config.source, config.data)
    files = records.files | {plan.file for plan in plans}
    record_job(folder, files)
    parts = {plan.digest: part for plan in plans if (part := finished_part(folder, plan, records.notes))}
    todo = [plan for plan in plans if plan.digest not in parts]
    progress(f"{len(entries)} samples, {len(plans)} shards: {len(parts)} are complete, {len(todo)} to create")
    check_bad(parts.values(), len(entries), config.data.max_bad_fraction, folder)
    # an executor is opened after the checks of the source
    with nullcontext(executor) if executor or not todo else open_executor(config.ray) as chosen:
        write = partial(write_shard, source, description, folder, config.data.compression)
        written = write_all(write, todo, chosen) if chosen else ()
        for done, part in enumerate(written, start=1):
            parts[part["digest"]] = part
            progress(f"shard {done}/{len(todo)}: {part['shard']['file']}, {part['shard']['rows']} samples")
            check_bad(parts.values(), len(entries), config.data.max_bad_fraction, folder)
    manifest = _publish(folder, description, plans, parts, config)
    remove_superseded(folder, files, manifest.files())
    return ShardReport(manifest, len(todo), len(plans) - len(todo))


def _description(source: Source, like: str) -> Description:
    if not like:
        return source.describe()
    return encode_like(source, read_manifest(locate(like)).description, like)


def check_bad(parts: Iterable[Mapping[str, Any]], samples: int, most: float, folder: Location) -> None:
    """Stop as soon as there are more bad samples than the whole data set may have.

    Raises:
        UserError: With up to three of the reasons. All reasons are in a file of this job, because
            `_quarantine.jsonl` belongs to the previous data set.
    """
    bad = [one for part in parts for one in part["quarantined"]]
    if len(bad) > most * samples:
        refused = folder / PARTS / REFUSED
        _write_quarantine(refused, bad)
        reasons = "; ".join(f"{one['id']}: {one['reason']}" for one in bad[:3])
        raise UserError(
            f"{len(bad)} of {samples} samples cannot be used so far, more than data.max_bad_fraction={most:g} "
            f"allows. {reasons}",
            where=str(refused),
            remedy="correct the samples, or raise data.max_bad_fraction; finished shards are kept",
        )


def _write_quarantine(file: Location, bad: Iterable[Mapping[str, str]]) -> None:
    file.write_text("".join(json.dumps(one) + "\n" for one in bad))


def group_rows(description: Description) -> int:
    """Number of samples of a row group."""
    return max(GROUP_BYTES // description.row_bytes, 16)


def make_plans(
    entries: Sequence[Entry], description: Description, source: SourceSection, data: DataSection
) -> list[ShardPlan]:
    """Divide the samples of each split, shuffled by the hash of their ids, into shards.

    Raises:
        UserError: When there are no samples for training or validation, or two samples with the same id.
    """
    twice = sorted(name for name, count in Counter(entry.id for entry in entries).items() if count > 1)
    if twice:
        raise UserError(
            f"{len(twice)} ids occur more than once: {', '.join(twice[:5])}",
            where=source.root,
            remedy="give every sample a different id",
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
    described.append(dict(description.preparation))
    options = json.dumps([described, source.kind, source.options, data.compression], sort_keys=True, default=str)
    size = data.rows_per_shard or min(max(SHARD_BYTES // description.row_bytes, 64), 8192)
    plans = []
    for split, members in by_split.items():
        # neighbours on disk are similar; a hash shuffles them in the same way on every machine
        mixed = sorted(members, key=lambda entry: hashlib.sha256(entry.id.encode()).digest())
        for start in range(0, len(mixed), size):
            chosen = tuple(mixed[start : start + size])
            text = options + json.dumps([asdict(entry) for entry in chosen], sort_keys=True, default=str)
            digest = hashlib.sha256(text.encode()).hexdigest()
            plans.append(ShardPlan(f"{split}-{start // size:05d}-{digest[:12]}.parquet", chosen, digest))
    return plans


def finished_part(
    folder: Location, plan: ShardPlan, notes: Mapping[str, Sequence[dict[str, Any]]]
) -> dict[str, Any] | None:
    """The note of a complete shard of the same plan; None if the shard has to be created.

    Args:
        folder: Folder of the shards.
        plan: Plan of the shard; the file can have another name, as in earlier versions.
        notes: Digest → notes, as in `Records`.
    """
    for part in notes.get(plan.digest, ()):
        file = folder / part["shard"]["file"]
        if file.size() == part["shard"]["bytes"] and _plan_of(file) == plan.digest:
            return part
    return None


def _plan_of(file: Location) -> str:
    """The digest of the plan of a shard, from the footer of its file: a file can have been renamed."""
    try:
        with file.filesystem.open_input_file(file.path) as opened:
            held = pq.ParquetFile(opened).schema_arrow.metadata or {}
    except (OSError, pa.ArrowInvalid):
        return ""
    return held.get(PLAN, b"").decode()


def write_shard(
    source: Source, description: Description, folder: Location, compression: str, plan: ShardPlan
) -> dict[str, Any]:
    """Read the samples of a plan and write its shard, and then its note.

    Returns:
        The note: the digest of the plan, the `Shard`, the sums of each task, and the quarantined samples.
    """
    quarantined: list[dict[str, str]] = []
    sums: dict[str, list[statistics.Sums]] = {task.name: [] for task in description.tasks}
    sink, rows = io.BytesIO(), 0
    # dictionaries and page statistics take time and are useless for pixels
    with pq.ParquetWriter(
        sink,
        schema(description).with_metadata({PLAN: plan.digest}),
        compression=compression,
        use_dictionary=False,
        write_statistics=False,
    ) as writer:
        for group in _groups(_samples(source, plan.entries), group_rows(description), quarantined):
            writer.write_table(table_of(description, group), row_group_size=len(group))
            rows += len(group)
            for task in description.tasks:
                sums[task.name].append(_sums(task, group))
    data = sink.getvalue()
    (folder / plan.file).write_bytes(data)
    written = Shard(plan.file, rows, len(data), hashlib.sha256(data).hexdigest())
    part = {
        "digest": plan.digest,
        "shard": asdict(written),
        # a shard without usable samples has the sums of no labels
        "sums": {t.name: statistics.merge(sums[t.name] or [_sums(t, [])]) for t in description.tasks},
        "quarantined": quarantined,
    }
    (folder / PARTS / f"{plan.file}.json").write_json(part)
    return part


def _samples(source: Source, entries: Sequence[Entry]) -> Iterator[Sample]:
    """The samples in order; a few are opened at the same time."""

    def read(entry: Entry) -> Sample:
        try:
            return entry, source.read(entry)
        except BadSampleError as error:
            return entry, str(error)

    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(entries), READERS):
            yield from pool.map(read, entries[start : start + READERS])


def _groups(samples: Iterable[Sample], size: int, quarantined: list[dict[str, str]]) -> Iterator[list[Row]]:
    """Rows in lists of `size`; samples without columns are added to `quarantined`."""
    group: list[Row] = []
    for entry, found in samples:
        if isinstance(found, str):
            quarantined.append({"id": entry.id, "split": entry.split, "reason": found})
            continue
        group.append((entry.id, found))
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _sums(task: Task, rows: Sequence[Row]) -> statistics.Sums:
    labels = [row[f"task.{task.name}"] for _, row in rows]
    return statistics.label_sums(task, labels, [row.get(f"mask.{task.name}") for _, row in rows])


def schema(description: Description) -> pa.Schema:
    """Columns of a shard: a tensor is a binary value, a number has its own type."""
    fields = [pa.field("id", pa.string())]
    for name, column in description.columns.items():
        plain = column.shape == ()
        fields.append(pa.field(name, pa.from_numpy_dtype(np.dtype(column.dtype)) if plain else pa.binary()))
    return pa.schema(fields)


def table_of(description: Description, rows: Sequence[Row]) -> pa.Table:
    """The rows as a table of `schema`.

    Raises:
        ValueError: When a value has another dtype or shape than the description.
    """
    arrays = [pa.array([row_id for row_id, _ in rows], pa.string())]
    arrays += [_arrow(name, c, [row.get(name) for _, row in rows]) for name, c in description.columns.items()]
    return pa.table(arrays, schema=schema(description))


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


def _publish(
    folder: Location,
    description: Description,
    plans: Sequence[ShardPlan],
    parts: Mapping[str, dict[str, Any]],
    config: Config,
) -> Manifest:
    """Write the manifest, which replaces the previous data set by the new one."""
    by_split = {split: [parts[plan.digest] for plan in plans if plan.split == split] for split in SPLITS}
    quarantined = [bad for held in by_split.values() for part in held for bad in part["quarantined"]]
    manifest = Manifest(
        description=description,
        shards={split: [Shard(**p["shard"]) for p in held] for split, held in by_split.items()},
        sums={
            split: {t.name: statistics.merge([p["sums"][t.name] for p in held]) for t in description.tasks}
            for split, held in by_split.items()
        },
        source=config.source.model_dump() if config.source else {},
        quarantined=len(quarantined),
        group_rows=group_rows(description),
    )
    check_shards(folder, manifest, checksums=False)  # another job can have removed shards that this job kept
    (folder / FILE).write_json(manifest.to_dict())
    _write_quarantine(folder / QUARANTINE, quarantined)
    return manifest


def ensure_shards(
    config: Config, progress: Callable[[str], None] = logger.info, executor: Executor | None = None
) -> Manifest:
    """The manifest of `data.shards`; shards that do not exist are created if `source` is configured."""
    folder = locate(config.data.shards)
    if (folder / FILE).exists() or config.source is None or not config.source.given:
        return read_manifest(folder)
    return shard(config, progress, executor).manifest
