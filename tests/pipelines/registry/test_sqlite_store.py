"""A new SQLite store is put in place whole; a file that MLflow cannot open is named with a remedy that helps."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.sections import TrackSection
from pipelines.errors import UserError
from pipelines.registry import sqlite_store
from pipelines.registry.sqlite_store import ensure_store, interrupts_deferred, template
from pipelines.registry.tracking import connect
from tests.paths import ROOT

MODELS_LIST = [sys.executable, "-m", "pipelines.cli", "models", "list", "--json"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The template of this version of MLflow, which takes seconds to create."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("made")))
        patch.chdir(tmp_path_factory.mktemp("work"))
        ensure_store("sqlite:///mlflow.db")
        yield template()


@pytest.fixture(autouse=True)
def cache(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test with the template."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    template().parent.mkdir(parents=True)
    shutil.copyfile(made, template())
    return template()


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    """The client and the file of a store in a folder of its own."""
    folder.mkdir()
    monkeypatch.chdir(folder)  # MLflow puts artifacts into the current folder
    file = folder / "mlflow.db"
    return connect(TrackSection(uri=f"sqlite:///{file}")), file


def tables(file: Path) -> list[Any]:
    with closing(sqlite3.connect(file)) as store:
        return sorted(store.execute("SELECT type, name, sql FROM sqlite_master").fetchall())


def test_a_new_store_is_a_copy_with_its_own_default_experiment(tmp_path, monkeypatch, cache) -> None:
    with closing(sqlite3.connect(cache)) as store:
        store.execute("CREATE TABLE mark (x)")  # shows that the store is a copy
    client, copied = opened(tmp_path / "second", monkeypatch)
    assert tables(copied) == tables(cache)
    (default,) = client.search_experiments()
    assert (default.experiment_id, default.name) == ("0", "Default")
    assert default.artifact_location == str(tmp_path / "second" / "mlruns" / "0")
    run = client.create_run("0")
    client.log_metric(run.info.run_id, "score", 1.5)
    assert client.get_run(run.info.run_id).data.metrics == {"score": 1.5}
    assert [path.name for path in copied.parent.iterdir()] == ["mlflow.db"]


def store_of(file: Path, *statements: str) -> None:
    with closing(sqlite3.connect(file)) as store:
        for statement in statements:
            store.execute(statement)
        store.commit()


def test_stores_that_can_be_opened_are_left_alone(tmp_path, cache) -> None:
    ours, foreign = tmp_path / "ours.db", tmp_path / "foreign.db"
    shutil.copyfile(cache, ours)
    store_of(ours, "INSERT INTO experiments (experiment_id, name) VALUES (7, 'mine')")
    store_of(foreign, "CREATE TABLE mine (x)")
    for file in (ours, foreign):
        before = file.read_bytes()
        ensure_store(f"sqlite:///{file}")
        cache.unlink(missing_ok=True)  # the second time without a template
        ensure_store(f"sqlite:///{file}")
        assert file.read_bytes() == before


RUN = "INSERT INTO runs (run_uuid, name) VALUES ('r', 'mine')"
OLDER = "UPDATE alembic_version SET version_num = '451aebb31d03'"
NEWER = "UPDATE alembic_version SET version_num = 'ffffffffffff'"
BEGUN = "CREATE TABLE _alembic_tmp_metrics (x)"


@pytest.mark.parametrize(
    ("changes", "what", "remedy"),
    [
        (("DELETE FROM alembic_version",), "incomplete", "delete the file"),
        ((OLDER, BEGUN), "incomplete", "delete the file"),
        ((OLDER, RUN), "written by an earlier version", "mlflow db upgrade sqlite:///"),
        ((NEWER, RUN), "probably a newer one", "use that version of MLflow"),
        ((OLDER, BEGUN, RUN), "an upgrade of MLflow's database was interrupted", "put back the copy"),
    ],
)
def test_a_store_that_mlflow_cannot_open_is_named_with_a_remedy(tmp_path, cache, changes, what, remedy) -> None:
    file = tmp_path / "mlflow.db"
    shutil.copyfile(cache, file)
    store_of(file, *changes)
    before = file.read_bytes()
    for _ in range(2):
        with pytest.raises(UserError, match=what) as found:
            connect(TrackSection(uri=f"sqlite:///{file}"))
        assert remedy in found.value.remedy
        assert file.read_bytes() == before
        cache.unlink(missing_ok=True)  # the second time without a template


@pytest.mark.parametrize("content", [b"", b"something else" * 100])
def test_a_file_that_is_no_database_is_named(tmp_path, content) -> None:
    file = tmp_path / "mlflow.db"
    file.write_bytes(content)
    with pytest.raises(UserError, match="incomplete" if not content else "not an SQLite database"):
        ensure_store(f"sqlite:///{file}")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also in a process that a shell has started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_of_the_creation_leaves_no_file_and_is_delivered(tmp_path, cache, monkeypatch) -> None:
    cache.unlink()
    create = sqlite_store._create
    file = tmp_path / "new" / "mlflow.db"

    def interrupted(place: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        assert not file.exists()
        create(place)

    monkeypatch.setattr(sqlite_store, "_create", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_store(f"sqlite:///{file}")
    ensure_store(f"sqlite:///{file}")
    assert connect(TrackSection(uri=f"sqlite:///{file}")).search_experiments()


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_is_delivered_after_the_block() -> None:
    done = []

    def block() -> None:
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            done.append("after the signal")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_store_of_another_process_is_kept(tmp_path, cache, monkeypatch) -> None:
    file = tmp_path / "new" / "mlflow.db"
    link = os.link

    def slower(source: Path, target: Path) -> None:
        if not target.exists():
            shutil.copyfile(cache, target)
            store_of(target, RUN)
        link(source, target)

    monkeypatch.setattr(os, "link", slower)
    ensure_store(f"sqlite:///{file}")
    with closing(sqlite3.connect(file)) as store:
        assert store.execute("SELECT name FROM runs").fetchall() == [("mine",)]


@pytest.mark.parametrize("uri", ["http://server:5000", "postgresql://server/db", "sqlite:///new.db?mode=memory"])
def test_other_addresses_are_left_alone(uri, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ensure_store(uri)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_cache_that_cannot_be_written_does_not_stop_the_creation(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(sqlite_store, "_create", lambda file: store_of(file, "CREATE TABLE made (x)"))
    monkeypatch.setattr(sqlite_store, "_set_root", lambda file: None)
    file = tmp_path / "mlflow.db"
    ensure_store(f"sqlite:///{file}")
    assert [name for _, name, _ in tables(file)] == ["made"]


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("after_s", [0.5, 1.0, 2.0, 3.0, 4.0, 6.0])
def test_after_a_kill_of_the_first_command_the_next_three_at_once_succeed(tmp_path, number, after_s) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "empty"), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(MODELS_LIST, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as first:
        try:
            first.wait(after_s)
        except subprocess.TimeoutExpired:
            first.send_signal(number)
    several = [subprocess.Popen(MODELS_LIST, cwd=tmp_path, env=environment) for _ in range(3)]
    assert [process.wait() for process in several] == [0, 0, 0]
