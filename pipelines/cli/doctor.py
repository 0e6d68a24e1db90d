"""`dmtg doctor`: the subject of the checks, and the table of the findings."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.completion import complete_config
from pipelines.cli.console import Next, print_table, run
from pipelines.cli.options import Debug, Json, Overrides, RayFile, command_line, load

if TYPE_CHECKING:
    from pipelines.cli.checks import Subject

# kind of source, encoder or search of a sweep → extra of the package
EXTRAS = {"text": "text", "transformers": "transformers", "timm": "vision", "tpe": "optuna"}


def doctor(
    overrides: Overrides = None,
    config: Annotated[
        str,
        typer.Option(
            "--config",
            "-c",
            help="Check also the requirements of this configuration.",
            autocompletion=complete_config,
        ),
    ] = "",
    write: Annotated[bool, typer.Option("--write", help="Create a run in MLflow and delete it.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for each check.")] = 90.0,
    ray_config: RayFile = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check the requirements of a run: packages, GPU, Ray, storage, MLflow and memory, with a remedy for each."""

    def body() -> dict[str, Any]:
        from pipelines.cli.checks import examine
        from pipelines.cli.probes import FAIL

        found = list(examine(_subject(config, overrides, ray_config), write=write, wait_s=timeout))
        rows = [
            {"what": f.what, "found": f.found, "verdict": f.verdict, "remedy": f.remedy}
            for f in found
        ]  # fmt: skip
        print_table("Requirements of a run", rows)
        step = Next("run everything on rendered data", ("dmtg", "demo"))
        if config:
            step = Next("write the shards", command_line(["shard"], config, overrides, ray_config))
        failed = [f.what for f in found if f.verdict == FAIL]
        if failed:
            again = command_line(["doctor"], config, overrides, ray_config) if config else ("dmtg", "doctor")
            step = Next(f"correct {', '.join(failed)}, then check again", again)
        return {"status": "failed" if failed else "done", "findings": [asdict(f) for f in found], "next": step}

    run("doctor", body, reads=config, as_json=as_json, debug=debug)


def _subject(config: str, overrides: list[str] | None, ray_config: str) -> Subject:
    """The subject of the checks: all that a configuration names, or only what `ray_config.yaml` names."""
    from pipelines.cli.checks import Subject
    from pipelines.config.loading import load_ray, load_track
    from pipelines.errors import UserError
    from pipelines.storage import locate

    if not config:
        if overrides:
            raise UserError(
                f"{overrides[0]} overrides a configuration, but no configuration is named", where="command line",
                remedy="name it with -c", wrong_use=True,
            )  # fmt: skip
        section = load_ray(ray_config)
        return Subject(section, load_track("", ray_config), {"ray.storage": section.storage or "."})
    loaded = load(config, overrides, ray_config)
    places = {"run.root": loaded.run.root, "data.shards": str(locate(loaded.data.shards).parent)}
    kind = loaded.source.kind if loaded.source is not None else ""
    return Subject(
        loaded.ray,
        loaded.track,
        places,
        loaded.source.root if loaded.source is not None and kind != "rooms" else "",  # rooms are rendered
        [EXTRAS[name] for name in (kind, loaded.network.encoder, loaded.sweep.search) if name in EXTRAS],
    )
