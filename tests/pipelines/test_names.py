"""Names of tasks and classes in any script and length are shown as in the file; narrower stores have keys."""

from __future__ import annotations

import csv
import json
import logging
import unicodedata
from collections.abc import Callable, Sequence
from html import unescape
from itertools import product
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param_name, _validate_tag_name
from typer.testing import CliRunner

from dmtg_core.names import key_of
from dmtg_core.tables.cells import cell_number
from dmtg_core.tasks import Task
from pipelines.cli.app import app
from pipelines.config.loading import load_config
from pipelines.config.sections import TrackSection
from pipelines.data.sources.labels import LabelTask, label_targets
from pipelines.data.sources.rows import Row
from pipelines.data.sources.tables.flags import NO, YES
from pipelines.errors import UserError
from pipelines.registry.tracking import NAME_TAG, connect
from pipelines.runs.files import REPORT, RESULT
from pipelines.serving.columns import columns_of
from pipelines.serving.fitting import same_tasks
from pipelines.storage import locate

RUNNER = CliRunner()
QUESTION = ("Wie zufrieden sind Sie alles in allem mit Ihrer Arbeit, Ihrer Familie und Ihrer Freizeit? " * 4)[:294]
NAMES = ("价格", "Цена, в рублях", "السعر\u200f الكلي", "a/b 50 % <i>$x$</i>", "two\nlines", QUESTION)


@given(st.text(max_size=300))
def test_mlflow_takes_the_key_of_every_name(name: str) -> None:
    key = key_of(name)
    for place in (f"search_start_0/{key}/balanced_accuracy", f"regroup.limits.{key}", NAME_TAG + key):
        assert len(place) <= 250
        for validate in (_validate_metric_name, _validate_param_name, _validate_tag_name):
            validate(place)


# ---------------------------------------------------------------- from a table to predictions


