"""Manifest of a shard folder (`_manifest.json`). It is written last: a folder without it is not a data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from dmtg_core.input_spec import InputSpec
from dmtg_core.tasks import Task
from pipelines.data import statistics
from pipelines.data.sources.base import Column, Description
from pipelines.errors import UserError
from pipelines.storage import Location, finite

FILE = "_manifest.json"
SCHEMA_VERSION = 2
SPLITS = ("train", "val", "test")
REPEATED = 0.01  # share of a split with repeated inputs from which a note says so


@dataclass(frozen=True)
class Shard:
    """One Parquet file."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of a shard folder.

    Args:
        description: Columns, tasks and input.
        shards: Split → its shards, in reading order.
        sums: Split → task → sums of `pipelines.data.statistics`.
        source: Kind, root and options of the raw data.
        quarantined: Number of samples that were left out; `_quarantine.jsonl` lists them.
        group_rows: Samples of every row group of a shard, except its last.
        made: `pipelines.data.raw_data.identity` of the raw data; empty in shards of earlier versions.
        repeated: `pipelines.data.statistics.repeated_inputs`; empty if a shard is of an earlier version.
    """

    description: Description
    shards: Mapping[str, Sequence[Shard]]
    sums: Mapping[str, Mapping[str, statistics.Sums]]
    source: Mapping[str, Any] = field(default_factory=dict)
    quarantined: int = 0
    group_rows: int = 1
    made: Mapping[str, Any] = field(default_factory=dict)
    repeated: Mapping[str, int] = field(default_factory=dict)

    def rows(self, split: str) -> int:
        """Number of samples of a split."""
        return sum(shard.rows for shard in self.shards.get(split, ()))

    def files(self) -> list[str]:
        """The names of all shards."""
        return [shard.file for shards in self.shards.values() for shard in shards]

    def digest(self) -> str:
        """Twelve hex digits that change with every shard, and with the description of what the shards hold.

        The description has the names of columns, categories and classes, which the bytes of the shards lack.
        """
        every = [shard.sha256 for split in SPLITS for shard in self.shards.get(split, ())]
        if self.made:  # the digests of shards of earlier versions stay as they were
            every.append(json.dumps(self._described(), sort_keys=True))
        return hashlib.sha256("".join(every).encode()).hexdigest()[:12]

    def _described(self) -> dict[str, Any]:
        """The description as values for JSON."""
        found = self.description
        return {
            "input": found.input.to_dict(),
            "tasks": [task.to_dict() for task in found.tasks],
            "columns": {name: {"dtype": c.dtype, "shape": list(c.shape)} for name, c in found.columns.items()},
            "preparation": dict(found.preparation),
        }

    def tasks(self, names: Sequence[str] | None, where: str) -> tuple[Task, ...]:
        """The tasks with these `names`, in this order; all tasks for None.

        Balanced weights of their losses are those of the labels in the training split.

        Raises:
            UserError: For a task that is not in the shards.
        """
        held = {task.name: self._weighted(task) for task in self.description.tasks}
        unknown = [name for name in names or () if name not in held]
        if unknown:
            raise UserError(
                f"the shards have no task {', '.join(unknown)}",
                where=where,
                remedy=f"set data.tasks to some of {', '.join(held)}",
            )
        return tuple(held[name] for name in (held if names is None else names))

    def _weighted(self, task: Task) -> Task:
        if not task.loss_options.balanced:
            return task
        counts = self.sums.get("train", {}).get(task.name, {}).get("classes", ())
        return replace(task, loss_options=task.loss_options.counted(counts))

    def to_dict(self) -> dict[str, Any]:
        """The manifest as values for JSON; `from_dict` reads them."""
        values = {
            "schema_version": SCHEMA_VERSION,
            **self._described(),
            "notes": list(self.description.notes),
            "splits": {
                split: {
                    "rows": self.rows(split),
                    "shards": [vars(shard) for shard in shards],
                    "statistics": self.sums[split],
                }
                for split, shards in self.shards.items()
            },
            "rows": sum(self.rows(split) for split in self.shards),
            "quarantined": self.quarantined,
            "group_rows": self.group_rows,
            "digest": self.digest(),
            "source": dict(self.source),
            "made": dict(self.made),
            "repeated": dict(self.repeated),
        }
        return values | {"seal": seal_of(values)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """The inverse of `to_dict`."""
        columns = {name: Column(c["dtype"], tuple(c["shape"])) for name, c in values["columns"].items()}
        tasks = tuple(Task.from_dict(task) for task in values["tasks"])
        notes = tuple(values.get("notes", ()))
        return cls(
            description=Description(InputSpec(**values["input"]), tasks, columns, values["preparation"], notes),
            shards={split: [Shard(**s) for s in v["shards"]] for split, v in values["splits"].items()},
            sums={split: v["statistics"] for split, v in values["splits"].items()},
            source=values["source"],
            quarantined=values["quarantined"],
            group_rows=values["group_rows"],
            made=values.get("made", {}),
            repeated=values.get("repeated", {}),
        )


def seal_of(values: Mapping[str, Any]) -> str:
    """The digest of a manifest, which the manifest holds: an edited one is recognised."""
    sealed = finite({key: value for key, value in values.items() if key != "seal"})
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Location) -> Manifest:
    """The manifest of a shard folder.

    Raises:
        UserError: When there is no manifest, it was edited, or it has another schema version.
    """
    file = folder / FILE
    if not file.exists():
        folder.check_bucket()
        raise UserError(
            "no data set here: the folder has no manifest",
            where=str(file),
            remedy="run dmtg shard, or set data.shards to a folder of finished shards",
        )
    values = file.read_json()
    if values.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"the manifest has schema {values.get('schema_version')!r}, this version reads {SCHEMA_VERSION}",
            where=str(file),
            remedy="create the shards again with dmtg shard",
        )
    if "seal" in values and values["seal"] != seal_of(values):
        raise UserError(
            "the manifest was edited: it is not the one that dmtg shard wrote",
            where=str(file),
            remedy="put the original back, or create it again with dmtg shard, which keeps complete shards",
        )
    return Manifest.from_dict(values)


def listed_files(folder: Location) -> list[str] | None:
    """The shards that a manifest of any schema version lists; None if there is no such manifest."""
    try:
        values = json.loads((folder / FILE).read_bytes())
        splits = values["splits"].values() if values["schema_version"] else ()
        return [str(shard["file"]) for split in splits for shard in split["shards"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # another program's file
        return None


def broken_shards(folder: Location, manifest: Manifest, *, checksums: bool) -> list[str]:
    """Problems of the shard files, one line each: missing, of the wrong size or, on request, checksum."""
    shards = [shard for split in manifest.shards.values() for shard in split]
    with ThreadPoolExecutor(8) as pool:  # reading and hashing release the interpreter lock
        found = pool.map(lambda shard: _broken(folder, shard, checksums), shards)
        return [problem for problem in found if problem]


def _broken(folder: Location, shard: Shard, checksum: bool) -> str:
    file = folder / shard.file
    size = file.size()
    if size is None:
        return f"{shard.file} is missing"
    if size != shard.bytes:
        return f"{shard.file} has {size} bytes, the manifest says {shard.bytes}"
    if checksum and hashlib.sha256(file.read_bytes()).hexdigest() != shard.sha256:
        return f"{shard.file} has another checksum than the manifest says"
    return ""


def check_shards(folder: Location, manifest: Manifest, *, checksums: bool) -> None:
    """Check that the shards are unchanged, before any expensive work.

    Raises:
        UserError: When shards are missing or changed; up to five are named.
    """
    broken = broken_shards(folder, manifest, checksums=checksums)
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UserError(
            "; ".join(broken[:5]) + more,
            where=str(folder),
            remedy="delete these files and run dmtg shard again: it creates only missing shards",
        )


def check_targets(manifest: Manifest, tasks: Sequence[Task], where: str) -> None:
    """Check that no target is constant: the results of such a task look perfect and mean nothing.

    Raises:
        UserError: When targets are constant; each is named with its only value.
    """
    reasons = {task.name: statistics.constant(manifest.sums["train"][task.name]) for task in tasks}
    bad = {name: reason for name, reason in reasons.items() if reason}
    if bad:
        raise UserError(
            "; ".join(f"task {name} is constant in the training split: {reason}" for name, reason in bad.items()),
            where=where,
            remedy="remove it from data.tasks, or check with dmtg inspect how its labels were read",
        )


def thin_losses(manifest: Manifest, tasks: Sequence[Task], least: int) -> dict[str, str]:
    """Task → the reason why its mean loss on validation data has little meaning; only tasks with a reason."""
    sums = manifest.sums.get("val", {})
    found = {task.name: statistics.thin_loss(task, sums[task.name], least) for task in tasks if task.name in sums}
    return {name: reason for name, reason in found.items() if reason}


def support_notes(manifest: Manifest, tasks: Sequence[Task], least: int) -> list[str]:
    """A line for each task with few labels, with the number of labels."""
    notes = []
    for task in tasks:
        for split in ("train", "val", "test"):
            sums = manifest.sums.get(split, {}).get(task.name)
            thin = statistics.thin_support(task, sums, least) if sums and sums["rows"] else ""
            if thin:
                notes.append(f"task {task.name} has too few labels in {split} for a reliable result: {thin}")
                break
    return notes


def repeated_notes(manifest: Manifest) -> list[str]:
    """A line for each split of which a considerable share has inputs of training samples."""
    return [
        f"{count} of {manifest.rows(split)} {split} samples have the input of a training sample: their errors can "
        "be lower than those of new samples. Rows of one object, such as a person, belong in one split: see "
        "source.options.split_by"
        for split, count in manifest.repeated.items()
        if count >= max(REPEATED * manifest.rows(split), 1)
    ]
