"""Files of a table that is a folder: Parquet files, a Delta table, or a folder of Hugging Face's `datasets`.

| folder | is known by | columns of its own |
|---|---|---|
| Delta table | `_delta_log/` | those of its partitions |
| `DatasetDict.save_to_disk` | `dataset_dict.json` | `split`, from the names of its folders |
| `Dataset.save_to_disk` | `state.json` | `split`, if the data set has the name of one |
| Parquet files | any `.parquet` | those of `name=value/`; `split` if all files name one (`train-0.parquet`) |
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

from dmtg_core.names import listed
from dmtg_core.tables.cells import cell_text
from pipelines.data.sources.tables.arrow_stream import is_arrow
from pipelines.errors import UserError
from pipelines.storage import Location

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {**{name: name for name in SPLITS}, "valid": "val", "validation": "val", "dev": "val"}
SPLIT_COLUMN = "split"  # read if it exists and no other column is configured
DELTA_LOG = "_delta_log"
DICT_FILE, STATE_FILE = "dataset_dict.json", "state.json"  # of the folders of `datasets`
_EMPTY = "__HIVE_DEFAULT_PARTITION__"  # Hive, Spark and pandas write it for a missing value
_NUMBERED = re.compile(r"(.+?)[-_]\d+(-of-\d+)?(-[0-9a-f]+)?")  # as `train-00000-of-00004-0123456789abcdef`
_UNSUPPORTED = ("deletionVectors", "columnMapping")  # features of Delta that change what a file holds


@dataclass(frozen=True)
class Part:
    """A file of a table: its path below the folder, and the columns that have one value in it."""

    file: str
    more: Mapping[str, str] = field(default_factory=dict)


def split_name(value: str) -> str | None:
    """The split of a common name ("valid", "dev", …); None for any other name."""
    return _SPLIT_NAMES.get(value.lower())


def is_parquet(name: str) -> bool:
    """Whether a file is Parquet by its name."""
    return name.lower().endswith((".parquet", ".pq"))


def is_table_folder(folder: Location) -> bool:
    """Whether a folder is a Delta table or was written by `save_to_disk`."""
    return (folder / DELTA_LOG).is_dir() or any((folder / name).exists() for name in (DICT_FILE, STATE_FILE))


def table_parts(folder: Location) -> list[Part]:
    """The files of a table, in order.

    Raises:
        UserError: When there are none, and for a Delta table that cannot be read.
    """
    if (folder / DELTA_LOG).is_dir():
        return _delta(folder)
    if (folder / DICT_FILE).exists():
        return [part for name in _read(folder, DICT_FILE, "splits") for part in _saved(folder, str(name))]
    if (folder / STATE_FILE).exists():
        return _saved(folder, "")
    files = [name for name in folder.files() if is_parquet(name)]
    if not files:
        raise UserError(
            "no Parquet file in the folder",
            where=str(folder),
            remedy="correct source.root, or name the table with source.options.file",
        )
    splits = {file: path_split(file) for file in files}
    named = None not in splits.values()
    if not named and any(splits.values()):
        without = listed(file for file, split in splits.items() if split is None)
        logger.warning("%s: no split in the name of %s: names of files are not read as splits", folder, without)
    return [Part(file, ({SPLIT_COLUMN: str(splits[file])} if named else {}) | partition(file)) for file in files]


def path_split(path: str) -> str | None:
    """The split that the name of a file or one of its folders is; None if neither is one."""
    *folders, last = path.split("/")
    stem = PurePosixPath(last).name.partition(".")[0]
    numbered = _NUMBERED.fullmatch(stem)
    for name in (numbered[1] if numbered else stem, *reversed(folders)):
        if split := split_name(name):
            return split
    return None


def partition(path: str) -> dict[str, str]:
    """The columns that the folders of a path name, as `split=train/part.parquet` does."""
    pairs = [folder.partition("=") for folder in path.split("/")[:-1] if "=" in folder.strip("=")]
    return {unquote(name): "" if value == _EMPTY else unquote(value).strip() for name, _, value in pairs}


def _saved(folder: Location, name: str) -> list[Part]:
    """The files of one data set that `save_to_disk` wrote."""
    place = folder / name if name else folder
    files = [str(file["filename"]) for file in _read(place, STATE_FILE, "_data_files")]
    unknown = [file for file in files if not is_arrow(file)]
    if unknown or not files:
        raise UserError(
            f"expected Arrow files, got {unknown[0]}" if unknown else "the data set has no files",
            where=str(place / STATE_FILE),
            remedy="write the data set again with save_to_disk",
        )
    split = name or str(_read(place, STATE_FILE, "_split", None))
    more = {SPLIT_COLUMN: split} if name or split_name(split) else {}
    return [Part(f"{name}/{file}" if name else file, more) for file in files]


def _read(folder: Location, name: str, key: str, *other: Any) -> Any:
    """A value of a JSON file of `datasets`."""
    held = (folder / name).read_json()
    if not isinstance(held, dict) or (key not in held and not other):
        raise UserError(
            f"no {key} in the file", where=str(folder / name), remedy="write the data set again with save_to_disk"
        )
    return held.get(key, *other)


def _delta(folder: Location) -> list[Part]:
    """The files of the latest version of a Delta table; its log says which they are."""
    try:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError
    except ImportError as error:
        raise UserError(
            "a Delta table needs the package deltalake, which is not installed",
            where=str(folder),
            remedy="pip install 'dmtg[sources]'",
        ) from error
    plain = {"AWS_ALLOW_HTTP": "true"} if folder.endpoint.startswith("http://") else None
    try:
        table = DeltaTable(str(folder), storage_options=plain)
        features = table.protocol().reader_features or ()
        actions = table.get_add_actions(flatten=True)
    except (DeltaError, OSError) as error:
        raise UserError(
            f"cannot read the Delta table: {error}", where=str(folder), remedy="correct the table or source.root"
        ) from error
    _check_delta(folder, features)
    held: dict[str, list[Any]] = {name: list(actions.column(name).to_pylist()) for name in actions.schema.names}
    return _delta_parts(folder, held)


def _check_delta(folder: Location, features: Sequence[str]) -> None:
    found = [name for name in _UNSUPPORTED if name in features]
    if found:
        raise UserError(
            f"the Delta table uses {', '.join(found)}, which cannot be read",
            where=str(folder),
            remedy="write its rows to a table without (deletion vectors: REORG TABLE … APPLY (PURGE))",
        )


def _delta_parts(folder: Location, actions: Mapping[str, Sequence[Any]]) -> list[Part]:
    paths = [str(path) for path in actions["path"]]
    if not paths:
        raise UserError("the Delta table has no rows", where=str(folder), remedy="add rows")
    away = next((path for path in paths if "://" in path), "")
    if away:
        raise UserError(
            f"a file of the Delta table is elsewhere: {away}",
            where=str(folder),
            remedy="copy the table as a whole (a deep clone)",
        )
    columns = {name.removeprefix("partition."): actions[name] for name in actions if name.startswith("partition.")}
    parts = [
        Part(path, {name: cell_text(values[i]) for name, values in columns.items()})
        for i, path in enumerate(paths)
    ]
    return sorted(parts, key=lambda part: part.file)
