"""The commands that train one grouping: the demo, a training run, and its report."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.console import Next, log, print_table, run, show
from pipelines.cli.options import (
    ConfigFile,
    Debug,
    Json,
    LocalOk,
    Overrides,
    RayFile,
    RunDir,
    TrustCode,
    command_line,
    load,
    load_for_work,
    next_step,
    predict_command,
)
from pipelines.compare.verdicts import of_train
from pipelines.errors import without_credentials
from pipelines.report.formatting import figure, percent

if TYPE_CHECKING:
    from pipelines.config.loading import Config
    from pipelines.storage import Location
    from pipelines.training.driver import Trained


def demo(overrides: Overrides = None, as_json: Json = False, debug: Debug = False) -> None:
    """Run everything on a table of three machines: shards, grouping, models, report. It needs no server."""

    def body() -> dict[str, Any]:
        from pipelines.scaffold.example import FAULTS, write_hall
        from pipelines.storage import locate

        config = load("hall", overrides)
        table = config.source.root if config.source else ""
        write_hall(locate(table))
        found = _train(config)
        log(f"picture:  {found['run_dir']}/grouping.png")
        command = (program(), "config", "new", table, "--targets", ",".join(FAULTS), "-o", "my_table.yaml")
        return found | {
            "next": Next("the same with your own table: put its path and targets in this command", command)
        }

    run("demo", body, reads="the recipe hall", as_json=as_json, debug=debug)


def program() -> str:
    """The command `dmtg` as it can be typed here: its path if its environment is not active."""
    own = Path(sys.argv[0])
    return "dmtg" if shutil.which("dmtg") or own.name != "dmtg" else str(own.resolve())


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Profile a few steps instead: a trace, and the time of each part.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check everything, and estimate training, time and memory.")
    ] = False,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Show a finished run although the data has changed since.")
    ] = False,
    trust_code: TrustCode = False,
    ray_config: RayFile = "",
    local_ok: LocalOk = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Search a grouping and train one model for each group. If it was killed, the same command resumes."""

    def body() -> dict[str, Any]:
        from pipelines.runs.identity import earlier_conclusion

        loaded = load_for_work(config, overrides, ray_config, local_ok=local_ok, trust_code=trust_code)
        if dry_run:
            step = Next("train", command_line(["train"], config, overrides, ray_config))
            return _dry_run(loaded) | {"next": step}
        if profile:
            step = Next("train without the profiler", command_line(["train"], config, overrides, ray_config))
            return _profile(loaded) | {"next": step}
        found = _train(loaded, reuse=reuse)
        model = found["models"][0] if found["models"] else found["run_dir"]
        predicting = predict_command(model, loaded, config, overrides, ray_config)
        use = Next("predict the test split with the model", predicting)
        step = next_step(of_train(found, earlier_conclusion(loaded, "")), config, overrides, ray_config, use)
        return found | {"next": step}

    run("train", body, reads=config, as_json=as_json, debug=debug)


def _dry_run(config: Config) -> dict[str, Any]:
    from pipelines.training.driver import dry_run

    found = dry_run(config, log)
    show(*found["text"])
    return {"estimate": found}


def _profile(config: Config) -> dict[str, Any]:
    from pipelines.training.profiling import profile

    done = profile(config, log)
    found = done.found
    rows = [{"part of a step": part, "share": f"{share:.1%}"} for part, share in found["shares"].items()]
    print_table(
        f"{found['seconds_per_step']:.3g} s a step, {found['samples_per_second']:.0f} samples/s on "
        f"{found['workers']} × {found['device']}", rows, right=("share",),
    )  # fmt: skip
    show(f"all-reduce took {found['all_reduce_share']:.1%}, partly at the same time as the backward pass")
    show(f"trace for ui.perfetto.dev: {done.trace}", f"slowest operators: {done.operators}")
    return {"run_dir": str(done.folder.parent), "profile": found, "trace": str(done.trace)}


