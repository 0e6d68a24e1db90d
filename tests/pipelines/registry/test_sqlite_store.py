"""A new SQLite store is a copy of the empty store that MLflow created before it."""

import sqlite3
from contextlib import closing

import pytest

from pipelines.config.sections import TrackSection
from pipelines.registry.sqlite_store import new_store, template
from pipelines.registry.tracking import connect


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(folder, monkeypatch):
    """The client and the file of a store in a folder of its own."""
    folder.mkdir()
    monkeypatch.chdir(folder)  # MLflow puts artifacts into the current folder
    file = folder / "mlflow.db"
    return connect(TrackSection(uri=f"sqlite:///{file}")), file


def tables(file):
    with closing(sqlite3.connect(file)) as store:
        return sorted(store.execute("SELECT type, name, sql FROM sqlite_master").fetchall())


def test_a_copied_store_has_the_tables_that_mlflow_creates_and_its_own_experiment(tmp_path, monkeypatch):
    client, created = opened(tmp_path / "first", monkeypatch)
    client.create_experiment("mine")
    assert template().exists()
    with closing(sqlite3.connect(template())) as store:
        store.execute("CREATE TABLE mark (x)")  # shows that the second store is a copy
    client, copied = opened(tmp_path / "second", monkeypatch)
    assert tables(copied) == sorted([*tables(created), ("table", "mark", "CREATE TABLE mark (x)")])
    (default,) = client.search_experiments()
    assert (default.experiment_id, default.name) == ("0", "Default")
    assert default.artifact_location == str(tmp_path / "second" / "mlruns" / "0")
    run = client.create_run("0")
    client.log_metric(run.info.run_id, "score", 1.5)
    assert client.get_run(run.info.run_id).data.metrics == {"score": 1.5}


def store_of(file, *statements):
    with closing(sqlite3.connect(file)) as store:
        for statement in statements:
            store.execute(statement)
        store.commit()


def test_a_store_with_other_rows_is_not_kept(tmp_path):
    file = tmp_path / "mlflow.db"
    with new_store(f"sqlite:///{file}"):
        store_of(
            file,
            "CREATE TABLE experiments (experiment_id, name)",
            "INSERT INTO experiments VALUES (0, 'Default')",
            "CREATE TABLE runs (x)",
            "INSERT INTO runs VALUES (1)",
        )
    assert not template().exists()


def test_a_store_that_exists_is_left_alone(tmp_path):
    file = tmp_path / "mlflow.db"
    store_of(file, "CREATE TABLE mine (x)")
    before = file.read_bytes()
    with new_store(f"sqlite:///{file}"):
        assert file.read_bytes() == before
    assert not template().exists()


@pytest.mark.parametrize("uri", ["http://server:5000", "postgresql://server/db", "sqlite:///new.db?mode=memory"])
def test_other_addresses_are_left_alone(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_store(uri):
        assert not list(tmp_path.iterdir())
    assert not template().exists()


def test_a_cache_that_cannot_be_written_does_not_stop_mlflow(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    file = tmp_path / "mlflow.db"
    with new_store(f"sqlite:///{file}"):
        store_of(file, "CREATE TABLE experiments (experiment_id, name)")
    assert file.exists()
