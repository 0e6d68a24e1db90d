"""Whether a folder is one of shards, and which of its files `dmtg shard` may remove.

A folder that holds anything is written to only where a record of shards is in it: a manifest, a note in `_parts/`,
or the list of files that a job writes there before anything else. Only what a record names is ever removed.
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
from pipelines.storage import Location, locate

PARTS = "_parts"
JOB = "_job.json"  # in PARTS: the files that a job may have written
REFUSED = "_quarantine.jsonl"  # in PARTS: the bad samples of a job that had too many
COMMAND = "dmtg shard"
THREADS = 8  # requests at once
SHARD = re.compile(r"(train|val|test)-\d+(-[0-9a-f]+)?\.parquet")  # the second part came later
UNFINISHED = re.compile(rf"\.{re.escape(JOB)}\.[0-9a-f]{{8}}\.part")  # of a job that was killed while it wrote JOB


@dataclass(frozen=True)
class Records:
    """What the records of a folder say.

    Args:
        files: Names of all shards that are there, or may be.
        notes: Digest of a plan → the notes of shards made to it.
    """

    files: frozenset[str]
    notes: Mapping[str, Sequence[dict[str, Any]]]


def check_apart(folder: Location, source: SourceSection) -> None:
    """Stop where shards would lie among the raw data and be read as such.

    Raises:
        UserError: When the two are one place, or the shards are below a folder of Parquet files that is read.
    """
    if not source.root:
        return
    raw, place = _whole(locate(source.root)), _whole(folder)
    if raw == place:
        raise UserError(
            "data.shards and source.root are the same place",
            where=str(folder),
            remedy="set data.shards to a folder of its own",
            wrong_use=True,
        )
    for table in _tables(source):
        read = _whole(table)
        if place[: len(read)] == read and table.is_dir():
            raise UserError(
                f"data.shards is inside {table}, of which every Parquet file is read as raw data",
                where=str(folder),
                remedy="set data.shards to a folder outside of it",
                wrong_use=True,
            )


def _whole(place: Location) -> tuple[str, ...]:
    """The parts of an address, the same for all ways to write it."""
    if place.local is not None:
        return place.local.resolve().parts
    return (place.scheme, *filter(None, place.path.split("/")))


def _tables(source: SourceSection) -> Iterator[Location]:
    """What a reader of rows reads, which can be folders of Parquet files."""
    root, options = locate(source.root), source.options
    names = [options.get("file"), *dict(options.get("files") or {}).values()]
    named = [str(name) for name in names if name]
    if source.kind == "table" and not named:
        yield root
    elif source.kind in ("table", "text"):
        yield from (root / name for name in named)


def read_records(folder: Location) -> Records:
    """What is known of a folder that shards are to be written to, which can be a new one.

    Raises:
        UserError: For a file, and for a folder that holds something and no record.
    """
    if folder.size() is not None:
        raise UserError(
            "data.shards names a file",
            where=str(folder),
            remedy="set data.shards to a folder that is empty or does not exist yet",
            wrong_use=True,
        )
    folder.check_bucket()
    published, begun, notes = listed_files(folder), _job_files(folder), _notes(folder)
    if published is None and begun is None and not notes:
        _check_empty(folder)
    by_digest = defaultdict(list)
    for note in notes:
        by_digest[note["digest"]].append(note)
    named = {*(published or ()), *(begun or ()), *(note["shard"]["file"] for note in notes)}
    return Records(frozenset(filter(SHARD.fullmatch, named)), by_digest)


def _job_files(folder: Location) -> list[str] | None:
    held = _json(folder / PARTS / JOB)
    return held["files"] if isinstance(held, dict) and held.get("command") == COMMAND else None


def _notes(folder: Location) -> list[dict[str, Any]]:
    """The notes of shards; predictions have others under the same names."""
    names = [
        name for name in (folder / PARTS).files(recursive=False) if SHARD.fullmatch(name.removesuffix(".json"))
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _json(folder / PARTS / name), names)
        return [note for note in found if isinstance(note, dict) and {"digest", "shard"} <= note.keys()]


def _json(file: Location) -> Any:
    """What a file holds; None where there is no file, or it is not JSON."""
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _check_empty(folder: Location) -> None:
    """Stop where a folder without records holds anything."""
    held = [*folder.files(recursive=False), *(name for name in folder.folders() if name != PARTS)]
    below = folder / PARTS
    held += [
        f"{PARTS}/{name}"
        for name in (*below.files(recursive=False), *below.folders())
        if not UNFINISHED.fullmatch(name)
    ]
    if held:
        more = f" and {len(held) - 3} more" if len(held) > 3 else ""
        raise UserError(
            f"the folder for the shards holds {len(held)} files or folders and no record of shards: "
            f"{', '.join(held[:3])}{more}",
            where=str(folder),
            remedy="set data.shards to a folder that is empty or does not exist yet",
            wrong_use=True,
        )


def record_job(folder: Location, files: Collection[str]) -> None:
    """Write down which shards are in the folder, or may be before long."""
    (folder / PARTS / JOB).write_json({"command": COMMAND, "files": sorted(files)})


def remove_superseded(folder: Location, files: Collection[str], kept: Collection[str]) -> None:
    """Remove the shards named by records that a new manifest does not list, and last the record of the job.

    Args:
        folder: Of the shards.
        files: Names in the records.
        kept: Names in the manifest.
    """
    old = set(files) - set(kept)
    here = [folder / name for name in folder.files(recursive=False) if name in old]
    parts = folder / PARTS
    notes = [parts / name for name in parts.files(recursive=False) if name.removesuffix(".json") in old]
    with ThreadPoolExecutor(THREADS) as pool:
        for places in (here, notes):  # a note names its shard, so it goes after it
            list(pool.map(Location.delete, places))
    (parts / REFUSED).delete()
    (parts / JOB).delete()
