"""The examples do what they say; the registered model's is run where a model is trained (test_documented.py)."""

from __future__ import annotations

import ast
import csv
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dmtg_core import ENCODERS
from tests.paths import ROOT

EXAMPLES = ROOT / "examples"


def test_a_table_of_ones_own_is_grouped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 4))
    with (tmp_path / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["a", "b", "c", "d", "late", "cost", "broken"])
        for i, row in enumerate(x):
            late = "" if i % 10 == 0 else int(row[0] > 0)
            table.writerow([*row, late, row[0] + row[1], int(row[2] > 0)])
    main = runpy.run_path(str(EXAMPLES / "table.py"))["main"]
    main([str(tmp_path / "table.csv"), "late", "cost", "broken"], epochs=4)
    grouping, gain, *groups = capsys.readouterr().out.splitlines()
    assert grouping.startswith("grouping: ")
    assert "%" in gain
    assert sorted(name for line in groups for name in line.split(": ")[1].split(", ")) == [
        "broken",
        "cost",
        "late",
    ]


def test_the_made_up_table_has_flags_a_number_and_two_kinds_of_target() -> None:
    names = runpy.run_path(str(EXAMPLES / "table.py"))
    table = names["made_up"](200)
    kinds = [names["task_of"](name, values).kind for name, values in table.items() if name.startswith("target")]
    assert kinds == ["binary"] * 5 + ["regression"]


def test_targets_of_a_frame_are_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "estimator.py"))["main"]
    main(300, encoder_options={"widths": [8]}, epochs=4)
    lines = capsys.readouterr().out.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("score: "))
    assert sorted(name for line in lines[:place] for name in line.split(", ")) == [
        "flowering (binary)", "height (regression)", "mould (binary)", "ripe (binary)", "roots (multiclass)",
        "yield (regression)",
    ]  # fmt: skip
    assert 0 < float(lines[place].split()[1]) < 1
    assert lines[place + 1].split() == ["height", "flowering", "ripe", "yield", "mould", "roots"]


def test_an_encoder_of_ones_own_trains_beside_one_that_ships(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        runpy.run_path(str(EXAMPLES / "own_encoder.py"))["main"](rows=1200, epochs=8)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines] == ["mlp", "wavy_mlp"]
        for line in lines:
            assert 0.5 < float(line.split("accuracy ")[1].split(",")[0]) <= 1, "better than guessing"
    finally:
        ENCODERS.pop("wavy_mlp", None)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_imports_neither_ray_nor_the_drivers(file: Path) -> None:
    """What it imports does not either: tests/dmtg_core/test_imports.py."""
    imported = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    assert imported
    assert not {"ray", "pipelines"} & {name.partition(".")[0] for name in imported}


@pytest.mark.soak
def test_examples_import_neither_ray_nor_the_drivers() -> None:
    code = (
        "import runpy, sys; [runpy.run_path(file, run_name='example') for file in sys.argv[1:]];"
        "print({'ray', 'pipelines'} & {name.partition('.')[0] for name in sys.modules})"
    )
    files = [str(file) for file in EXAMPLES.glob("*.py")]
    assert len(files) >= 3
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
