"""Examples of the help and printed next commands are valid command lines."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from pipelines.cli.app import PANELS, app
from pipelines.cli.console import Next
from pipelines.cli.data import _next_step as after_inspect
from pipelines.cli.options import command_line
from pipelines.cli.serve import _next_step as after_predict
from pipelines.config.loading import load_config
from tests.cluster.commands import parsed
from tests.paths import ROOT

RUNNER = CliRunner()


def examples() -> list[str]:
    return [line for commands in PANELS.values() for lines in commands.values() for line in lines]


@pytest.mark.parametrize("line", examples())
def test_every_example_of_the_help_is_a_command(line: str) -> None:
    program, *arguments = shlex.split(line.partition(" > ")[0])
    assert program == "dmtg"
    parsed(arguments)


def test_every_command_is_in_a_panel_and_shows_its_examples() -> None:
    command: Any = get_command(app)
    out = RUNNER.invoke(app, ["--help"], env={"COLUMNS": "120"}).stdout
    assert [out.index(f"─ {panel} ") for panel in PANELS] == sorted(out.index(f"─ {panel} ") for panel in PANELS)
    assert len(command.commands) == sum(len(commands) for commands in PANELS.values())
    for name in command.commands:
        shown = RUNNER.invoke(app, [name, "--help"], env={"COLUMNS": "160"}).stdout
        lines = [line for line in examples() if line.split()[1] == name]
        assert lines, name
        assert all(line in shown for line in lines), name


def last_command(logged: str) -> list[str]:
    *_, purpose, command = logged.strip().splitlines()
    assert re.fullmatch(r"next: .+", purpose)
    program, *arguments = shlex.split(command)
    assert program == "dmtg"
    return arguments


def test_arguments_of_the_next_command_are_quoted_for_a_shell(tmp_path: Path) -> None:
    table = tmp_path / "my data.csv"
    table.write_text("x,a,b\n" + "".join(f"{i * 7 % 5},{i % 2},{i % 3 % 2}\n" for i in range(60)))
    out = str(tmp_path / "it's mine.yaml")
    made = RUNNER.invoke(app, ["config", "new", str(table), "--targets", "a,b", "-o", out])
    assert made.exit_code == 0, made.stderr
    name, params = parsed(last_command(made.stderr))
    assert (name, params["config"]) == ("shard", out)

    overrides = ["network.options={widths: [8, 4]}", "train.epochs=2"]
    shown = RUNNER.invoke(app, ["config", "show", "-c", out, *overrides])
    name, params = parsed(last_command(shown.stderr))
    assert (name, params["config"], params["overrides"]) == ("shard", out, overrides)
    line = subprocess.run(
        ["/bin/sh", "-c", f'set -- {Next("", command_line(["train"], out, overrides))}; printf "%s\\n" "$@"'],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert line.splitlines() == ["dmtg", "train", "-c", out, *overrides]


def test_after_inspect_comes_train_or_inspect_without_constant_targets() -> None:
    seen = {"statistics": {"train": {"a": {}, "b": {}, "c": {}}}, "problems": []}
    assert str(after_inspect(seen, "x.yaml", ["k.v=1"], "")) == "dmtg train -c x.yaml k.v=1"
    seen["problems"] = ["task b is constant in the training split: every value is 1"]  # type: ignore[assignment]
    assert str(after_inspect(seen, "x.yaml", [], "")) == "dmtg inspect -c x.yaml 'data.tasks=[a, c]'"
    seen["problems"] = ["train-00000.parquet is missing"]  # type: ignore[assignment]
    assert str(after_inspect(seen, "x.yaml", [], "r.yaml")) == "dmtg shard -c x.yaml --ray-config r.yaml"


@pytest.mark.parametrize(
    ("model", "command"),
    [
        ("models:/m/3", "dmtg models promote m --version 3"),
        ("models:/m@challenger", "dmtg models promote m"),
        ("models:/m@champion", "dmtg models show models:/m@champion"),
        ("models:/m.group_0/3", "dmtg models show models:/m.group_0/3"),
        ("work/m/runs/m-1", "dmtg models list"),
    ],
)
def test_after_predict_comes_the_promotion_of_the_model(
    model: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(after_predict(model, load_config("rooms").track)) == command
    elsewhere = load_config("rooms", ["track.uri=http://mlflow:5000"])
    assert str(after_predict(model, elsewhere.track)) == f"{command} --uri http://mlflow:5000"
    secret = load_config("rooms", ["track.uri=http://me:hush@mlflow:5000"])
    assert str(after_predict(model, secret.track)) == command
    parsed(shlex.split(command)[1:])


def test_shell_completion_offers_recipes_files_and_imports_little(tmp_path: Path) -> None:
    (tmp_path / "roof.yaml").write_text("")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "x.yml").write_text("")
    code = (
        "import sys; from pipelines.cli.completion import complete_config as complete;"
        "print([complete(text) for text in ('ro', 'paper/celeba40', 'rows/')]);"
        "print({'ray', 'torch', 'mlflow', 'pydantic_core', 'pyarrow'} & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    ).stdout.splitlines()  # fmt: skip
    assert out == ["[['rooms', 'roof.yaml', 'rows/'], ['paper/celeba40_k4'], ['rows/x.yml']]", "set()"]
