"""Shard folders: whether `dmtg shard` may write to a folder, and which of its files it may remove.

A folder that is not empty is written to only if it holds a record of shards: a manifest, a note in `_parts/`, or
the list of files that a job writes there first. Only files that a record names are removed.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipelines.config.sections import SourceSection
from pipelines.data.manifest import listed_files
from pipelines.errors import UserError
from pipelines.runs.folders import check_folder
from pipelines.storage import Location, locate

PARTS = "_parts"
JOB = "_job.json"  # in PARTS: the files that a job may have written
REFUSED = "_quarantine.jsonl"  # in PARTS: the bad samples of a job that stopped because of too many
COMMAND = "dmtg shard"
EXAMPLES = 3  # quarantined samples that a brief note keeps
THREADS = 8  # concurrent requests
SHARD = re.compile(r"(train|val|test)-\d+(-[0-9a-f]+)?\.parquet")  # earlier versions wrote no second part


@dataclass(frozen=True)
class Records:
    """Content of the records of a folder.

    Args:
        files: Names of all shards that exist or may exist.
        notes: Digest of a plan → brief notes of the shards created from it.
    """

    files: frozenset[str]
    notes: Mapping[str, Sequence[dict[str, Any]]]


def check_apart(folder: Location, source: SourceSection) -> None:
    """Check that the shards are not among the raw data, where they would be read as raw data.

    Raises:
        UserError: When both are the same folder, or the shards are below a folder of Parquet files that is read.
    """
    if not source.root:
        return
    raw, place = _whole(locate(source.root)), _whole(folder)
    if raw == place:
        raise UserError(
            "data.shards and source.root are the same folder",
            where=str(folder),
            remedy="set data.shards to a separate folder",
            wrong_use=True,
        )
    for table in _tables(source):
        read = _whole(table)
        if place[: len(read)] == read and table.is_dir():
            raise UserError(
                f"data.shards is inside {table}, and every Parquet file there is read as raw data",
                where=str(folder),
                remedy="set data.shards to a folder outside it",
                wrong_use=True,
            )


def _whole(place: Location) -> tuple[str, ...]:
    """The parts of an address, equal for all spellings of it."""
    if place.local is not None:
        return place.local.resolve().parts
    return (place.scheme, place.endpoint, *filter(None, place.path.split("/")))


def _tables(source: SourceSection) -> Iterator[Location]:
    """The tables that a reader of rows reads, which can be folders of Parquet files."""
    root, options = locate(source.root), source.options
    names = [options.get("file"), *dict(options.get("files") or {}).values()]
    named = [str(name) for name in names if name]
    if source.kind in ("table", "image_table") and not named:
        yield root
    elif source.kind in ("table", "image_table", "text"):
        yield from (root / name for name in named)


def read_records(folder: Location) -> Records:
    """The records of a folder for shards; the folder can be new.

    Raises:
        UserError: For a file, and for a folder that is not empty and has no record.
    """
    if folder.size() is None:
        folder.check_bucket()
        published, started, notes = listed_files(folder), _job_files(folder), _notes(folder)
    else:
        published, started, notes = None, None, []
    recorded = published is not None or started is not None or bool(notes)
    check_folder(folder, "data.shards", "shards", lambda: recorded, below=PARTS)
    by_digest = defaultdict(list)
    for note in notes:
        by_digest[note["digest"]].append(note)
    named = {*(published or ()), *(started or ()), *(note["shard"]["file"] for note in notes)}
    return Records(frozenset(filter(SHARD.fullmatch, named)), by_digest)


def _job_files(folder: Location) -> list[str] | None:
    held = _json(folder / PARTS / JOB)
    return held["files"] if isinstance(held, dict) and held.get("command") == COMMAND else None


def _notes(folder: Location) -> list[dict[str, Any]]:
    """The notes of shards; predictions have other notes with the same names."""
    names = [
        name for name in (folder / PARTS).files(recursive=False) if SHARD.fullmatch(name.removesuffix(".json"))
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _brief_note(folder / PARTS / name), names)
        return [note for note in found if note is not None]


def _brief_note(file: Location) -> dict[str, Any] | None:
    note = _json(file)
    return brief(note) if isinstance(note, dict) and {"digest", "shard"} <= note.keys() else None


def brief(note: Mapping[str, Any]) -> dict[str, Any]:
    """A note with `EXAMPLES` of the quarantined samples, and their number as `bad`."""
    quarantined = note.get("quarantined", [])
    return {**note, "quarantined": quarantined[:EXAMPLES], "bad": len(quarantined)}


def quarantined_in(folder: Location, shard_file: str) -> list[dict[str, str]]:
    """The quarantined samples of a shard, from its note."""
    quarantined: list[dict[str, str]] = (folder / PARTS / f"{shard_file}.json").read_json()["quarantined"]
    return quarantined


def _json(file: Location) -> Any:
    """The JSON value of a file; None if there is no file or it is not JSON."""
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def record_job(folder: Location, files: Collection[str]) -> None:
    """Record the shards that are in the folder or that the job may write."""
    (folder / PARTS / JOB).write_json({"command": COMMAND, "files": sorted(files)})


def remove_superseded(folder: Location, files: Collection[str], kept: Collection[str]) -> None:
    """Remove the recorded shards that a new manifest does not list, and then the record of the job.

    Args:
        folder: Folder of the shards.
        files: Names in the records.
        kept: Names in the manifest.
    """
    old = set(files) - set(kept)
    here = [folder / name for name in folder.files(recursive=False) if name in old]
    parts = folder / PARTS
    notes = [parts / name for name in parts.files(recursive=False) if name.removesuffix(".json") in old]
    with ThreadPoolExecutor(THREADS) as pool:
        for places in (here, notes):  # a note records its shard, so it is removed after the shard
            list(pool.map(Location.delete, places))
    (parts / REFUSED).delete()
    (parts / JOB).delete()
