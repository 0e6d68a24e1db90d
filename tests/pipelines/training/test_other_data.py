"""Results belong to their data: changed data under runs, sweeps, comparisons, signals and models."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.compare.driver import compare
from pipelines.compare.signal import signal
from pipelines.config.loading import Config
from pipelines.data.manifest import read_manifest
from pipelines.data.shards import shard
from pipelines.errors import UserError
from pipelines.runs.files import IDENTITY, METRICS, RESULT, read_jsonl
from pipelines.runs.identity import earlier_verdict
from pipelines.runs.lease import FILE, Lease, only_one
from pipelines.serving.evaluate import evaluate
from pipelines.serving.predict import predict
from pipelines.storage import locate
from pipelines.sweep.driver import sweep
from pipelines.training import driver
from pipelines.training.driver import train
from tests.pipelines.changing import table_config, write_table
from tests.soak import others_in_soak

pytestmark = pytest.mark.usefixtures("plain_reports")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "table.csv")


def digest_of(config: Config) -> str:
    return read_manifest(locate(config.data.shards)).digest()


class InterruptedRunError(Exception):
    """Ends a run like a kill."""


def interrupted(config: Config, monkeypatch: pytest.MonkeyPatch, epochs: int = 1) -> Path:
    """A run that ends after some epochs; its folder."""
    real = driver.train_job

    def stopping(job: Any, executor: Any, log: Any, on_record: Any = None) -> None:
        seen = []

        def record(one: Any) -> None:
            seen.append(one)
            if len(seen) == epochs:
                raise InterruptedRunError

        real(job, executor, log, record)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "train_job", stopping)
        with pytest.raises(InterruptedRunError):
            train(config)
    (folder,) = Path(config.run.root).iterdir()
    return folder


def test_an_unfinished_run_is_not_continued_on_other_data(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = table_config(table, tmp_path, train={"epochs": 4})
    first = interrupted(config, monkeypatch, epochs=2)
    assert not (first / RESULT).exists()
    write_table(table, flip=True)
    lines: list[str] = []
    done = train(config, lines.append)
    assert any("trained on other data" in line and "not continued" in line for line in lines)
    assert done.run.name != first.name
    assert len(read_jsonl(done.run / METRICS)) == 4
    assert json.loads((done.run / IDENTITY).read_text())["data"] == digest_of(config)
    write_table(table)  # the first data again: its run continues
    assert train(config).run.name == first.name


def test_a_finished_run_on_other_data_is_trained_again_unless_reused(table: Path, tmp_path: Path) -> None:
    config = table_config(table, tmp_path)
    first = train(config)
    write_table(table, flip=True)
    lines: list[str] = []
    again = train(config, lines.append)
    assert any("trained on other data" in line for line in lines)
    assert (again.resumed, again.run.name.startswith(first.run.name)) == (False, True)
    assert again.run.name != first.run.name
    repeated = train(config)
    assert (repeated.resumed, repeated.run.name) == (True, again.run.name)
    reused = train(config, lines.append, reuse=True)
    assert (reused.resumed, reused.run.name) == (True, first.run.name)
    assert reused.result == first.result


def test_a_run_with_a_name_of_the_user_is_refused_on_other_data(table: Path, tmp_path: Path) -> None:
    config = table_config(table, tmp_path, run={"name": "mine"})
    first = train(config)
    before = {name: (first.run / name).read_bytes() for name in first.run.files()}
    write_table(table, flip=True)
    with pytest.raises(UserError, match="mine was trained on other data") as found:
        train(config)
    assert "--reuse" in found.value.remedy
    assert {name: (first.run / name).read_bytes() for name in first.run.files()} == before
    assert train(config, reuse=True).result == first.result


SWEEP = {"groups": (2,), "seeds": (1, 2), "stop_early": False}
COMPARE = {"methods": ("single_task",), "seeds": (1,)}
SIGNAL = {"partitions": 2, "seeds": (1, 2)}


COMMANDS = [(sweep, SWEEP), (compare, COMPARE), (signal, SIGNAL)]


@pytest.mark.parametrize(("command", "section"), others_in_soak(COMMANDS, *COMMANDS[:2]))
def test_results_of_many_runs_are_not_shown_on_other_data(
    table: Path, tmp_path: Path, command: Callable[..., Any], section: dict[str, Any]
) -> None:
    config = table_config(table, tmp_path, "a", "b", "c", **{command.__name__: section})
    first = command(config)
    write_table(table, flip=True)
    lines: list[str] = []
    second = command(config, lines.append)
    assert any("trained on other data" in line for line in lines)
    assert first.folder.name != second.folder.name
    assert any("to train" in line for line in lines)  # and not read from the earlier folder
    again: list[str] = []
    assert command(config, again.append).folder.name == second.folder.name
    assert not any("to train" in line for line in again)
    if command is signal:
        assert earlier_verdict(config, digest_of(config)) == second.found["verdict"]
        assert earlier_verdict(config, "another") == ""


def test_a_second_train_of_the_same_words_leaves(table: Path, tmp_path: Path) -> None:
    config = table_config(table, tmp_path)
    shard(config)
    folder = locate(config.run.root) / config.run_name()
    with only_one(folder, "test", print), pytest.raises(UserError, match="another job that trains .* is running"):
        train(config)
    assert folder.files() == []
    assert train(config).resumed is False


@pytest.mark.parametrize(("command", "section"), [(sweep, SWEEP), (compare, COMPARE)])
def test_a_second_sweep_or_comparison_leaves(
    table: Path, tmp_path: Path, command: Callable[..., Any], section: dict[str, Any]
) -> None:
    config = table_config(table, tmp_path, **{command.__name__: section})
    first = command(config)
    with (
        Lease(first.folder / FILE, 60, "test").held(),
        pytest.raises(UserError, match="another job that trains .* is running"),
    ):
        command(config)


def _train(config: Config, answers: Any) -> None:
    try:
        answers.put(("done", train(config).resumed))
    except UserError as error:
        answers.put(("left", error.what))


@pytest.mark.soak
def test_two_trains_at_once_make_one_run(table: Path, tmp_path: Path) -> None:
    config = table_config(table, tmp_path, train={"epochs": 20})
    start = multiprocessing.get_context("spawn")
    answers = start.Queue()
    both = [start.Process(target=_train, args=(config, answers)) for _ in range(2)]
    for one in both:
        one.start()
    found = sorted(answers.get() for _ in both)
    for one in both:
        one.join()
    assert found[0] == ("done", False)
    assert found[1] == ("done", True) or (found[1][0] == "left" and "is running" in str(found[1][1]))
    assert len(list(Path(config.run.root).iterdir())) == 1


def test_reversed_columns_are_refused(table: Path, tmp_path: Path) -> None:
    config = table_config(table, tmp_path)
    options = config.source.options | {"features": "all"}
    config = config.model_copy(update={"source": config.source.model_copy(update={"options": options})})
    done = train(config)
    other = write_table(tmp_path / "reversed.csv", seed=1, reverse=True)
    source = config.source.model_copy(update={"root": str(other)})
    data = config.data.model_copy(update={"shards": str(tmp_path / "reversed")})
    reverse = config.model_copy(update={"source": source, "data": data})
    shard(reverse)
    for command in (
        lambda: evaluate(reverse, str(done.run)),
        lambda: predict(reverse, str(done.run), str(tmp_path / "p")),
    ):
        with pytest.raises(UserError, match="columns in the order x1, x2, x3") as found:
            command()
        assert "data.like" in found.value.remedy
    like = reverse.model_copy(update={"data": data.model_copy(update={"like": config.data.shards})})
    shard(like)
    assert evaluate(like, str(done.run))["a"]["accuracy"] > 0


def test_limits_of_unknown_tasks_are_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="regroup.limits names d, which is no task"):
        train(table_config(table, tmp_path, regroup={"limits": {"d": 1.0}}))


def test_a_batch_beyond_the_data_is_noted(table: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    train(table_config(table, tmp_path, train={"batch_size": 500, "epochs": 1}), lines.append)
    assert any("train.batch_size=500 is more than the" in line for line in lines)


@pytest.mark.parametrize("name", ["../../x", ".", "..", "a/b", "a\nb", " a", "x" * 300])
def test_a_name_is_a_name(table: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"run\.name: .*expected a name"):
        table_config(table, tmp_path, run={"name": name})


def test_a_folder_of_other_files_is_not_written(table: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "src").mkdir(parents=True)
    (tmp_path / "runs" / "src" / "main.c").write_text("int main;")
    with pytest.raises(UserError, match="no record of a run: main.c"):
        train(table_config(table, tmp_path, run={"name": "src"}))
    done = train(table_config(table, tmp_path))
    with pytest.raises(UserError, match="no record of predictions: main.c"):
        predict(table_config(table, tmp_path), str(done.run), str(tmp_path / "runs" / "src"))
    assert [file.name for file in (tmp_path / "runs" / "src").iterdir()] == ["main.c"]
