"""The commands for data: write shards and inspect them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipelines.cli.console import Next, log, print_table, run, show
from pipelines.cli.options import (
    ConfigFile,
    Debug,
    Json,
    LocalOk,
    Overrides,
    RayFile,
    command_line,
    load,
    load_for_work,
)


def shard(
    config: ConfigFile,
    overrides: Overrides = None,
    night: Annotated[
        str,
        typer.Option(
            help="Date of a data set for regroup: write to <regroup.shards>/<date>. YYYY-MM-DD or today."
        ),
    ] = "",
    ray_config: RayFile = "",
    local_ok: LocalOk = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert raw data (source) to Parquet shards (data.shards). If it was killed, the same command resumes."""

    def body() -> dict[str, Any]:
        from pipelines.data.manifest import repeated_notes
        from pipelines.data.shards import shard as write_shards
        from pipelines.nightly.datasets import checked_date, of_date

        loaded = load_for_work(config, overrides, ray_config, local_ok=local_ok)
        date = checked_date(night) if night else ""
        if date:
            loaded = of_date(loaded, date)
        done = write_shards(loaded, log)
        described = done.manifest.to_dict()
        show(
            f"{described['rows']} samples in {done.made + done.kept} shards ({done.kept} kept), "
            f"{described['quarantined']} quarantined: {loaded.data.shards}"
        )
        for note in repeated_notes(done.manifest):
            show(f"note: {note}")
        shards = [f"data.shards={loaded.data.shards}"] if night else []
        inspecting = command_line(["inspect"], config, [*(overrides or []), *shards], ray_config)
        step = Next("inspect the shards", inspecting)
        return {"rows": described["rows"], "quarantined": described["quarantined"], "made": done.made,
                "kept": done.kept, "shards": loaded.data.shards, "digest": described["digest"],
                **({"night": date} if date else {}), "next": step}  # fmt: skip

    run("shard", body, reads=config, as_json=as_json, debug=debug)


def inspect(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(help="File or folder of the page; beside the shards by default.")] = "",
    ray_config: RayFile = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print statistics of the shards and write a page with samples.

    The exit code is 1 if a shard is damaged or a target is constant.
    """

    def body() -> dict[str, Any]:
        from pipelines.report.inspect import inspect as inspect_shards

        loaded = load(config, overrides, ray_config)
        found = inspect_shards(loaded, out)
        print_table(f"{loaded.data.shards}: {found['rows']} samples", found["table"],
                    right=("rows", "missing", "mean", "std", "min", "max"))  # fmt: skip
        for problem in found["problems"]:
            show(f"problem: {problem}")
        for note in found["notes"]:
            show(f"note: {note}")
        show(f"page: {found['page']}")
        step = _next_step(found, config, overrides, ray_config)
        return found | {"status": "failed" if found["problems"] else "done", "next": step}

    run("inspect", body, reads=config, as_json=as_json, debug=debug)


def _next_step(found: dict[str, Any], config: str, overrides: list[str] | None, ray_config: str) -> Next:
    """The command after `inspect`, which depends on the problems that it found."""
    tasks = list(found["statistics"]["train"])
    constant = [task for task in tasks if any(p.startswith(f"task {task} is constant") for p in found["problems"])]
    if not found["problems"]:
        return Next("train a grouping and its models", command_line(["train"], config, overrides, ray_config))
    if constant and len(constant) < len(tasks):
        from pipelines.config.yaml_text import in_line

        kept = f"data.tasks={in_line([task for task in tasks if task not in constant])}"
        without = command_line(["inspect"], config, [*(overrides or []), kept], ray_config)
        return Next("inspect the shards without the constant targets", without)
    return Next(
        "correct the problems and write the shards", command_line(["shard"], config, overrides, ray_config)
    )