def write_table(file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out)
        table.writerow(["x", "y", *NAMES, "等级", "Größe", "split"])
        for i in range(90):
            x, y = (i * 7 % 90) / 90, (i * 31 % 90) / 90
            split = "train" if i < 50 else "val" if i < 70 else "test"
            numbers = [f"{x + n * y:.3f}" for n in range(len(NAMES))]
            table.writerow([x, y, *numbers, "低中高"[int(3 * x)], "groß" if y > 0.6 else "klein", split])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a configuration that has been trained with `dmtg`, and what `dmtg train` returned."""
    folder = tmp_path_factory.mktemp("names")
    write_table(folder / "t.csv")
    tasks: list[dict[str, Any]] = [{"column": name, "kind": "regression"} for name in NAMES]
    tasks += [{"column": "等级", "kind": "multiclass", "one_vs_rest": "all"}]
    tasks += [{"column": "Größe", "kind": "binary", "positive": ["groß"]}]
    values = {
        "name": "names",
        "source": {"kind": "table", "root": str(folder / "t.csv"), "options": {"tasks": tasks}},
        "data": {"shards": str(folder / "shards"), "min_support": 2},
        "network": {"encoder": "mlp", "groups": 2, "options": {"widths": [4]}},
        "train": {"epochs": 2, "batch_size": 16},
        "search": {"method": "dmtg"},
        "regroup": {"limits": {QUESTION: 3.0, NAMES[0]: 2.0}},
        "track": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
        "run": {"root": str(folder / "runs")},
        "ray": {"executor": "embedded"},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    command("shard", folder)
    return folder, command("train", folder)


def command(name: str, folder: Path, *more: str) -> dict[str, Any]:
    done = RUNNER.invoke(app, [name, *more, "-c", str(folder / "c.yaml"), "--json"])
    assert done.exit_code == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


ALL = (*NAMES, "等级.低", "等级.中", "等级.高", "Größe")


def test_names_are_shown_as_in_the_file(trained: tuple[Path, dict[str, Any]]) -> None:
    _, found = trained
    run = locate(found["run_dir"])
    assert {task for group in found["grouping"].values() for task in group} == set(ALL)
    assert all(json.dumps(name, ensure_ascii=False) in (run / RESULT).read_text() for name in ALL)
    page = unescape((run / REPORT).read_text())
    for name in ALL:
        assert name in page
        assert key_of(name) == name or key_of(name) not in page


def test_mlflow_has_a_key_for_each_name_and_the_names(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, found = trained
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    run = client.get_run(found["run_id"])
    assert run.info.status == "FINISHED"
    assert {key.split("/")[2] for key in run.data.metrics if key.startswith("loss/test/")} == set(map(key_of, ALL))
    told = {key.removeprefix(NAME_TAG): name for key, name in run.data.tags.items() if key.startswith(NAME_TAG)}
    assert told == {key_of(name): name for name in ALL if key_of(name) != name}
    assert run.data.params[f"regroup.limits.{key_of(QUESTION)}"] == "3.0"
    version = client.get_model_version("names", "1")
    assert json.loads(version.tags["dmtg.headline"]).keys() == set(ALL)
    assert all(name in version.tags["dmtg.tasks"] for name in ALL)
    assert "价格" in version.tags["dmtg.groups"]


def test_predictions_and_served_answers_have_the_names(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    predicted = command("predict", folder, "models:/names/1", "--out", str(folder / "out"))
    (file,) = (folder / "out").rglob("*.parquet")
    shares = {"等级.低.低", "等级.中.中", "等级.高.高", "Größe.groß"}
    frame = pd.read_parquet(file)
    assert set(frame.columns) == {"id", *ALL} | shares
    assert set(frame["Größe"]) <= {"groß", "klein"}
    assert predicted["status"] == "done"
    connect(TrackSection(uri=f"sqlite:///{folder / 'mlflow.db'}"))
    model = mlflow.pyfunc.load_model("models:/names/1")
    answer = model.predict(pd.DataFrame({"x": [0.1, 0.9], "y": [0.2, 0.3]}))
    assert set(answer) == set(ALL) | shares
    assert all((answer["Größe.groß"] == answer["Größe"]).tolist())


# ---------------------------------------------------------------- names of columns and of classes


def targets_of(tasks: Sequence[dict[str, Any]], *rows: dict[str, str]) -> list[Task]:
    samples = [(Row(number, cells), "train") for number, cells in enumerate(rows, start=1)]
    found = label_targets([LabelTask(**task) for task in tasks], samples, "t.csv")
    return [target.task for target in found]


@pytest.mark.parametrize("other", [unicodedata.normalize("NFD", "Größe"), " Größe", "Größe\n"])
def test_names_that_look_the_same_are_refused_with_their_columns(other: str) -> None:
    tasks = [{"column": "Größe", "kind": "regression"}, {"column": other, "kind": "regression"}]
    row = {"Größe": "1", other: "2"}
    with pytest.raises(
        UserError, match="got Größe more than once, in different forms: column 'Größe', "
    ) as caught:
        targets_of(tasks, row)
    assert "name: …" in caught.value.remedy
    named = targets_of([tasks[0], {**tasks[1], "name": "Grösse 2"}], row)
    assert [task.name for task in named] == ["Größe", "Grösse 2"]


def test_a_column_without_a_name_needs_one() -> None:
    with pytest.raises(UserError, match="a task has no name: column ''"):
        targets_of([{"column": "", "kind": "regression"}], {"": "1"})
    with pytest.raises(ValueError, match="at least one character"):
        LabelTask(column="a", kind="regression", name=" ")


def test_names_that_a_store_could_take_for_one_are_told(caplog: pytest.LogCaptureFixture) -> None:
    tasks = [{"column": name, "kind": "regression"} for name in ("Straße", "STRASSE", "other", "a.x")]
    tasks += [{"column": "a", "kind": "multiclass"}]
    with caplog.at_level(logging.WARNING):
        targets_of(tasks, *({"Straße": "1", "STRASSE": "2", "other": "3", "a.x": "1", "a": one} for one in "xy"))
    assert "differ only in case, which some databases take for one: Straße, STRASSE" in caplog.text
    assert "two columns a.x" in caplog.text


def words(cells: Sequence[str], **options: Any) -> tuple[str, ...]:
    (task,) = targets_of([{"column": "a", "kind": "binary", **options}], *({"a": cell} for cell in cells))
    return task.labels


def test_the_values_of_a_binary_task_keep_their_words() -> None:
    assert words(["yes", "no", ""]) == ("no", "yes")
    assert words(["groß", "klein", "klein"], positive=["groß"]) == ("klein", "groß")
    assert words(["1", "2"], positive=["2"]) == ("1", "2")
    assert words(["a", "b", "c"], positive=["b"]) == ("rest", "b")
    assert words(["a", "b", "c"], positive=["b", "c"]) == ("a", "b, c")


@pytest.mark.parametrize("form", [str, str.capitalize, str.upper])
def test_yes_and_no_keep_their_words_in_every_language(form: Callable[[str], str]) -> None:
    for yes, no in product(YES, NO):
        if cell_number(yes) is None and cell_number(no) is None:
            rows = [{"a": form(yes)}, {"a": form(no)}, {"a": ""}, {"a": form(yes)}]
            samples = [(Row(number, cells), "train") for number, cells in enumerate(rows, start=1)]
            (target,) = label_targets([LabelTask(column="a", kind="binary")], samples, "t.csv")
            assert target.task.labels == (form(no), form(yes))
            assert list(columns_of(target.task)) == ["a", f"a.{form(yes)}"]
            values = [target.value(row) for row, _ in samples]
            assert [None if value is None else value.item() for value in values] == [1, 0, None, 1]


@pytest.mark.parametrize("cells", [["0", "1"], ["1.0", "0.0"], ["yes", "true", "no"], ["yes"]])
def test_numbers_and_mixed_words_name_no_values(cells: list[str]) -> None:
    assert words(cells) == ()


def test_a_model_of_older_shards_which_name_no_flags_is_the_same_task() -> None:
    older, newer = Task("a", "binary"), Task("a", "binary", labels=("no", "yes"))
    same_tasks([older], [newer], "models:/m/1")
    with pytest.raises(UserError, match="labels"):
        same_tasks([Task("a", "binary", labels=("yes", "no"))], [newer], "models:/m/1")


def test_an_override_of_a_task_can_have_dots() -> None:
    limits = load_config("rooms", ["regroup.limits.grade.A=3", "regroup.limits.价格=2"]).regroup.limits
    assert limits == {"grade.A": 3.0, "价格": 2.0}
