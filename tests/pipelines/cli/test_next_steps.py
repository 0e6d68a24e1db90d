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
from pipelines.cli.experiments import _after_signal as after_signal
from pipelines.cli.options import STEPS, command_line, next_step
from pipelines.cli.serve import _next_step as after_predict
from pipelines.compare.verdicts import MATTERS, NOT, UNCLEAR, Verdict, of_compare, of_sweep, of_train
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


# ---------------------------------------------------------------- after a command that measured the grouping


USE = Next("predict", ("dmtg", "predict", "models:/m/1", "-c", "x.yaml"))
TWO = {"group_0": ["a", "b"], "group_1": ["c"]}


@pytest.mark.parametrize("verdict", list(Verdict))
def test_the_step_after_each_verdict_is_a_command(verdict: Verdict) -> None:
    step = next_step(verdict, "x.yaml", ["network.groups=4"], "r.yaml", USE)
    assert set(STEPS) == set(Verdict)
    if verdict in (Verdict.HELPS, Verdict.SETTLED):
        assert step is USE
        return
    name, params = parsed(shlex.split(str(step))[1:])
    assert (params["config"], params["ray_config"]) == ("x.yaml", "r.yaml")
    if verdict is Verdict.NOT:  # nothing is searched: the last value of a key counts
        assert (name, params["overrides"]) == ("train", ["network.groups=4", "network.groups=1"])
    else:
        assert name in ("signal", "compare")
        assert params["overrides"] == ["network.groups=4"]


@pytest.mark.parametrize(
    ("gain", "chosen", "groups", "signal", "verdict"),
    [
        (3.0, "guided", TWO, "", Verdict.HELPS),
        (None, "guided", TWO, "", Verdict.HELPS),
        (3.0, "wide", {"group_0": ["a", "b", "c"]}, "", Verdict.SETTLED),
        (0.0, "naive_mtl", {"group_0": ["a", "b", "c"]}, "", Verdict.SETTLED),
        (-1.0, "guided", TWO, "", Verdict.UNMEASURED),
        (-1.0, "guided", TWO, NOT, Verdict.NOT),
        (-1.0, "guided", TWO, MATTERS, Verdict.UNCLEAR),
        (-1.0, "guided", TWO, UNCLEAR, Verdict.UNCLEAR),
    ],
)
def test_after_training(gain: float, chosen: str, groups: Any, signal: str, verdict: Verdict) -> None:
    assert of_train({"normalized_gain": gain, "chosen": chosen, "grouping": groups}, signal) is verdict


@pytest.mark.parametrize(
    ("conclusion", "enough", "command", "more"),
    [
        (MATTERS, None, "compare", []),
        (NOT, None, "train", ["network.groups=1"]),
        (UNCLEAR, None, "compare", []),
        (
            UNCLEAR,
            {"partitions": 9, "seeds": [1, 2, 3, 4]},
            "signal",
            ["signal.partitions=9", "signal.seeds=[1,2,3,4]"],
        ),
    ],
)
def test_after_signal(conclusion: str, enough: Any, command: str, more: list[str]) -> None:
    step = after_signal({"conclusion": conclusion, "enough": enough}, "x.yaml", ["k.v=1"], "r.yaml")
    name, params = parsed(shlex.split(str(step))[1:])
    assert (name, params["config"], params["overrides"]) == (command, "x.yaml", ["k.v=1", *more])
    assert params["ray_config"] == "r.yaml"


@pytest.mark.parametrize(
    ("low", "value", "verdict"),
    [
        (0.5, 2.0, Verdict.HELPS),
        (-0.5, 2.0, Verdict.NOT),
        (-3.0, -2.0, Verdict.NOT),
        (float("-inf"), 2.0, Verdict.HELPS),
        (float("-inf"), -2.0, Verdict.NOT),
    ],
)
def test_after_a_comparison(low: float, value: float, verdict: Verdict) -> None:
    rows = [{"method": "naive_mtl", "gain": None}, {"method": "guided", "gain": {"low": low, "value": value}}]
    assert of_compare(rows, "guided") is verdict


def test_after_a_sweep() -> None:
    assert of_sweep({"gain_validation": 2.0}) is Verdict.HELPS
    assert of_sweep({"gain_validation": -2.0}) is Verdict.NOT
    assert of_sweep(None) is of_sweep({"gain_validation": None}) is Verdict.HELPS
