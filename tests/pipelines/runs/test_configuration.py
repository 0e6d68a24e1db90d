"""The configuration of a run folder is read as the text of a stranger: one that is damaged is one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.config import yaml_text
from pipelines.errors import UserError
from pipelines.nightly.leakage import training_data
from pipelines.report.run import write_report
from pipelines.runs.models import branches_of
from pipelines.storage import Location, locate
from pipelines.training.publish import register_run
from tests.pipelines.config.test_yaml_text import FEW_VALUES, REFUSED

RESULT = {"metrics": {}, "grouping": {"group_0": ["a"]}, "chosen": "wide"}
TEXTS = {**REFUSED, "a list": "[1, 2]\n"}
READERS: dict[str, Callable[[Location], object]] = {
    "report": write_report,
    "branches": branches_of,
    "register": lambda run: register_run(str(run)),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    return tmp_path


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_configuration_is_one_message(
    run: Path, kind: str, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "many values":
        monkeypatch.setattr(yaml_text, "MOST_VALUES", FEW_VALUES)
    (run / "config.yaml").write_text(TEXTS[kind])
    with pytest.raises(UserError, match="the configuration in this run folder cannot be read") as found:
        READERS[reader](locate(str(run)))
    assert found.value.where == str(run / "config.yaml")
    assert len(found.value.what) < 300


def test_the_training_data_of_a_damaged_run_is_unknown(run: Path) -> None:
    (run / "config.yaml").write_text(REFUSED["aliases"])
    assert training_data({"run": str(run), "data_digest": "0"}) is None