def _train(config: Config, *, reuse: bool = False) -> dict[str, Any]:
    from pipelines.training.driver import train as train_grouping

    done = train_grouping(config, log, reuse=reuse)
    _print_summary(config, done)
    result = done.result
    shown = (
        "outcome", "grouping", "split", "metrics", "baseline", "normalized_gain", "chosen", "candidates", "budget",
        "training_cost", "costs", "estimate", "inference", "groups_inference", "notes",
    )  # fmt: skip
    return {
        "run_dir": str(done.run),
        "run_id": done.run_id,
        **{key: result[key] for key in shown},
        "trees": result.get("trees", {}),
        "models": [model.uri for model in done.models],
        "report": str(done.report),
    }


def _print_summary(config: Config, done: Trained) -> None:
    from dmtg_core.search.options import BASELINE
    from pipelines.registry.tracking import tracking_uri
    from pipelines.report.trees import better_trees, trees_text
    from pipelines.runs.outcome import outcome

    better = better_trees(done.result)
    if better:
        show(better)
    show(outcome(done.result))
    _print_tasks(done.result)
    if done.result["normalized_gain"] is not None and done.result["chosen"] != BASELINE:
        show(f"gain over naive MTL: {percent(done.result['normalized_gain'])} (one run; other seeds vary)")
    if trees := trees_text(done.result):
        show(trees)
    if len(done.result["candidates"]) > 1:
        show(_selection(done.result))
    for note in done.result["notes"]:
        show(f"note: {note}")
    show(f"run:      {done.run}", f"report:   {done.report}")
    for model in done.models:
        show(f"model:    {model.uri}")
    if done.models:
        server = without_credentials(tracking_uri(config.track))
        show(f"registry: {server if server.startswith('http') else f'mlflow ui --backend-store-uri {server}'}")


def _print_tasks(result: dict[str, Any]) -> None:
    from dmtg_core.names import by_number
    from pipelines.report.run import task_rows

    rows = [
        {
            "group": row["group"],
            "task": row["task"],
            "metric": row["metric"],
            "this grouping": figure(row["value"]),
            "naive MTL": figure(row["baseline"]),
            "gain": percent(row["gain"]),
        }
        for row in sorted(task_rows(result), key=lambda row: by_number(row["group"]))
    ]
    title = f"Grouping {result['grouping_name']} on {result['split']}"
    print_table(title, rows, right=("this grouping", "naive MTL", "gain"))


def _selection(result: dict[str, Any]) -> str:
    """The chosen network, the validation scores of all networks and the training cost, in one line."""
    from dmtg_core.search.options import BASELINE
    from pipelines.runs.outcome import spent_text

    scores = [
        f"{c['stage']} {c['score']:.4f} dropped" if c["final"] is None else f"{c['stage']} {c['final']:.4f}"
        for c in result["candidates"]
    ]
    if result.get("baseline_score") is not None:
        scores.append(f"{BASELINE} {result['baseline_score']:.4f}")
    distilled = result["distilled"]
    after = f"; distilled from {', '.join(distilled['teachers'])}: {distilled['final']:.4f}" if distilled else ""
    if (found := result.get("difference")) is not None:
        after += f"; difference to {BASELINE} {found['value']:+.4f} ± {found['error']:.4f}"
    return f"chosen on validation: {result['chosen']} ({', '.join(scores)}){after}; spent {spent_text(result)}"


def report(
    run_dir: RunDir,
    in_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the report of a finished run as one self-contained HTML page."""

    def body() -> dict[str, Any]:
        from pipelines.report.run import write_report
        from pipelines.storage import locate

        page = write_report(locate(run_dir))
        show(f"report: {page}")
        if in_browser:
            _open(page)
        config = f"{run_dir.rstrip('/')}/config.yaml"
        step = Next("evaluate all metrics on the test split", ("dmtg", "evaluate", run_dir, "-c", config))
        return {"run_dir": run_dir, "report": str(page), "next": step}

    run("report", body, reads=run_dir, as_json=as_json, debug=debug)


def _open(page: Location) -> None:
    """Open a local page in the browser, or say where to open it."""
    import webbrowser

    if page.local is None or not webbrowser.open(Path(page.local).resolve().as_uri()):
        log(f"no browser opened the page here: open {page} on a machine with one")
