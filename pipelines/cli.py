"""The `dmtg` command: parse, call one function of a room, print.

Ray, MLflow and torch are imported only where a command runs, so that `--help` is instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli_models import models_app
from pipelines.cli_options import ConfigFile, Debug, Json, RayFile, Words
from pipelines.console import number, print_table, run, say

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.train import Trained

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Learn which prediction tasks should share an encoder, and train one model per group.",
    epilog="-c takes a YAML file or the name of a recipe that ships; section.key=value words change it.",
)


def _load(config: str, words: list[str] | None, ray_config: str = "") -> Config:
    from pipelines.config import load_config

    return load_config(config, words or [], ray_config)


@app.command()
def demo(words: Words = None, as_json: Json = False, debug: Debug = False) -> None:
    """Everything at once on rooms it renders itself: shards, grouping, models, report. Minutes, no server."""
    run("demo", lambda: _train(_load("rooms", words)), as_json=as_json, debug=debug)


@app.command()
def shard(
    config: ConfigFile, words: Words = None, ray_config: RayFile = "", as_json: Json = False, debug: Debug = False
) -> None:
    """Raw data (source) to Parquet shards (data.shards). Killed, it is run again and makes what is missing."""

    def body() -> dict[str, Any]:
        from pipelines.cluster import session
        from pipelines.shards import shard as make

        loaded = _load(config, words, ray_config)
        with session(loaded.ray):
            done = make(loaded, say)
        described = done.manifest.to_dict()
        say(
            f"{described['rows']} samples in {done.made + done.kept} shards ({done.kept} kept), "
            f"{described['quarantined']} quarantined: {loaded.data.shards}"
        )
        return {"rows": described["rows"], "quarantined": described["quarantined"], "made": done.made,
                "kept": done.kept, "shards": loaded.data.shards, "digest": described["digest"]}  # fmt: skip

    run("shard", body, as_json=as_json, debug=debug)


@app.command()
def inspect(
    config: ConfigFile,
    words: Words = None,
    out: Annotated[str, typer.Option(help="File or folder of the page; beside the shards by default.")] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Statistics of the shards, a page of them with samples; exit code 1 for damage or a target without signal."""

    def body() -> dict[str, Any]:
        from pipelines.inspect import inspect as look

        loaded = _load(config, words)
        found = look(loaded, out)
        print_table(f"{loaded.data.shards}: {found['rows']} samples", found["table"],
                    right=("rows", "missing", "mean", "std", "min", "max"))  # fmt: skip
        for problem in found["problems"]:
            say(f"problem: {problem}")
        for note in found["notes"]:
            say(f"note: {note}")
        say(f"page: {found['page']}")
        return found | {"status": "failed" if found["problems"] else "done"}

    run("inspect", body, as_json=as_json, debug=debug)


@app.command()
def train(
    config: ConfigFile,
    words: Words = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Measure a few steps instead: a trace, and where their time goes.")
    ] = False,
    ray_config: RayFile = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Shards to a grouping and one model a group. Killed, it is run again with the same words and goes on."""
    body = _profile if profile else _train
    run("train", lambda: body(_load(config, words, ray_config)), as_json=as_json, debug=debug)


def _profile(config: Config) -> dict[str, Any]:
    from pipelines.profile import profile

    done = profile(config, say)
    found = done.found
    rows = [{"part of a step": part, "share": f"{share:.1%}"} for part, share in found["shares"].items()]
    print_table(
        f"{found['seconds_per_step']:.3g} s a step, {found['samples_per_second']:.0f} samples/s on "
        f"{found['workers']} × {found['device']}", rows, right=("share",),
    )  # fmt: skip
    say(f"sums over workers took {found['all_reduce_share']:.1%}, some of it beside the backward pass")
    say(f"trace for ui.perfetto.dev: {done.trace}\nslowest operators: {done.operators}")
    return {"run_dir": str(done.folder.parent), "profile": found, "trace": str(done.trace)}


def _train(config: Config) -> dict[str, Any]:
    from pipelines.train import train as work

    done = work(config, say)
    _summary(config, done)
    result = done.result
    shown = ("grouping", "split", "metrics", "baseline", "normalized_gain", "notes")
    return {
        "run_dir": str(done.run),
        "run_id": done.run_id,
        **{key: result[key] for key in shown},
        "models": [model.uri for model in done.models],
        "report": str(done.report),
    }


def _summary(config: Config, done: Trained) -> None:
    from pipelines.report import task_rows
    from pipelines.tracking import tracking_uri

    rows = [
        {
            "group": row["group"],
            "task": row["task"],
            "metric": row["metric"],
            "this grouping": number(row["value"]),
            "naive MTL": number(row["baseline"]),
            "error": "–" if row["gain"] is None else f"{-row['gain']:+.1f} %",
        }
        for row in sorted(task_rows(done.result), key=lambda row: str(row["group"]))
    ]
    title = f"Grouping {done.result['grouping_name']} on {done.result['split']}"
    print_table(title, rows, right=("this grouping", "naive MTL", "error"))
    if done.result["normalized_gain"] is not None:
        say(f"mean error against naive MTL: {-done.result['normalized_gain']:+.1f} % (one run; other seeds vary)")
    for note in done.result["notes"]:
        say(f"note: {note}")
    say(f"run:      {done.run}\nreport:   {done.report}")
    for model in done.models:
        say(f"model:    {model.uri}")
    if done.models:
        say(f"registry: mlflow ui --backend-store-uri {tracking_uri(config.track)}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="models:/<name>/<version>, or a run folder.")],
    config: ConfigFile,
    words: Words = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Metrics of a registered model (or a finished run) on shards."""

    def body() -> dict[str, Any]:
        from pipelines.evaluate import evaluate as measure

        metrics = measure(_load(config, words), model, split)
        rows = [
            {"task": task, "metric": name, "value": number(value)}
            for task, found in metrics.items()
            for name, value in found.items()
        ]
        print_table(f"{model} on {split}", rows, right=("value",))
        return {"model": model, "split": split, "metrics": metrics}

    run("evaluate", body, as_json=as_json, debug=debug)


@app.command()
def report(
    run_dir: Annotated[str, typer.Argument(help="Folder of a finished run.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """One self-contained HTML page of a finished run."""

    def body() -> dict[str, Any]:
        from pipelines.report import write_report
        from pipelines.storage import locate

        page = write_report(locate(run_dir))
        say(f"report: {page}")
        return {"run_dir": run_dir, "report": str(page)}

    run("report", body, as_json=as_json, debug=debug)


app.add_typer(models_app, name="models")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
