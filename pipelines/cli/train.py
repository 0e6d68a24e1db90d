"""The commands on the way from raw data to a grouping with its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.console import Next, log, number, print_table, run
from pipelines.cli.options import ConfigFile, Debug, Json, RayFile, Words, load, predicting, same

if TYPE_CHECKING:
    from pipelines.config.loading import Config
    from pipelines.training.driver import Trained


def demo(words: Words = None, as_json: Json = False, debug: Debug = False) -> None:
    """Everything at once on rooms it renders itself: shards, grouping, models, report. Minutes, no server."""

    def body() -> dict[str, Any]:
        own = Next("on your own data", ("dmtg", "config", "new", "--help"))
        return _train(load("rooms", words)) | {"next": own}

    run("demo", body, as_json=as_json, debug=debug)


def shard(
    config: ConfigFile, words: Words = None, ray_config: RayFile = "", as_json: Json = False, debug: Debug = False
) -> None:
    """Raw data (source) to Parquet shards (data.shards). Killed, it is run again and makes what is missing."""

    def body() -> dict[str, Any]:
        from pipelines.data.shards import shard as make

        loaded = load(config, words, ray_config)
        done = make(loaded, log)
        described = done.manifest.to_dict()
        log(
            f"{described['rows']} samples in {done.made + done.kept} shards ({done.kept} kept), "
            f"{described['quarantined']} quarantined: {loaded.data.shards}"
        )
        step = Next("statistics and a page of samples", same(["inspect"], config, words, ray_config))
        return {"rows": described["rows"], "quarantined": described["quarantined"], "made": done.made,
                "kept": done.kept, "shards": loaded.data.shards, "digest": described["digest"],
                "next": step}  # fmt: skip

    run("shard", body, as_json=as_json, debug=debug)


def inspect(
    config: ConfigFile,
    words: Words = None,
    out: Annotated[str, typer.Option(help="File or folder of the page; beside the shards by default.")] = "",
    ray_config: RayFile = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Statistics of the shards, a page of them with samples; exit code 1 for damage or a target without signal."""

    def body() -> dict[str, Any]:
        from pipelines.report.inspect import inspect as look

        loaded = load(config, words, ray_config)
        found = look(loaded, out)
        print_table(f"{loaded.data.shards}: {found['rows']} samples", found["table"],
                    right=("rows", "missing", "mean", "std", "min", "max"))  # fmt: skip
        for problem in found["problems"]:
            log(f"problem: {problem}")
        for note in found["notes"]:
            log(f"note: {note}")
        log(f"page: {found['page']}")
        step = _after(found, config, words, ray_config)
        return found | {"status": "failed" if found["problems"] else "done", "next": step}

    run("inspect", body, as_json=as_json, debug=debug)


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

    def body() -> dict[str, Any]:
        loaded = load(config, words, ray_config)
        if profile:
            return _profile(loaded) | {"next": Next("the run itself", same(["train"], config, words, ray_config))}
        found = _train(loaded)
        model = found["models"][0] if found["models"] else found["run_dir"]
        step = predicting(model, loaded, config, words, ray_config)
        return found | {"next": Next("predictions of the model for the test split", step)}

    run("train", body, as_json=as_json, debug=debug)


def _after(found: dict[str, Any], config: str, words: list[str] | None, ray_config: str) -> Next:
    """What follows on what `inspect` has found."""
    tasks = list(found["statistics"]["train"])
    bad = [task for task in tasks if any(p.startswith(f"task {task} is constant") for p in found["problems"])]
    if not found["problems"]:
        return Next("the grouping and its models", same(["train"], config, words, ray_config))
    if bad and len(bad) < len(tasks):
        kept = f"data.tasks=[{', '.join(task for task in tasks if task not in bad)}]"
        return Next("without what is constant", same(["inspect"], config, [*(words or []), kept], ray_config))
    return Next("when that is mended", same(["shard"], config, words, ray_config))


def _profile(config: Config) -> dict[str, Any]:
    from pipelines.training.profiling import profile

    done = profile(config, log)
    found = done.found
    rows = [{"part of a step": part, "share": f"{share:.1%}"} for part, share in found["shares"].items()]
    print_table(
        f"{found['seconds_per_step']:.3g} s a step, {found['samples_per_second']:.0f} samples/s on "
        f"{found['workers']} × {found['device']}", rows, right=("share",),
    )  # fmt: skip
    log(f"sums over workers took {found['all_reduce_share']:.1%}, some of it beside the backward pass")
    log(f"trace for ui.perfetto.dev: {done.trace}\nslowest operators: {done.operators}")
    return {"run_dir": str(done.folder.parent), "profile": found, "trace": str(done.trace)}


def _train(config: Config) -> dict[str, Any]:
    from pipelines.training.driver import train as work

    done = work(config, log)
    _summary(config, done)
    result = done.result
    shown = ("grouping", "split", "metrics", "baseline", "normalized_gain", "chosen", "candidates", "notes")
    return {
        "run_dir": str(done.run),
        "run_id": done.run_id,
        **{key: result[key] for key in shown},
        "models": [model.uri for model in done.models],
        "report": str(done.report),
    }


def _summary(config: Config, done: Trained) -> None:
    from dmtg_core.names import by_number
    from pipelines.registry.errors import without_credentials
    from pipelines.registry.tracking import tracking_uri
    from pipelines.report.run import task_rows

    rows = [
        {
            "group": row["group"],
            "task": row["task"],
            "metric": row["metric"],
            "this grouping": number(row["value"]),
            "naive MTL": number(row["baseline"]),
            "error": "–" if row["gain"] is None else f"{-row['gain']:+.1f} %",
        }
        for row in sorted(task_rows(done.result), key=lambda row: by_number(row["group"]))
    ]
    title = f"Grouping {done.result['grouping_name']} on {done.result['split']}"
    print_table(title, rows, right=("this grouping", "naive MTL", "error"))
    if done.result["normalized_gain"] is not None:
        log(f"mean error against naive MTL: {-done.result['normalized_gain']:+.1f} % (one run; other seeds vary)")
    if len(done.result["candidates"]) > 1:
        scores = [f"{c['stage']} {c['score'] if c['final'] is None else c['final']:.4f}"
                  f"{' (stopped)' if c['final'] is None else ''}" for c in done.result["candidates"]]  # fmt: skip
        cost = done.result["training_cost"]
        after = done.result["distilled"]
        learned = f"; learned on from {', '.join(after['teachers'])}: {after['final']:.4f}" if after else ""
        log(
            f"kept {done.result['chosen']} by validation: {', '.join(scores)}{learned}; "
            f"{cost:.1f} runs of naive MTL in all"
        )
    for note in done.result["notes"]:
        log(f"note: {note}")
    log(f"run:      {done.run}\nreport:   {done.report}")
    for model in done.models:
        log(f"model:    {model.uri}")
    if done.models:
        server = without_credentials(tracking_uri(config.track))
        log(f"registry: {server if server.startswith('http') else f'mlflow ui --backend-store-uri {server}'}")


def report(
    run_dir: Annotated[str, typer.Argument(help="Folder of a finished run.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """One self-contained HTML page of a finished run."""

    def body() -> dict[str, Any]:
        from pipelines.report.run import write_report
        from pipelines.storage import locate

        page = write_report(locate(run_dir))
        log(f"report: {page}")
        there = f"{run_dir.rstrip('/')}/config.yaml"
        step = Next("all its metrics on the test split", ("dmtg", "evaluate", run_dir, "-c", there))
        return {"run_dir": run_dir, "report": str(page), "next": step}

    run("report", body, as_json=as_json, debug=debug)
