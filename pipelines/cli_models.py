"""`dmtg models …`: the model registry on the command line."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipelines.cli_options import Debug, Json, RayFile, TrackUri
from pipelines.console import number, print_table, run, say

models_app = typer.Typer(no_args_is_help=True, help="Look into the model registry.")


@models_app.command("list")
def models_list(uri: TrackUri = "", ray_config: RayFile = "", as_json: Json = False, debug: Debug = False) -> None:
    """The newest version of every registered model."""

    def body() -> dict[str, Any]:
        from pipelines.config import load_track
        from pipelines.registry import list_models

        found = list_models(load_track(uri, ray_config))
        columns = ("name", "version", "aliases", "tasks", "grouping")
        rows = [{key: ", ".join(m[key]) if key == "aliases" else m[key] for key in columns} for m in found]
        print_table("Registered models", rows)
        return {"models": [model["uri"] for model in found], "entries": found}

    run("models list", body, as_json=as_json, debug=debug)


@models_app.command("show")
def models_show(
    name: Annotated[str, typer.Argument(help="Registered name, or name/version.")],
    uri: TrackUri = "",
    ray_config: RayFile = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """One registered model: which tasks it serves, how well, from which data and run."""

    def body() -> dict[str, Any]:
        from pipelines.config import load_track
        from pipelines.registry import show_model

        found = show_model(load_track(uri, ray_config), name)
        rows = [{"": key, "value": value} for key, value in found.items() if key != "metrics"]
        print_table(found["uri"], rows)
        metrics = [
            {"task": task, **{key: number(value) for key, value in values.items()}}
            for task, values in found["metrics"].items()
        ]
        for row in metrics:
            say("  ".join(f"{key} {value}" for key, value in row.items()))
        return found

    run("models show", body, as_json=as_json, debug=debug)
