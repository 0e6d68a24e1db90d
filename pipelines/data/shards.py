"""Sharding: raw samples to Parquet shards, with one task of the executor for each shard.

A shard is a pure function of its plan. It is written atomically, with a small note beside it that records its
content. After a job was killed, the next one keeps every shard that has a note and creates the others. Shards of
another plan have other names. The manifest is written last. The previous data set stays complete until then;
afterwards the files that only the previous data set needs are removed (`pipelines.data.shard_folder`). A task
holds one row group of samples in memory at a time, and the encoded bytes of the row groups before it. The driver
holds a plan and a brief note for each shard, and of each sample only a short digest of its input
(`pipelines.data.planning`).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmtg_core.tasks import Task
from pipelines.config.loading import Config
from pipelines.config.sections import SourceSection
from pipelines.data import statistics
from pipelines.data.manifest import FILE, SPLITS, Manifest, Shard, check_shards, read_manifest
from pipelines.data.planning import ShardPlan, make_plans, small_shards
from pipelines.data.raw_data import identity
from pipelines.data.shard_folder import (
    EXAMPLES,
    PARTS,
    REFUSED,
    brief,
    check_apart,
    quarantined_in,
    read_records,
    record_job,
    remove_superseded,
)
from pipelines.data.shard_tasks import write_all
from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT, BadSampleError, Column, Description, Entry, Source
from pipelines.data.sources.encoding import encode_like
from pipelines.errors import UserError
from pipelines.execution.choice import open_executor
from pipelines.execution.executor import Executor
from pipelines.runs.lease import only_one
from pipelines.scratch import temporary_folder
from pipelines.storage import Location, locate

QUARANTINE = "_quarantine.jsonl"
PLAN = b"dmtg.plan"  # metadata key of a shard: the key of its plan
GROUP_BYTES = 16 * 2**20  # decoded size of a row group, the unit that training reads
WINDOW = 32  # plans for each concurrent task whose samples are in memory at the same time
READERS = 4  # samples that a task opens at the same time, so that waits for a network overlap
Row = tuple[str, Mapping[str, "np.ndarray | None"]]  # id and columns
Sample = tuple[Entry, "dict[str, np.ndarray | None] | str"]  # columns, or the reason why they are missing
logger = logging.getLogger(__name__)


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
    read_records(folder)  # a foreign folder is refused before anything is written
    with only_one(folder / PARTS, f"job that writes shards into {folder}", progress, wait=True):
        return _shard(config, config.source, source, folder, progress, executor)


def _shard(
    config: Config,
    section: SourceSection,
    source: Source,
    folder: Location,
    progress: Callable[[str], None],
    executor: Executor | None,
) -> ShardReport:
    records = read_records(folder)
    record_job(folder, records.files)  # first, so that a killed job leaves a folder that is known
    folder.check_writable()
    folder = folder.retrying()  # a server or disk that is away for a moment does not end hours of work
    progress(f"listing the samples of {section.root or section.kind}")
    made = identity(source, section, config.data)
    description = _description(source, config.data.like)
    for note in description.notes:
        progress(f"note: {note}")
    plans = make_plans(source.entries(), description, section, config.data, made["folders"])
    samples = sum(len(plan.entries) for plan in plans)
    small = small_shards(plans, description.row_bytes)
    if small:
        progress(f"note: {small}")
    files = records.files | {plan.file for plan in plans}
    record_job(folder, files)
    parts = {plan.digest: part for plan in plans if (part := finished_part(folder, plan, records.notes, source))}
    todo = [plan for plan in plans if plan.digest not in parts]
    progress(f"{samples} samples, {len(plans)} shards: {len(parts)} are complete, {len(todo)} to create")
    bad = BadSamples(folder, samples, config.data.max_bad_fraction)
    for part in parts.values():
        bad.add(part)
    bad.check()
    # an executor is opened after the checks of the source
    with nullcontext(executor) if executor or not todo else open_executor(config.ray) as chosen:
        compression = config.data.compression
        write = partial(write_shard, source, description, folder=folder, compression=compression)
        written = write_all(write, todo, chosen) if chosen else ()
        for done, part in enumerate(written, start=1):
            parts[part["digest"]] = part
            progress(f"shard {done}/{len(todo)}: {part['shard']['file']}, {part['shard']['rows']} samples")
            bad.add(part)
            bad.check()
    manifest = _publish(folder, description, plans, parts, section, made)
    remove_superseded(folder, files, manifest.files())
    return ShardReport(manifest, len(todo), len(plans) - len(todo))


def _description(source: Source, like: str) -> Description:
    if not like:
        return source.describe()
    return encode_like(source, read_manifest(locate(like)).description, like)


class BadSamples:
    """The number of bad samples of a job, the shards that have some, and a few examples.

    Args:
        folder: Folder of the shards.
        samples: Number of all samples.
        most: Largest part of them that may be bad.
    """

    def __init__(self, folder: Location, samples: int, most: float) -> None:
        self._folder, self._samples, self._most = folder, samples, most
        self._count = 0
        self._shards: list[str] = []
        self._examples: list[Mapping[str, str]] = []

    def add(self, part: Mapping[str, Any]) -> None:
        """Count the bad samples of a shard, from `shard_folder.brief` of its note."""
        if part["bad"]:
            self._count += part["bad"]
            self._shards.append(part["shard"]["file"])
            self._examples += part["quarantined"][: EXAMPLES - len(self._examples)]

    def check(self) -> None:
        """Stop as soon as there are more bad samples than the whole data set may have.

        Raises:
            UserError: With up to three of the reasons. All reasons are in a file of this job, because
                `_quarantine.jsonl` belongs to the previous data set.
        """
        if self._count <= self._most * self._samples:
            return
        refused = self._folder / PARTS / REFUSED
        _write_quarantine(refused, self._folder, self._shards)
        reasons = "; ".join(f"{one['id']}: {one['reason']}" for one in self._examples)
        raise UserError(
            f"{self._count} of {self._samples} samples cannot be used so far, more than "
            f"data.max_bad_fraction={self._most:g} allows. {reasons}",
            where=str(refused),
            remedy="correct the samples, or raise data.max_bad_fraction; finished shards are kept",
        )


def _repeated(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, int]:
    """The repeated inputs of the shards; empty if one was written by an earlier version."""
    if any("inputs" not in part for held in parts.values() for part in held):
        return {}
    return statistics.repeated_inputs(
        {split: [text for part in held for text in part["inputs"]] for split, held in parts.items()}
    )


def _write_quarantine(file: Location, folder: Location, shards: Iterable[str]) -> None:
    """Write the bad samples of some shards, one a line. The note of one shard is in memory at a time."""
    with temporary_folder() as scratch:
        lines = scratch / QUARANTINE
        with lines.open("w", encoding="utf-8") as target:
            for shard_file in shards:
                target.writelines(json.dumps(one) + "\n" for one in quarantined_in(folder, shard_file))
        file.write_file(lines)


def group_rows(description: Description) -> int:
    """Number of samples of a row group."""
    return max(GROUP_BYTES // description.row_bytes, 16)


def finished_part(
    folder: Location, plan: ShardPlan, notes: Mapping[str, Sequence[dict[str, Any]]], source: Source
) -> dict[str, Any] | None:
    """The note of a complete shard of the same plan; None if the shard has to be created.

    A shard that lacks samples is complete only if they still cannot be used. They alone are read again.

    Args:
        folder: Folder of the shards.
        plan: Plan of the shard; the file can have another name, as in earlier versions.
        notes: Digest → brief notes, as in `Records`.
        source: The reader.
    """
    for part in notes.get(plan.digest, ()):
        file = folder / part["shard"]["file"]
        if file.size() == part["shard"]["bytes"] and _plan_of(file) == plan.key:
            return None if part["bad"] and _usable_again(folder, plan, part, source) else part
    return None


def _usable_again(folder: Location, plan: ShardPlan, part: Mapping[str, Any], source: Source) -> bool:
    """Whether a quarantined sample of a shard can be used now: its file was restored or made readable."""
    left_out = {one["id"] for one in quarantined_in(folder, part["shard"]["file"])}
    samples = _samples(source, (entry for entry in plan.entries if entry.id in left_out))
    return any(not isinstance(found, str) for _, found in samples)


def _plan_of(file: Location) -> str:
    """The key of the plan of a shard, from the footer of its file: a file can have been renamed."""
    try:
        with file.filesystem.open_input_file(file.path) as opened:
            held = pq.ParquetFile(opened).schema_arrow.metadata or {}
    except (OSError, pa.ArrowInvalid):
        return ""
    return held.get(PLAN, b"").decode()


def write_shard(
    source: Source, description: Description, plan: ShardPlan, folder: Location, compression: str
) -> dict[str, Any]:
    """Read the samples of a plan and write its shard, and then its note.

    Returns:
        `shard_folder.brief` of the note. The note has the digest of the plan, the `Shard`, the sums of each
        task, the digests of the inputs, and the quarantined samples.
    """
    quarantined: list[dict[str, str]] = []
    sums: dict[str, list[statistics.Sums]] = {task.name: [] for task in description.tasks}
    sink, rows, inputs = io.BytesIO(), 0, list[str]()
    # dictionaries and page statistics take time and are useless for pixels
    with pq.ParquetWriter(
        sink,
        schema(description).with_metadata({PLAN: plan.key}),
        compression=compression,
        use_dictionary=False,
        write_statistics=False,
    ) as writer:
        for group in _groups(_samples(source, plan.entries), group_rows(description), quarantined):
            writer.write_table(table_of(description, group), row_group_size=len(group))
            rows += len(group)
            for task in description.tasks:
                sums[task.name].append(_sums(task, group))
            inputs.append(statistics.input_digests(value for _, row in group if (value := row[INPUT]) is not None))
    data = sink.getvalue()
    (folder / plan.file).write_bytes(data)
    written = Shard(plan.file, rows, len(data), hashlib.sha256(data).hexdigest())
    part = {
        "digest": plan.digest,
        "shard": asdict(written),
        # a shard without usable samples has the sums of no labels
        "sums": {t.name: statistics.merge(sums[t.name] or [_sums(t, [])]) for t in description.tasks},
        "inputs": inputs,
        "quarantined": quarantined,
    }
    (folder / PARTS / f"{plan.file}.json").write_json(part)
    return brief(part)


def _samples(source: Source, entries: Iterable[Entry]) -> Iterator[Sample]:
    """The samples in order; a few are opened at the same time."""

    def read(entry: Entry) -> Sample:
        try:
            return entry, source.read(entry)
        except BadSampleError as error:
            return entry, str(error)

    waiting = iter(entries)
    with ThreadPoolExecutor(READERS) as pool:
        while some := list(islice(waiting, READERS)):
            yield from pool.map(read, some)


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
    section: SourceSection,
    made: Mapping[str, Any],
) -> Manifest:
    """Write the manifest, which replaces the previous data set by the new one."""
    by_split = {split: [parts[plan.digest] for plan in plans if plan.split == split] for split in SPLITS}
    parts_in_order = [part for held in by_split.values() for part in held]
    manifest = Manifest(
        description=description,
        shards={split: [Shard(**p["shard"]) for p in held] for split, held in by_split.items()},
        sums={
            split: {t.name: statistics.merge([p["sums"][t.name] for p in held]) for t in description.tasks}
            for split, held in by_split.items()
        },
        source=section.model_dump(),
        quarantined=sum(part["bad"] for part in parts_in_order),
        group_rows=group_rows(description),
        made=made,
        repeated=_repeated(by_split),
    )
    check_shards(folder, manifest, checksums=False)  # another job can have removed shards that this job kept
    (folder / FILE).write_json(manifest.to_dict())
    bad = [part["shard"]["file"] for part in parts_in_order if part["bad"]]
    _write_quarantine(folder / QUARANTINE, folder, bad)
    return manifest
