"""The commands of the tutorial on less data, and the example that loads its registered model."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipelines.cli.app import app
from tests.docs.pages import blocks, commands, write_configurations
from tests.paths import ROOT

pytestmark = pytest.mark.soak
TUTORIAL = ROOT / "docs" / "tutorial.md"
# overrides that shorten commands, and commands that are left out because they take ten minutes
SHORTER = {"train": ("train.epochs=2",), "config new": ("--force",)}
LONG = ("compare",)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The working folder after all commands, and the log of every command."""
    folder = tmp_path_factory.mktemp("tutorial")
    (script,) = [block.text for block in blocks(TUTORIAL) if block.title == "make_machines.py"]
    logged: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_configurations(folder, TUTORIAL)
        exec(compile(script.replace("4000", "400"), "make_machines.py", "exec"), {})  # noqa: S102 - our own page
        for words in commands(TUTORIAL):
            name = " ".join(words[:2]) if words[0] in ("models", "config") else words[0]
            if name not in LONG:
                run = re.search(r"^run:\s+(\S+)$", logged.get("train", ""), re.MULTILINE)
                given = [run[1] if run and "…" in word else word for word in words]
                done = CliRunner().invoke(app, [*given, *SHORTER.get(name, ())])
                assert done.exit_code == 0, f"dmtg {' '.join(words)}\n{done.output}"
                logged[name] = done.output
                if name == "config new":
                    write_configurations(folder, TUTORIAL)  # the tutorial replaces the file
    return folder, logged


def test_every_command_of_the_tutorial_gives_the_output_of_the_page(walked: tuple[Path, dict[str, str]]) -> None:
    folder, logged = walked
    assert {"shard", "inspect", "train", "report", "models list", "predict", "models promote"} <= set(logged)
    assert "400 samples in 3 shards" in logged["shard"]
    assert "6 categories" not in logged["shard"]
    assert re.search(r"^Grouping g\d+-\w+ on test$", logged["train"], re.MULTILINE)
    page = re.search(r"^report: +(\S+)$", logged["report"], re.MULTILINE)
    assert page
    assert (folder / page[1]).is_file()
    assert "machines" in logged["models list"]
    rows = pq.read_table(folder / "work" / "machines" / "predictions").num_rows
    assert 30 < rows < 100, "a row for each machine of the test split"


def test_the_registered_model_predicts_raw_rows(walked, monkeypatch, capsys) -> None:
    folder, _ = walked
    monkeypatch.chdir(folder)
    runpy.run_path(str(ROOT / "examples" / "registered_model.py"))["main"](
        "models:/machines@champion", "machines.csv"
    )
    out = capsys.readouterr().out
    groups, head = out.splitlines()[:2]
    tasks = re.sub(r" \| ", ", ", groups.partition(": ")[2]).split(", ")
    assert sorted(tasks) == sorted(head.split())
    values = [float(value) for value in out.splitlines()[2].split()[1:]]
    assert len(values) == len(tasks)
    assert all(0 <= value <= 1 for value in values), "probabilities of flags"
