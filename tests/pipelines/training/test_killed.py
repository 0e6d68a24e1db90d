"""A run that is killed resumes and ends with the figures of an undisturbed run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.pipelines.conftest import VIT, finished_run
from tests.pipelines.driver import Driver, Undisturbed, disturbed, same

ADAPTERS = VIT | {"stem": 2, "branch": "lora", "adapter": {"rank": 2}}  # stored outputs of a frozen stem


@pytest.fixture(scope="module")
def adapter_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A finished run whose groups are adapters."""
    return finished_run(images, tmp_path_factory.mktemp("adapters"), network=ADAPTERS)


@pytest.mark.soak
@pytest.mark.parametrize("after", [0, 1, 4, 5, 7])
def test_a_killed_run_resumes_and_ends_with_the_same_figures(tmp_path: Path, run: Undisturbed, after: int) -> None:
    resumes(disturbed(run, tmp_path), run, after)


@pytest.mark.soak
@pytest.mark.parametrize("after", [0, 1, 5, 7])
def test_a_killed_run_of_adapters_resumes_and_ends_with_the_same_figures(
    tmp_path: Path, adapter_run: Undisturbed, after: int
) -> None:
    resumes(disturbed(adapter_run, tmp_path, data={"shards": str(tmp_path / "shards")}), adapter_run, after)


def resumes(driver: Driver, undisturbed: Undisturbed, after: int) -> None:
    """Kill a run after this many epochs. The same command ends with the figures of the undisturbed run."""
    process = driver.start()
    driver.wait_for(lambda: len(driver.epochs()) >= after and (driver.folder / "config.yaml").exists())
    driver.lose()
    assert process.returncode == -signal.SIGKILL, driver.log
    assert not (driver.folder / "result.json").exists()

    resumed = driver.finish()
    if after:
        assert "resuming from the last checkpoint" in driver.log
    assert len(driver.epochs()) == len(set(driver.epochs())) == 8
    same(resumed, undisturbed[1].result)
