"""Reader of WebDataset: tar files in which the files of a sample have one name and follow each other.

```
root/train-000.tar, train-001.tar, val-000.tar, …      or root/train/000.tar, root/val/000.tar, …
    0001.jpg  0001.json  0001.cls  0002.jpg  …
```

A tar file is read once for its names and labels. The image of a sample is a range of bytes of the tar file, which
is read when it is needed. A local tar file is not read as a whole for the names; one in object storage is.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, partial
from itertools import groupby, islice
from typing import Any, Literal

from pydantic import Field

from dmtg_core.names import listed
from dmtg_core.tables.cells import cell_text
from pipelines.config.validation import checked
from pipelines.data.sources.base import Entry
from pipelines.data.sources.labelled_images.base import LabelledImages, LabelledOptions
from pipelines.data.sources.labelled_images.options import with_validation
from pipelines.data.sources.labels import kept_rows, label_markers, without_markers
from pipelines.data.sources.row_splits import hash_split
from pipelines.data.sources.rows import check_root, with_ids
from pipelines.data.sources.tables.folders import path_split
from pipelines.data.sources.tables.row import ImageRow, Row, check_header
from pipelines.errors import UserError
from pipelines.storage import Location

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp")
JSON = "json"
TEXTS = ("cls", "txt", "text", "id")  # files whose content is a cell
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # key and extension; hidden files have neither
MOST_FILES = 64  # tar files whose first samples are read for a new configuration
LARGEST = 2**24  # bytes of a file of labels
KEY = "__key__"  # as WebDataset calls it


@dataclass(frozen=True)
class Member:
    """A file in a tar file: the key of its sample, its ending, its bytes in the tar file, and those of labels."""

    key: str
    ending: str
    start: int
    size: int
    content: bytes


class WebDatasetOptions(LabelledOptions):
    """The tar files of each split, the files of a sample and the tasks.

    `files` has a pattern of paths below the root for each split, such as `{train: "train-*.tar"}`. Without it,
    the split is the one that folders or names of tar files have, else it follows from the hash of the id, which is
    the tar file and the key. `images` are the endings of images; the first that a sample has is read. The columns
    of a sample are the keys of its `json` object, and the contents of its `cls`, `txt`, `text` and `id`. A sample
    that lacks a column has no such label. `val_share` of the training samples are for validation, by the hash of
    their ids.

    Images are stored `size` × `size`, as by the reader `folder`.
    """

    files: dict[Literal["train", "val", "test"], str] | None = Field(None, min_length=1)
    images: tuple[str, ...] = Field(IMAGES, min_length=1)


class WebDatasetSource(LabelledImages):
    """Reads tar files. See `WebDatasetOptions` for the options.

    Raises:
        UserError: For a wrong option, and for a root that does not exist.
    """

    _options: WebDatasetOptions

    def __init__(self, root: Location, options: Mapping[str, Any]) -> None:
        self._options = checked(WebDatasetOptions, options, "source.options")
        self._where = root
        check_root(root, "<split>-<number>.tar or <split>/<number>.tar")

    def raw(self) -> Sequence[Location]:
        """See `Source.raw`."""
        return (self._where,)

    @cached_property
    def _tars(self) -> list[tuple[str, str | None]]:
        """The tar files and their splits; None if the samples are split by the hash of their ids."""
        patterns = self._options.files
        if patterns is None:
            return split_tars(self._where)
        tars = [name for name in self._where.files() if name.lower().endswith(".tar")]
        for split, pattern in patterns.items():
            if not any(fnmatch(tar, pattern) for tar in tars):
                raise UserError(
                    f"no tar file of {split} matches {pattern!r}",
                    where=str(self._where),
                    remedy=f"correct source.options.files; there are {listed(tars) or 'no tar files'}",
                )
        chosen = ((tar, [s for s, pattern in patterns.items() if fnmatch(tar, pattern)]) for tar in tars)
        return [(tar, splits[0]) for tar, splits in chosen if splits]

    def _listed(self, first: bool) -> Iterator[Entry]:
        options, where, splits = self._options, str(self._where), dict(self._tars)
        columns = list(dict.fromkeys(task.column for task in options.tasks))
        rows = without_markers(self._rows(columns), label_markers(options.tasks))
        for row, name in kept_rows(with_ids(rows, KEY, "", where), options.tasks, where, log=first):
            split = splits[row.image["file"]] or hash_split(name)
            cells = {column: row.cells[column] for column in columns}
            fields = {"row": Row(row.line, cells, row.unit, row.problem), "image": row.image}
            yield Entry(name, with_validation(split, name, options.val_share), fields)

    def _rows(self, columns: Sequence[str]) -> Iterator[ImageRow]:
        """The samples of all tar files. Their cells are the wanted columns, and their id.

        Raises:
            UserError: After the last sample, for a column that no sample has.
        """
        seen: set[str] = set()
        for tar, _ in self._tars:
            members = tar_members(self._where / tar)
            for number, (key, files) in enumerate(groupby(members, key=lambda member: member.key), start=1):
                held = list(files)
                cells, problem = _cells(held)
                seen |= cells.keys()
                wanted = {column: cells.get(column, "") for column in columns}
                yield ImageRow(
                    number,
                    {KEY: f"{tar.removesuffix('.tar')}/{key}"} | wanted,
                    f"{tar}, sample",
                    problem,
                    {"file": tar, **self._place(held)},
                )
        if not seen:
            raise UserError("the tar files hold no samples", where=str(self._where), remedy="correct source.root")
        check_header(sorted(seen), columns, str(self._where))

    def _place(self, held: Sequence[Member]) -> dict[str, int]:
        """The range of bytes of the image of a sample; empty if it has none."""
        by_ending = {member.ending: member for member in held}
        found = [by_ending[ending] for ending in self._options.images if ending in by_ending]
        return {"start": found[0].start, "size": found[0].size} if found else {}

    def _image(self, entry: Entry) -> tuple[bytes | None, str]:
        place, name = entry.fields["image"], f"{entry.fields['row'].place}, {entry.id}"
        if "start" not in place:
            return None, name
        return (self._where / place["file"]).read_bytes(place["start"], place["size"]), name


def sample_head(root: Location, most: int) -> tuple[list[Row], set[str], bool]:
    """The labels of some samples of each tar file, as rows with the same columns.

    Args:
        root: The folder.
        most: Number of samples.

    Returns:
        The rows, the splits that the tar files name, and whether there are more samples.

    Raises:
        UserError: When there are no tar files or no samples.
    """
    found = split_tars(root)
    read = found[:: -(-len(found) // MOST_FILES)]
    more = len(read) < len(found)
    cells: list[dict[str, str]] = []
    for tar, _ in read:
        samples = groupby(tar_members(root / tar), key=lambda member: member.key)
        cells += [_cells(list(held))[0] for _, held in islice(samples, max(most // len(read), 1))]
        more = more or next(samples, None) is not None
    names = list(dict.fromkeys(name for one in cells for name in one))
    if not names:
        raise UserError("the samples have no labels", where=str(root), remedy="add a .json or .cls to each sample")
    rows = [Row(i, {name: one.get(name, "") for name in names}, "sample") for i, one in enumerate(cells, start=1)]
    return rows, {split for _, split in found if split}, more


def split_tars(root: Location) -> list[tuple[str, str | None]]:
    """The tar files of a folder and the splits that their names have.

    Raises:
        UserError: When there are none, or only some of them name a split.
    """
    found = [(name, path_split(name)) for name in root.files() if name.lower().endswith(".tar")]
    _check_splits(found, str(root))
    return found


def _check_splits(tars: Sequence[tuple[str, str | None]], where: str) -> None:
    """Raise UserError if there is no tar file, or only some of them name a split."""
    if not tars:
        raise UserError("no tar file in the folder", where=where, remedy="correct source.root")
    without = [tar for tar, split in tars if split is None]
    if without and len(without) < len(tars):
        raise UserError(
            f"no split in the name of {listed(without)}",
            where=where,
            remedy="name the files of each split with source.options.files",
        )


def tar_members(location: Location) -> Iterator[Member]:
    """The files in a tar file, with the content of those of labels; one is in memory at a time.

    Raises:
        UserError: When the tar file cannot be read, or is compressed.
    """
    try:
        with _opened(location) as tar:
            for info in tar:
                vars(tar)["members"].clear()  # the library would hold the names of all files
                if info.isfile() and (match := _NAME.fullmatch(info.name)):
                    yield _member(tar, info, match[1], match[2].lower())
    except FileNotFoundError as error:
        raise UserError("the tar file does not exist", where=str(location), remedy="correct its path") from error
    except tarfile.TarError as error:
        raise UserError(
            f"the tar file is damaged or compressed: {error}",
            where=str(location),
            remedy="copy it again, or unpack a .tar.gz to .tar: parts of it are read by their position",
        ) from error


@contextmanager
def _opened(location: Location) -> Iterator[tarfile.TarFile]:
    """A tar file: with positions for a local file, as one stream from a server, which is one request."""
    filesystem, local = location.filesystem, location.local is not None
    opened = filesystem.open_input_file if local else partial(filesystem.open_input_stream, compression=None)
    with opened(location.path) as file, tarfile.open(fileobj=file, mode="r:" if local else "r|") as tar:
        yield tar


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, key: str, ending: str) -> Member:
    content = b""
    if ending in (*TEXTS, JSON) and info.size <= LARGEST and (file := tar.extractfile(info)) is not None:
        content = file.read()
    return Member(key, ending, info.offset_data, info.size, content)


def _cells(held: Sequence[Member]) -> tuple[dict[str, str], str]:
    """The cells of a sample by column, and its problem; empty if there is none."""
    cells: dict[str, str] = {}
    for member in held:
        try:
            if member.ending == JSON:
                cells |= {str(name): cell_text(value) for name, value in json.loads(member.content).items()}
            elif member.ending in TEXTS:
                cells[member.ending] = member.content.decode("utf-8").strip()
        except (ValueError, AttributeError) as error:
            kind = "JSON object" if member.ending == JSON else "text"
            return cells, f"{member.key}.{member.ending} is no {kind}: {error}"
    return cells, ""
