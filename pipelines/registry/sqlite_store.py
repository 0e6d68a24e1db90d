"""New SQLite stores of MLflow, put in place whole; and what is wrong with one that MLflow cannot open.

MLflow creates a store in place, by all migrations of its history. That takes seconds, and an interruption or a
second process leaves a file that can never be opened. Here a store is created once for each version of MLflow, in
the user's cache folder (`$XDG_CACHE_HOME/dmtg`, by default `~/.cache/dmtg`), and copied to each new address. The
copy appears under its name when it is complete. Of several processes one puts its copy in place.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.scratch import temporary_folder

PREFIX = "sqlite:///"
STATIC = {"alembic_version", "workspaces", "sqlite_sequence"}  # tables with rows that every new store has
HALF = "_alembic_tmp_"  # prefix of tables that exist during a migration


def template() -> Path:
    """The empty store of this version of MLflow; it need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dmtg" / f"mlflow-{version('mlflow')}-store.db"


def ensure_store(uri: str) -> None:
    """Create the store of an SQLite address, or check the one that exists. Other addresses are left alone.

    Raises:
        UserError: When the file is not a store, is incomplete, or was created by another version of MLflow.
    """
    if not uri.startswith(PREFIX) or "?" in uri:
        return
    file = Path(uri.removeprefix(PREFIX))
    if file.exists():
        _check(file, uri)
        return
    with suppress(OSError, UserError), interrupts_deferred():  # MLflow reports a folder that cannot be written to
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(file.parent) as folder:
            made = folder / file.name
            _copy_template(made)
            _put(made, file)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Deliver Ctrl-C and SIGTERM after the block: libraries inside it may drop the error that they raise."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    held: dict[signal.Signals, Any] = {}
    for one in (signal.SIGINT, signal.SIGTERM):
        held[one] = signal.signal(one, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for one, handler in held.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)
        if received:
            signal.raise_signal(received[0])


def _copy_template(file: Path) -> None:
    """Copy the template to a file; without a cache folder, create the store there."""
    if not template().exists():
        try:
            template().parent.mkdir(parents=True, exist_ok=True)
            with temporary_folder(template().parent) as folder:
                made = folder / "store"
                _create(made)
                made.replace(template())
        except (OSError, UserError):
            _create(file)
    if not file.exists():
        shutil.copyfile(template(), file)
    _set_root(file)


def _create(file: Path) -> None:
    """Create a store by all migrations of MLflow."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"{PREFIX}{file}", str(file.parent))
    store.engine.dispose()


def _set_root(file: Path) -> None:
    """Give the default experiment of a store the location and the times that MLflow gives to a new one."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.utils.uri import resolve_uri_if_local

    now = int(time.time() * 1000)
    with closing(sqlite3.connect(file)) as store:
        store.execute(
            "UPDATE experiments SET artifact_location = ?, creation_time = ?, last_update_time = ?"
            " WHERE experiment_id = 0",
            (f"{resolve_uri_if_local(DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)}/0", now, now),
        )
        store.commit()


def _put(made: Path, file: Path) -> None:
    """Give a complete file its name, unless another process has done so."""
    try:
        os.link(made, file)
    except FileExistsError:
        return
    except OSError:  # a filesystem without hard links
        if not file.exists():
            made.replace(file)


def _check(file: Path, uri: str) -> None:
    """Check that MLflow can open a store.

    Raises:
        UserError: See `ensure_store`.
    """
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as store:
            known = _revision(template())
            if known and _revision_in(store) == known:
                return
            problem, remedy = _problem(store, file, uri)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # locked, or not readable: MLflow waits, and reports it
            return
        problem, remedy = f"the file is not an SQLite database ({error})", "give another track.uri"
    if problem:
        raise UserError(problem, where=str(file), remedy=remedy)


def _revision(file: Path) -> str:
    """The revision of the tables of a store; empty without a store."""
    if not file.exists():
        return ""
    with closing(sqlite3.connect(file)) as store:
        return _revision_in(store)


def _revision_in(store: sqlite3.Connection) -> str:
    if "alembic_version" not in _tables(store):
        return ""
    found = store.execute("SELECT version_num FROM alembic_version").fetchone()
    return str(found[0]) if found else ""


def _problem(store: sqlite3.Connection, file: Path, uri: str) -> tuple[str, str]:
    """What is wrong with a store, and the remedy; empty texts if nothing is."""
    tables, revision = _tables(store), _revision_in(store)
    if tables and not tables & {"alembic_version", "experiments"}:
        return "", ""  # the tables of another program, beside which MLflow creates its own
    age = _age(revision)
    begun = any(name.startswith(HALF) for name in tables)
    if age == "current" and not begun:
        return "", ""
    if not _filled(store):
        return (
            "MLflow's database is incomplete: its creation was interrupted. No run and no model is in it",
            f"delete the file {file}: the same command creates it again",
        )
    if age == "newer":
        return (
            f"MLflow's database was written by another version than {version('mlflow')}, probably a newer one",
            "use that version of MLflow, or another track.uri",
        )
    if begun:
        return (
            "an upgrade of MLflow's database was interrupted",
            "put back the copy from before the upgrade, then run mlflow db upgrade again",
        )
    return (
        "MLflow's database was written by an earlier version of MLflow",
        f"copy the file, then run mlflow db upgrade {uri}",
    )


def _age(revision: str) -> str:
    """Whether a revision is that of this MLflow (current), an earlier one (older), or unknown to it (newer)."""
    import mlflow
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    if not revision:
        return "older"
    scripts = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    if revision in scripts.get_heads():
        return "current"
    try:
        scripts.get_revision(revision)
    except CommandError:
        return "newer"
    return "older"


def _tables(store: sqlite3.Connection) -> set[str]:
    return {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _filled(store: sqlite3.Connection) -> bool:
    """Whether a store has more rows than a new one, which has the default experiment."""
    rows = (line.split('"')[1].removeprefix(HALF) for line in store.iterdump() if line.startswith("INSERT INTO "))
    experiments = 0
    for table in rows:
        experiments += table == "experiments"
        if table not in {*STATIC, "experiments"} or experiments > 1:
            return True
    return False
