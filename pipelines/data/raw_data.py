"""Identity of raw data: of the files that a reader reads, and of the options with which they become shards.

Shards record it. A command that can read the raw data compares it, without reading terabytes: a table of up to
`CHEAP_BYTES` is compared by content, any other file by its name, its size and the time of its last change. Of a
folder, `SAMPLED` files are compared by content too, because copies can have the sizes and times of other files.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow.fs as pafs

from dmtg_core.addresses import full_name, recorded
from dmtg_core.names import listed
from pipelines.config.sections import KINDS, DataSection, SourceSection
from pipelines.data.sources.base import Source
from pipelines.storage import Location, locate

FORMAT = 1  # of the code that creates shards: raise it when the same raw data becomes other shards
CHEAP_BYTES = 64 * 2**20
SAMPLED = 8
MOST_FILES = 200_000  # files of a folder that are listed: a larger folder is compared by the first of them
IN_PLANS = ("table", "text")  # kinds whose plans hold every cell, so that a plan needs no files for its identity
_LISTERS = 16
Identity = dict[str, Any]
File = tuple[str, int, int]  # name, bytes, and the time of the last change in nanoseconds


def identity(source: Source, section: SourceSection, data: DataSection) -> Identity:
    """The identity of the raw data of a configuration, JSON-ready.

    Args:
        source: The reader.
        section: Its kind, root and options.
        data: Names the shards whose encoding is used.

    Returns:
        `format`, `kind`, `root` (as written), `options`, `like`, and of the files `digest`, `count` and `bytes`.
        `folders` is the digest of the files on whose content a shard depends beyond the plan of its samples.
        `code` is the digest of the source of a reader of another package, else empty.

    Raises:
        UserError: When a folder cannot be listed.
    """
    every, below, named, count, size = hashlib.sha256(), hashlib.sha256(), False, 0, 0
    for name, length, stamp in _described(source.raw()):
        line = json.dumps([name, length, stamp]).encode()
        every.update(line)
        if name:
            below.update(line)
            named = True
        count, size = count + 1, size + length
    code = recorded("source", full_name("source", section.kind)).sha256[:16] if section.kind not in KINDS else ""
    folders = below.hexdigest()[:16] if named and section.kind not in IN_PLANS else ""
    return {
        "format": FORMAT,
        "kind": section.kind,
        "root": section.root,
        "options": json.loads(json.dumps(section.options, default=str)),
        "like": data.like,
        "digest": every.hexdigest()[:16],
        "folders": folders + code,
        "code": code,
        "count": count,
        "bytes": size,
    }


def _described(places: Sequence[Location]) -> Iterator[tuple[str, int, Any]]:
    """Names, sizes and stamps (a time, or the digest of the content) of files and of the files of folders.

    A file that is named on its own has no name here: a copy of it under another name is the same data.
    """
    folders = []
    for place in places:
        size = place.size()
        if size is None:
            folders.append(place)
        else:
            yield "", size, _digest(place) if size <= CHEAP_BYTES else _stamp(place)
    for number, (place, name, length, stamp) in enumerate(islice(_walk(folders), MOST_FILES)):
        content = _digest(place / name) if number < SAMPLED and length <= CHEAP_BYTES else ""
        yield name, length, f"{stamp} {content}"


def _digest(file: Location) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _stamp(place: Location) -> int:
    return int(place.filesystem.get_file_info(place.path).mtime_ns or 0)


def _walk(places: Sequence[Location]) -> Iterator[tuple[Location, str, int, int]]:
    """The files below folders, folder by folder in the order of their names, without hidden ones.

    Yields:
        Place, name from there, bytes, and the time of the last change in nanoseconds.
    """
    waiting = deque((place, "") for place in places)
    with ThreadPoolExecutor(_LISTERS) as pool:
        while waiting:
            some = [waiting.popleft() for _ in range(min(_LISTERS, len(waiting)))]
            found = pool.map(_listing, *zip(*some, strict=True))
            for (place, _), (files, folders) in zip(some, found, strict=True):
                yield from ((place, *file) for file in files)
                waiting.extend((place, folder) for folder in folders)


def _listing(place: Location, below: str) -> tuple[list[File], list[str]]:
    """The files and the folders of one folder, with their names from `place`."""
    path = f"{place.path}/{below}".rstrip("/")
    try:
        found = place.filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    except OSError as error:
        raise place.unreachable(error) from error
    prefix = f"{below}/" if below else ""
    shown = sorted((info for info in found if not info.base_name.startswith(".")), key=lambda info: info.base_name)
    files = [(prefix + i.base_name, int(i.size), int(i.mtime_ns or 0)) for i in shown if i.is_file]
    return files, [prefix + i.base_name for i in shown if i.type == pafs.FileType.Directory]


def differences(made: Mapping[str, Any], now: Identity) -> list[str]:
    """What has changed since shards were made, one phrase each; none if they are those of the raw data.

    The address of the raw data may differ if the files are the same.

    Args:
        made: The identity that the shards record.
        now: The identity of the raw data of the configuration.
    """
    if made["kind"] != now["kind"]:
        return [f"they are of the kind {made['kind']}, source.kind is {now['kind']}"]
    changed = []
    if made["options"] != now["options"]:
        changed.append(f"source.options differ in {listed(_keys(made['options'], now['options']))}")
    if (made["digest"], made["count"]) != (now["digest"], now["count"]):
        changed.append(f"the raw data had {made['bytes']} bytes, now {now['bytes']}, or other content")
    if made["like"] != now["like"]:
        changed.append(f"data.like was {made['like'] or 'empty'}")
    if made.get("code", "") != now["code"]:
        changed.append("the code of the reader has changed")
    if made["format"] != now["format"]:
        changed.append("another version created them")
    return changed


def _keys(some: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in {*some, *others} if some.get(key) != others.get(key))


def same_place(one: str, other: str) -> bool:
    """Whether two addresses of raw data, as written, are the same."""
    return one == other or (bool(one) and bool(other) and _whole(one) == _whole(other))


def _whole(uri: str) -> Sequence[str]:
    place = locate(uri)
    return [str(place.local.resolve())] if place.local is not None else [place.endpoint, place.path]
