"""`dmtg doctor`: what is looked at, and the table of what was found."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.completion import complete_config
from pipelines.cli.console import Next, print_table, run
from pipelines.cli.options import Debug, Json, RayFile, Words, load, same

if TYPE_CHECKING:
    from pipelines.cli.checks import Subject

EXTRAS = {"text": "text", "transformers": "transformers"}  # kind of source, or encoder → extra of the package


def doctor(
    words: Words = None,
    config: Annotated[
        str,
        typer.Option("--config", "-c", help="Also what this configuration needs.", autocompletion=complete_config),
    ] = "",
    write: Annotated[bool, typer.Option("--write", help="Make a run in MLflow too, and delete it again.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for what does not answer.")] = 90.0,
    ray_config: RayFile = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Is everything here that a run needs: packages, GPU, Ray, storage, MLflow, memory; what to do if not."""

    def body() -> dict[str, Any]:
        from pipelines.cli.checks import FAIL, examine

        found = list(examine(_subject(config, words, ray_config), write=write, wait_s=timeout))
        rows = [
            {"what": f.what, "found": f.found, "verdict": f.verdict, "remedy": f.remedy}
            for f in found
        ]  # fmt: skip
        print_table("What a run needs", rows)
        step = Next("everything at once, on data that it makes itself", ("dmtg", "demo"))
        if config:
            step = Next("raw data to shards", same(["shard"], config, words, ray_config))
        failed = [f.what for f in found if f.verdict == FAIL]
        if failed:
            again = same(["doctor"], config, words, ray_config) if config else ("dmtg", "doctor", *(words or []))
            step = Next(f"when that is mended ({', '.join(failed)})", again)
        return {"status": "failed" if failed else "done", "findings": [asdict(f) for f in found], "next": step}

    run("doctor", body, as_json=as_json, debug=debug)


def _subject(config: str, words: list[str] | None, ray_config: str) -> Subject:
    """What there is to look at: of a configuration all that it names, else what `ray_config.yaml` says."""
    from pipelines.cli.checks import Subject
    from pipelines.config.loading import load_ray, load_track
    from pipelines.errors import UserError
    from pipelines.storage import locate

    if not config:
        if words:
            raise UserError(
                f"{words[0]} changes a configuration, and none is named", where="command line",
                remedy="name it with -c", wrong_use=True,
            )  # fmt: skip
        section = load_ray(ray_config)
        return Subject(section, load_track("", ray_config), {"ray.storage": section.storage or "."})
    loaded = load(config, words, ray_config)
    places = {"run.root": loaded.run.root, "data.shards": str(locate(loaded.data.shards).parent)}
    kind = loaded.source.kind if loaded.source is not None else ""
    return Subject(
        loaded.ray,
        loaded.track,
        places,
        loaded.source.root if loaded.source is not None and kind != "rooms" else "",  # which it makes itself
        [EXTRAS[name] for name in (kind, loaded.network.encoder) if name in EXTRAS],
    )
