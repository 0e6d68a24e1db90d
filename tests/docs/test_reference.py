"""The reference has every option of every command, and every key of the configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from types import UnionType
from typing import get_args

import pytest
from pydantic import BaseModel
from typer.main import get_command
from typer.testing import CliRunner

from dmtg_core.network.encoders import ENCODERS
from docs import tables
from pipelines.cli.app import app
from pipelines.config.loading import Config
from pipelines.data.sources import SOURCES, options_model
from pipelines.data.sources.labels import LabelTask

COMMANDS, CONFIGURATION = tables.commands(), tables.configuration()


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Path and default of every key."""
    for name, field in model.model_fields.items():
        union = isinstance(field.annotation, UnionType)  # not the values of a list
        kinds = [field.annotation, *(get_args(field.annotation) if union else ())]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if inner:
            yield from keys(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.default


def row_of(key: str, text: str = CONFIGURATION) -> str:
    rows = re.findall(rf"^\| `{re.escape(key)}` \|.*$", text, re.MULTILINE)
    assert len(rows) == 1, key
    return str(rows[0])


def leaves(command, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from leaves(inner, (*words, name))
    else:
        yield words, command


@pytest.mark.parametrize(
    ("words", "command"), [pytest.param(*one, id=" ".join(one[0])) for one in leaves(get_command(app), ())]
)
def test_every_option_and_argument_is_in_its_section(words, command) -> None:
    start = COMMANDS.index(f"# dmtg {' '.join(words)}\n")
    section = COMMANDS[start : start + 1 + (COMMANDS[start + 1 :] + "\n## ").index("\n## ")].split("\n### dmtg")[0]
    helped = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"}).stdout
    for parameter in command.params:
        if parameter.name == "help":
            continue
        for option in parameter.opts:
            assert option in section, option
            assert parameter.param_type_name == "argument" or option in helped
        assert parameter.help, f"{words}: {parameter.name} says nothing of itself"


@pytest.mark.parametrize(("key", "default"), list(keys(Config)))
def test_every_key_has_a_row_with_its_default(key: str, default: object) -> None:
    row = row_of(key)
    if default is None or isinstance(default, str | int | float | bool):
        assert row.split(" | ")[2] == f"`{json.dumps(default)}`"


@pytest.mark.parametrize("kind", list(SOURCES))
def test_every_option_of_every_source_has_a_row(kind: str) -> None:
    section = CONFIGURATION.split(f"\n### {kind}\n", 1)[1].split("\n#", 1)[0]
    for key, _ in keys(options_model(kind)):
        row_of(f"source.options.{key}", section)
    assert len(section.split("\n| ")[0].strip()) > 20, "its docstring says what the options are for"


def test_options_of_a_task_and_of_the_encoders_are_there() -> None:
    for key in LabelTask.model_fields:
        row_of(f"tasks[].{key}")
    for name in ENCODERS:
        assert f"\n### {name}\n" in CONFIGURATION
    assert "`network.options.widths`" in CONFIGURATION


def test_text_of_the_code_cannot_become_markup() -> None:
    text = re.sub(r"`[^`\n]*`|```.*?```", "", COMMANDS + CONFIGURATION, flags=re.DOTALL)
    assert not re.findall(r"<[a-zA-Z]", text)
