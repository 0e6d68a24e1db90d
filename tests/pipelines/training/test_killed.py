"""A run that is killed resumes and ends with the figures of an undisturbed run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.pipelines.driver import Undisturbed, disturbed, same


@pytest.mark.soak
@pytest.mark.parametrize("after", [0, 1, 4, 5, 7])
def test_a_killed_run_resumes_and_ends_with_the_same_figures(tmp_path: Path, run: Undisturbed, after: int) -> None:
    driver = disturbed(run, tmp_path)
    process = driver.start()
    driver.wait_for(lambda: len(driver.epochs()) >= after and (driver.folder / "config.yaml").exists())
    driver.lose()
    assert process.returncode == -signal.SIGKILL, driver.log
    assert not (driver.folder / "result.json").exists()

    resumed = driver.finish()
    if after:
        assert "resuming from the last checkpoint" in driver.log
    assert len(driver.epochs()) == len(set(driver.epochs())) == 8
    same(resumed, run[1].result)
