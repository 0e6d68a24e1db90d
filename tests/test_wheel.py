"""The wheel: it has every file of the packages, and works outside of a clone."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.paths import ROOT

PACKAGES = ("dmtg_core", "pipelines")
# beside this folder, so that an editable install of the project is not used
LIBRARIES = Path(torch.__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that was built from a copy of the sources, without the network."""
    sources = tmp_path_factory.mktemp("sources")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.iterdir()
    return made


def environment(folder: Path, wheel: Path, *, libraries: bool) -> Path:
    """A fresh environment with the wheel alone, or also with the libraries of this one; its folder of programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps",
               "--no-index", "--disable-pip-version-check", str(wheel)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if libraries:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "libraries.pth").write_text(f"{LIBRARIES}\n")
    return folder / "bin"


def test_it_has_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    held = zipfile.ZipFile(wheel).namelist()
    found = {name for name in held if ".dist-info/" not in name}
    expected = {
        str(file.relative_to(ROOT))
        for name in PACKAGES
        for file in (ROOT / name).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert found == expected
    assert {Path(name).suffix for name in expected} >= {".py", ".yaml", ".html", ".css", ".js", ".typed"}
    assert {Path(name).name for name in held if ".dist-info/" in name} >= {
        "LICENSE",
        "entry_points.txt",
        "METADATA",
    }


def run(command: Sequence[object], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of a fresh environment in a folder."""
    return subprocess.run(list(map(str, command)), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True,
                          check=False)  # fmt: skip


def test_without_the_extra_the_command_names_it_in_one_line(wheel: Path, tmp_path: Path) -> None:
    programs = environment(tmp_path / "bare", wheel, libraries=False)
    for words in (["--help"], ["train", "-c", "rooms"]):
        done = run([programs / "dmtg", *words], tmp_path)
        assert done.returncode == 1
        assert done.stderr == "dmtg needs the package typer: pip install 'dmtg[pipelines]'\n"
    assert run([programs / "dmtg", "--version"], tmp_path).stdout.startswith("dmtg ")


def write_table(file: Path) -> None:
    rng = np.random.default_rng(0)
    with file.open("w", newline="") as opened:
        table = csv.writer(opened)
        table.writerow(["age", "income", "town", "churn", "spend"])
        for _ in range(300):
            age, income = rng.uniform(18, 80), rng.uniform(1, 9)
            churn, spend = int(age + rng.normal(0, 9) > 50), income * 10 + rng.normal(0, 2)
            table.writerow([f"{age:.1f}", f"{income:.2f}", rng.choice(list("abc")), churn, f"{spend:.2f}"])


@pytest.mark.soak
def test_a_table_is_trained_and_predicted_outside_of_a_clone(wheel: Path, tmp_path: Path) -> None:
    programs = environment(tmp_path / "fresh", wheel, libraries=True)
    write_table(tmp_path / "people.csv")

    def printed(*words: str) -> str:
        done = run([programs / words[0], *words[1:]], tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = printed("python", "-c", "import dmtg_core, pipelines; print(dmtg_core.__file__, pipelines.__file__)")
    assert all(Path(file).is_relative_to(tmp_path / "fresh") for file in where.split())
    printed("dmtg", "config", "new", "people.csv", "--targets", "churn,spend")
    lines = printed("dmtg", "train", "-c", "people.yaml", "train.epochs=2", "--json").splitlines()
    trained = json.loads(lines[-1])
    assert trained["status"] == "done"
    assert sum(map(len, trained["grouping"].values())) == 2
    assert Path(trained["report"]).read_text(encoding="utf-8").startswith("<!")
    found = list(csv.DictReader(printed("dmtg", "predict", trained["models"][0], "people.csv").splitlines()))
    assert len(found) == 300
    assert "churn" in found[0]
    printed("dmtg", "config", "show", "-c", "rooms")  # a recipe
