"""The folders of nightly runs: those of other contents are refused, and those of earlier versions are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.errors import UserError
from pipelines.nightly.driver import _plan_of, _root, regroup
from tests.pipelines.nightly.test_driver import config_of

DATE = "2026-03-01"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return checked(Config, config_of(tmp_path))


@pytest.mark.parametrize("place", ["notes.txt", f"{DATE}/notes.txt", "photos/a.jpg"])
def test_a_folder_of_other_files_is_refused_unchanged(config: Config, tmp_path: Path, place: str) -> None:
    folder = tmp_path / "runs" / "regroup" / "nightly"
    (folder / place).parent.mkdir(parents=True)
    (folder / place).write_text("mine")
    with pytest.raises(UserError, match="no record of") as found:
        regroup(config, DATE)
    assert found.value.remedy.startswith("set run.root")
    assert [file for file in folder.rglob("*") if file.is_file()] == [folder / place]


@pytest.mark.parametrize("left", ["lease.json", f"{DATE}/champion/group_0/weights", f"{DATE}/plan.json"])
def test_what_a_killed_nightly_run_has_left_is_no_other_file(config: Config, tmp_path: Path, left: str) -> None:
    folder = tmp_path / "runs" / "regroup" / "nightly"
    (folder / left).parent.mkdir(parents=True)
    (folder / left).touch()
    (folder / "2026-02-28").mkdir()
    assert str(_root(config, DATE)) == str(folder)


def test_the_plan_of_an_earlier_version_is_read(config: Config, tmp_path: Path) -> None:
    folder = _root(config, DATE) / DATE
    assert str(_plan_of(folder)).endswith("plan.json")
    (folder / "night.json").write_text("{}")
    assert str(_plan_of(folder)).endswith("night.json")
