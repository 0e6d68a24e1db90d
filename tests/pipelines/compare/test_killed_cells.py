"""A comparison whose process is killed in the middle of a cell resumes there, with the same results."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.compare.driver import ComparisonResult, compare
from pipelines.compare.training import UNFINISHED
from pipelines.config.loading import Config
from pipelines.runs.checkpoints import Checkpoints
from tests.pipelines.compare.killed_cell import checkpoints_at_each_step
from tests.pipelines.compare.test_driver import config_of

METHODS = ["wide", "wide_distilled", "tag", "feature_overlap", "guided"]
Done = tuple[Config, ComparisonResult, int]


def _config(work: Path) -> Config:
    return config_of(
        work, compare={"methods": METHODS, "seeds": [1], "variants": {}, "groupings": {}}, track={"uri": ""}
    )


def _cells(done: ComparisonResult) -> dict[str, dict[str, Any]]:
    """The stored results of all cells, without their durations."""
    stored = {name: (done.folder / "cells" / name).read_json() for name in (done.folder / "cells").files()}
    return {name: {k: v for k, v in one.items() if k != "seconds"} for name, one in stored.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A comparison that was not killed, and the number of its checkpoints."""
    config, written = _config(tmp_path_factory.mktemp("whole")), []
    with pytest.MonkeyPatch.context() as patch:
        checkpoints_at_each_step(patch)
        add = Checkpoints.add
        patch.setattr(Checkpoints, "add", lambda self, local: (add(self, local), written.append(local)))
        done = compare(config)
    return config, done, len(written)


def test_no_checkpoints_are_left(whole: Done) -> None:
    _, done, written = whole
    assert written > 50
    assert not (done.folder / UNFINISHED).folders()


@pytest.mark.parametrize(
    "share",
    [pytest.param(0.1, marks=pytest.mark.soak), 0.35, pytest.param(0.6, marks=pytest.mark.soak), 0.85],
)
def test_a_killed_comparison_resumes_in_its_cell(
    whole: Done, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected, written = whole
    config, logged = _config(tmp_path), []
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "tests.pipelines.compare.killed_cell", str(tmp_path / "config.json")]
    killed = subprocess.run([*command, str(round(share * written))], check=False)
    assert killed.returncode == -signal.SIGKILL
    checkpoints_at_each_step(monkeypatch)
    done = compare(config, logged.append)
    assert any("1 of them from its last checkpoint" in line for line in logged)
    assert _cells(done) == _cells(expected)
    assert not (done.folder / UNFINISHED).folders()
