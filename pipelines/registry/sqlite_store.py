"""New SQLite stores of MLflow as copies of an empty one.

MLflow creates a store by all migrations of its history, which takes seconds. Its tables depend on the version of
MLflow alone. The first store that a version creates is kept, without its default experiment, in the user's cache
folder (`$XDG_CACHE_HOME/dmtg`, by default `~/.cache/dmtg`). Later stores are copies of it; MLflow adds the default
experiment to each.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

PREFIX = "sqlite:///"
STATIC = {
    "alembic_version",
    "workspaces",
    "sqlite_sequence",
}  # tables with rows that are the same in every new store


def template() -> Path:
    """The empty store of this version of MLflow; it need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dmtg" / f"mlflow-{version('mlflow')}.db"


@contextmanager
def new_store(uri: str) -> Iterator[None]:
    """Copy the empty store to a new SQLite address, or keep the store that the caller creates inside.

    Other addresses, and stores that exist, are left alone. Without a cache folder MLflow creates each store.
    """
    file = Path(uri.removeprefix(PREFIX))
    if not uri.startswith(PREFIX) or "?" in uri or file.exists():
        yield
        return
    with suppress(OSError):
        _copy(template(), file)
    yield
    with suppress(OSError, sqlite3.Error):
        if not template().exists():
            _keep(file)


def _copy(source: Path, file: Path) -> None:
    """Copy a file unless it exists; another process sees all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".dmtg-") as folder:
        copied = shutil.copyfile(source, Path(folder) / file.name)
        os.link(copied, file)


def _keep(file: Path) -> None:
    """Keep a store as the empty one, if nothing but MLflow's default experiment has been written to it."""
    template().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=template().parent) as folder:
        kept = Path(folder) / "store"
        with closing(sqlite3.connect(file)) as held, closing(sqlite3.connect(kept)) as made:
            held.backup(made)
            made.execute("DELETE FROM experiments WHERE experiment_id = 0 AND name = 'Default'")
            made.commit()
            empty = not _filled(made) - STATIC
        if empty:
            kept.replace(template())


def _filled(store: sqlite3.Connection) -> set[str]:
    """The tables that have rows."""
    return {line.split('"')[1] for line in store.iterdump() if line.startswith("INSERT INTO ")}
