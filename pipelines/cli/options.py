"""Arguments and options that several commands share, and the words of the command after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.completion import complete_config, complete_model

if TYPE_CHECKING:
    from pipelines.config.loading import Config
    from pipelines.config.sections import TrackSection

ConfigFile = Annotated[
    str,
    typer.Option(
        "--config", "-c", help="YAML file, or the name of a recipe that ships.", autocompletion=complete_config
    ),
]
Words = Annotated[list[str] | None, typer.Argument(help="section.key=value, laid over the file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
RayFile = Annotated[
    str, typer.Option("--ray-config", help="Where and how Ray runs; ./ray_config.yaml by default.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
TrackUri = Annotated[str, typer.Option("--uri", help="Tracking server; an SQLite file here by default.")]
Model = Annotated[
    str,
    typer.Argument(
        help="models:/<name>/<version> or models:/<name>@<alias>, or a run folder.", autocompletion=complete_model
    ),
]


def load(config: str, words: Sequence[str] | None, ray_config: str = "") -> Config:
    """The configuration that a command is given."""
    from pipelines.config.loading import load_config

    return load_config(config, words or [], ray_config)


def same(
    command: Sequence[str], config: str, words: Sequence[str] | None, ray_config: str = "", *more: str
) -> tuple[str, ...]:
    """Another command on the same configuration.

    Args:
        command: Its name, and what has no option before it.
        more: Further words.
    """
    ray = ["--ray-config", ray_config] if ray_config else []
    return "dmtg", *command, "-c", config, *map(_showable, words or ()), *ray, *more


def predicting(
    model: str, loaded: Config, config: str, words: Sequence[str] | None, ray_config: str
) -> tuple[str, ...]:
    """The command for a model's predictions, beside the runs of its configuration."""
    out = f"{loaded.run.root.rstrip('/')}/predictions"
    return same(["predict", model], config, words, ray_config, "--out", out)


def _showable(word: str) -> str:
    """A word as it may stand in a log: what holds a secret has to be typed again."""
    from pipelines.registry.errors import without_credentials

    key, _, value = word.partition("=")
    return f"{key}=…" if key == "regroup.webhook" or without_credentials(value) != value else word


def models(command: str, track: TrackSection, *more: str) -> tuple[str, ...]:
    """A `dmtg models` command for the registry of a configuration."""
    from pipelines.config.loading import load_track
    from pipelines.registry.errors import without_credentials

    elsewhere = track.uri and track.uri != load_track().uri and without_credentials(track.uri) == track.uri
    return "dmtg", "models", command, *more, *(["--uri", track.uri] if elsewhere else [])
