"""Completion of overrides, as bash asks for it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli.app import app
from pipelines.cli.completion import complete_name

FAMILIES = ["constant", "linear", "cosine", "exponential"]


def offered(*words: str) -> list[str]:
    """What bash is offered for the last of the words of a command line; it makes three words of key=value."""
    asked = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1), "_DMTG_COMPLETE": "complete_bash"}
    return CliRunner().invoke(app, [], prog_name="dmtg", env=asked).stdout.split()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["train.epo"], ["train.epochs="]),
        (["gate.temperature.f"], [f"gate.temperature.family={name}" for name in FAMILIES]),
        (["gate.temperature.family", "="], FAMILIES),
        (["gate.temperature.family", "=", "e"], ["exponential"]),
        (["train.epochs=3", "network.batch_branches", "=", "o"], ["on", "off"]),
        (["network.rescale_gradients", "="], ["off", "tasks", "published"]),
        (["train.epochs", "=", ""], []),
        (["no.such"], []),
    ],
)
def test_bash_completes_overrides(words: list[str], found: list[str]) -> None:
    assert offered("dmtg", "train", "-c", "planted", *words) == found


def test_a_prefix_of_several_keys_offers_the_keys() -> None:
    keys = offered("dmtg", "compare", "compare.")
    assert "compare.methods=" in keys
    assert len(keys) == len(set(keys)) > 3
    assert all(key.startswith("compare.") and key.endswith("=") for key in keys)
    assert offered("dmtg", "predict", "models:/a/1", "track.u") == ["track.uri="]


def test_completion_leaves_logging_and_environment_as_they_were(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    assert complete_name("anything") == []
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "60"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    logging.getLogger("pipelines").warning("still heard")
    assert "still heard" in caplog.text
