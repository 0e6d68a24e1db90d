"""The demo's table, its last lines, and the page that `dmtg report --open` opens; nothing is trained."""

import csv
import io
import shutil
import sys
import webbrowser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dmtg_core.evaluation.planted import planted
from pipelines.cli import train
from pipelines.cli.app import app
from pipelines.config.loading import load_config
from pipelines.report import run as report_of_run
from pipelines.report.figures import grouping_png
from pipelines.scaffold.example import FAULTS, MICROPHONES, ROWS, write_hall
from pipelines.storage import Location, locate
from tests.paths import ROOT


def test_the_table_of_the_demo_holds_the_planted_problem(tmp_path: Path) -> None:
    target = tmp_path / "hall" / "hall.csv"
    write_hall(locate(str(target)))
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    _, tasks, splits, _ = planted(0, tasks=len(FAULTS), groups=3, features=MICROPHONES, rows=ROWS)
    held = [row for row in rows if row["split"] == "val"]
    levels = [[float(row[f"microphone_{i + 1}"]) for i in range(MICROPHONES)] for row in held]
    assert np.allclose(levels, splits["val"].inputs, atol=1e-4)
    for task, fault in zip(tasks, FAULTS, strict=True):
        assert [int(row[fault]) for row in held] == splits["val"].labels[task.name].tolist()
    target.write_text("my own")
    write_hall(locate(str(target)))
    assert target.read_text() == "my own"


def test_the_recipe_names_the_faults_and_faults_of_a_machine_are_of_one_group() -> None:
    source = load_config("hall").source
    assert source is not None
    assert tuple(task["column"] for task in source.options["tasks"]) == FAULTS
    machines = [fault.partition("_")[0] for fault in FAULTS]
    assert machines == 3 * machines[:3]


def test_the_demo_ends_with_its_picture_and_a_command_that_works_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {"run_dir": "work/hall/runs/x", "models": []}
    monkeypatch.setattr(train, "_train", lambda config: found)
    shown = CliRunner().invoke(app, ["demo"])
    assert shown.exit_code == 0
    lines = shown.stderr.strip().splitlines()
    assert "picture:  work/hall/runs/x/grouping.png" in lines
    words = lines[-1].split()
    assert words[:3] == ["dmtg", "config", "new"]
    again = CliRunner().invoke(app, words[1:])
    assert again.exit_code == 0, again.stderr
    written = load_config("my_table.yaml")
    assert written.source is not None
    assert [task["column"] for task in written.source.options["tasks"]] == list(FAULTS)


def test_the_program_has_its_path_where_the_environment_is_not_active(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "bin" / "dmtg"
    monkeypatch.setattr(sys, "argv", [str(own)])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert train.program() == str(own.resolve())
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/dmtg")
    assert train.program() == "dmtg"


@pytest.mark.parametrize("browser", [True, False])
def test_report_opens_the_page_or_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, browser: bool
) -> None:
    page = locate(str(tmp_path / "my run" / "report.html"))
    opened: list[str] = []

    def open_page(address: str) -> bool:
        opened.append(address)
        return browser

    def write_report(run: Location) -> Location:
        return run / "report.html"

    monkeypatch.setattr(webbrowser, "open", open_page)
    monkeypatch.setattr(report_of_run, "write_report", write_report)
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "my run"), "--open"])
    assert shown.exit_code == 0
    assert opened == [(tmp_path / "my run" / "report.html").as_uri()]
    assert (f"no browser opened the page here: open {page}" in shown.stderr) is not browser
    CliRunner().invoke(app, ["report", str(tmp_path / "my run")])
    assert len(opened) == 1


def test_the_picture_of_the_readme_is_the_grouping_by_machine(tmp_path: Path) -> None:
    groups = {f"group_{g}": list(FAULTS[g::3]) for g in range(3)}
    drawn, held = (
        np.asarray(Image.open(file).convert("L").resize((320, 160)), float)
        for file in (io.BytesIO(grouping_png(groups)), ROOT / "docs" / "demo.png")
    )
    assert np.abs(drawn - held).mean() < 3  # other versions of the fonts differ a little
