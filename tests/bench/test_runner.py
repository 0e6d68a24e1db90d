"""Each row of the benchmark has a process of its own, and one that fails does not stop the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.runner import Bench
from tests.bench.tiny_rows import ROWS
from tests.paths import ROOT


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.bench.tiny_rows", *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def written(folder: Path) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in json.loads((folder / "bench.json").read_text())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("bench")
    return folder, bench(folder, "--repeats", "5")


def test_rows_run_in_processes_of_their_own(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    rows = written(whole[0])
    assert rows["good"]["process"] != rows["good_too"]["process"]


def test_rows_that_fail_are_reported_and_the_others_run(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = whole
    rows = written(folder)
    assert set(rows) == set(ROWS)
    assert rows["raises"]["error"] == "ValueError: no such scene"
    assert rows["killed"]["error"] == "the process ended with code -9"
    assert 'raise ValueError("no such scene")' in done.stderr  # the traceback
    assert done.returncode == 1


def test_rows_that_fail_and_miss_are_first(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = whole
    assert list(written(folder)) == ["raises", "killed", "misses", "good", "good_too"]
    marks = [line.split()[:2] for line in done.stdout.splitlines()[-6:-1]]
    assert marks == [
        ["FAILED", "raises"], ["FAILED", "killed"], ["MISSES", "misses"], ["ok", "good"], ["ok", "good_too"]
    ]  # fmt: skip


def test_notes_are_printed_beside_the_medians(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = whole
    (line,) = [line for line in done.stdout.splitlines() if line.split()[:2] == ["ok", "good"]]
    assert line.endswith(f"; process {written(folder)['good']['process']}; threads 1")


def test_a_row_is_the_median_of_its_pairs_after_a_warm_up(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    row = written(whole[0])["misses"]
    assert row["medians"] == [4.0, 2.0]  # of 2, 3, 4, 5 and 6
    assert row["ratio"] == 2.0
    assert row["repeats"] == 5
    assert row["command"] == "make bench ROWS=misses"
    assert "threads, torch" in str(row["machine"])


def test_a_row_that_takes_minutes_has_fewer_repeats(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    rows = written(whole[0])
    assert (rows["good"]["repeats"], rows["good_too"]["repeats"]) == (5, 2)


def test_a_row_that_misses_is_not_an_error(tmp_path: Path) -> None:
    done = bench(tmp_path, "--repeats", "1", "good", "mis")
    assert set(written(tmp_path)) == {"good", "good_too", "misses"}
    assert done.returncode == 0


def test_the_file_is_written_after_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench"])
    found: list[list[str]] = []

    def measured(_self: Bench, name: str, _repeats: int) -> dict[str, object]:
        found.append(list(written(tmp_path)) if (tmp_path / "bench.json").exists() else [])
        return {"name": name, "error": "none", "machine": ""}

    monkeypatch.setattr(Bench, "_in_process", measured)
    with pytest.raises(SystemExit):
        Bench("tests.bench.tiny_rows", ROWS).main()
    assert found == [list(ROWS)[:n] for n in range(len(ROWS))]


def test_an_unknown_row_is_refused(tmp_path: Path) -> None:
    done = bench(tmp_path, "goods")
    assert done.returncode == 2
    assert "no row begins with goods" in done.stderr
    assert not (tmp_path / "bench.json").exists()
