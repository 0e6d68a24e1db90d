"""Every `dmtg …` command line that cluster/ holds, and how the real command line reads it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typer.main import get_command

from pipelines.cli.app import app
from tests.cluster.manifests import inside, objects
from tests.paths import ROOT

CLUSTER = ROOT / "cluster"
PIPELINE = CLUSTER / "kubeflow" / "pipeline.yaml"
ENDS = ("&&", "||", "|", ";", ">", ">>", ">&")


@dataclass(frozen=True)
class Command:
    """Words of one command after `dmtg`, and the file, or the overlay of manifests, that holds it."""

    file: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.words)}"


def commands() -> list[Command]:
    """All of them."""
    found = [
        Command(f"kuberay/overlays/{one.overlay}", words) for one in objects() for words in _in_object(one.value)
    ]
    found += [Command("kubeflow/pipeline.yaml", words) for words in pipeline_commands()]
    for name in ("README.md", "ray-up.yaml", "systemd/dmtg-regroup.service", "systemd/crontab"):
        text = (CLUSTER / name).read_text(encoding="utf-8")
        lines = _code(text) if name.endswith(".md") else text.replace("\\\n", " ").splitlines()
        found += [Command(name, words) for line in lines for words in in_line(line)]
    return found


def _in_object(value: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for part in inside(value):
        if isinstance(part.get("entrypoint"), str):
            yield from in_line(part["entrypoint"])
        if isinstance(part.get("command"), list):
            yield from after_dmtg([*part["command"], *part.get("args", [])])


def _code(text: str) -> list[str]:
    """Lines of the fenced shell blocks of a page, continued ones joined."""
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def in_line(line: str) -> Iterator[tuple[str, ...]]:
    """The commands of a shell line; one in quotes, as `ray exec` takes it, too."""
    if "dmtg" not in line or line.lstrip().startswith("#"):
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    for word in words:
        if word.startswith("dmtg "):
            yield from in_line(word)
    yield from after_dmtg(words)


def after_dmtg(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """What follows the word `dmtg`, or a path to it, up to the end of the command."""
    starts = [i for i, word in enumerate(words) if re.fullmatch(r"(ExecStart=)?(/\S*/)?dmtg", word)]
    for start in starts:
        rest = list(words[start + 1 :])
        named = start > 0 and words[start - 1].startswith("-") and words[start - 1] != "--"
        # `-n dmtg` and `-u dmtg` name a namespace and a user
        if rest and not named and not rest[0].startswith(("-", "/")) and rest[0] not in ENDS:
            end = next((i for i, word in enumerate(rest) if word in ENDS), len(rest))
            yield tuple(rest[:end])


def pipeline_commands() -> list[tuple[str, ...]]:
    """Those of the compiled Kubeflow pipeline's steps, with its defaults and stand-ins for addresses of steps."""
    root = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))["root"]
    defaults = {k: v["defaultValue"] for k, v in root["inputDefinitions"]["parameters"].items()}
    found = []
    for task in root["dag"]["tasks"].values():
        given = {name: _value(source, defaults) for name, source in task["inputs"]["parameters"].items()}
        # what a sweep gives is a configuration like the one it was given
        config = given["config"] or defaults["config"]
        passed = [f"{given['word']}={given['given']}"] if given.get("word") else []
        dated = ["--night", given["date"]] if given.get("date") else []
        found.append((given["command"], "-c", config, *given["words"], *passed, *dated, "--json"))
    return found


def _value(source: dict[str, Any], defaults: dict[str, Any]) -> Any:
    if "componentInputParameter" in source:
        return defaults[source["componentInputParameter"]]
    return source["runtimeValue"]["constant"] if "runtimeValue" in source else "s3://from/another/step"


def parsed(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Name of the command and its parameters, as the real command line reads them; nothing is run.

    Raises:
        UsageError: As typer does for an unknown command or option, or a missing one.
    """
    command: Any = get_command(app)
    context = command.make_context("dmtg", list(words), resilient_parsing=False)
    names = []
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context, resilient_parsing=False)
        names.append(name)
    return " ".join(names), context.params


def mapped(place: str, folder: Path) -> str:
    """A path that pods see, as one in `folder` that holds the same files."""
    return str(folder / Path(place).name) if place.startswith("/etc/dmtg/") else place
