"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigFile = Annotated[str, typer.Option("--config", "-c", help="YAML file, or the name of a recipe that ships.")]
Words = Annotated[list[str] | None, typer.Argument(help="section.key=value, laid over the file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
RayFile = Annotated[
    str, typer.Option("--ray-config", help="Where and how Ray runs; ./ray_config.yaml by default.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
TrackUri = Annotated[str, typer.Option("--uri", help="Tracking server; an SQLite file here by default.")]
