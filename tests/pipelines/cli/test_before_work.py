"""What can be known before data is read or workers start is found then, with one message."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli.app import app
from tests.pipelines.conftest import config_values


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("network.encoder=convent", "unknown encoder 'convent', expected one of mlp, tabm, convnet"),
        ("network.options={widths: [-3]}", "option widths of encoder convnet must be a list of positive"),
        ("network.options={widths: [0]}", "option widths of encoder convnet must be a list of positive"),
        ("network.options={width: 3}", "encoder convnet has no option 'width'"),
        ("track.uri=mysql+pymysql://me:hush@127.0.0.1:1/x", "driver of this database is not installed: pymysql"),
    ],
)
def test_it_is_found_before_shards_are_written(override: str, what: str, images: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config_values(images, tmp_path)))
    found = CliRunner().invoke(app, ["train", "-c", str(file), override])
    assert found.exit_code in (1, 2), found.stderr
    assert what in found.stderr
    assert "hush" not in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "shards").exists()


def test_the_file_of_a_run_folder_of_another_version_is_named(images: Path, tmp_path: Path) -> None:
    file, run = tmp_path / "c.yaml", tmp_path / "runs" / "old"
    file.write_text(yaml.safe_dump(config_values(images, tmp_path, run={"root": str(run.parent), "name": "old"})))
    run.mkdir(parents=True)
    values = config_values(images, tmp_path)
    for text in (yaml.safe_dump({**values, "newer": {"a": 1}}), "[1", "- a\n"):
        (run / "config.yaml").write_text(text)
        found = CliRunner().invoke(app, ["train", "-c", str(file)])
        assert found.exit_code == 1
        assert f"where: {run / 'config.yaml'}" in found.stderr
        assert "another version of dmtg" in found.stderr
