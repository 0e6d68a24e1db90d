"""The `dmtg` command: parse, call one function of a room, print.

Ray, MLflow and torch are imported only where a command runs, so that `--help` is instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli_config import config_app
from pipelines.cli_models import models_app
from pipelines.cli_options import ConfigFile, Debug, Json, RayFile, Words
from pipelines.console import KEPT, number, print_table, run, say

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
    shown = ("grouping", "split", "metrics", "baseline", "normalized_gain", "chosen", "candidates", "notes")
    return {
        "run_dir": str(done.run),
        "run_id": done.run_id,
        **{key: result[key] for key in shown},
        "models": [model.uri for model in done.models],
        "report": str(done.report),
    }


def _summary(config: Config, done: Trained) -> None:
    from pipelines.mlflow_errors import without_credentials
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
    if len(done.result["candidates"]) > 1:
        scores = [f"{c['stage']} {c['score'] if c['final'] is None else c['final']:.4f}"
                  f"{' (stopped)' if c['final'] is None else ''}" for c in done.result["candidates"]]  # fmt: skip
        cost = done.result["training_cost"]
        after = done.result["distilled"]
        learned = f"; learned on from {', '.join(after['teachers'])}: {after['final']:.4f}" if after else ""
        say(
            f"kept {done.result['chosen']} by validation: {', '.join(scores)}{learned}; "
            f"{cost:.1f} runs of naive MTL in all"
        )
    for note in done.result["notes"]:
        say(f"note: {note}")
    say(f"run:      {done.run}\nreport:   {done.report}")
    for model in done.models:
        say(f"model:    {model.uri}")
    if done.models:
        server = without_credentials(tracking_uri(config.track))
        say(f"registry: {server if server.startswith('http') else f'mlflow ui --backend-store-uri {server}'}")


@app.command()
def sweep(
    config: ConfigFile, words: Words = None, ray_config: RayFile = "", as_json: Json = False, debug: Debug = False
) -> None:
    """Train all settings of the sweep section beside each other: which is best, and which are worth their cost."""
    run("sweep", lambda: _sweep(_load(config, words, ray_config)), as_json=as_json, debug=debug)


def _sweep(config: Config) -> dict[str, Any]:
    from pipelines.report.sweep import cost, marks_of, percent, verdict
    from pipelines.standings import KNEE
    from pipelines.sweep import sweep as work

    done = work(config, say)
    found = done.found
    rows = [
        {
            "setting": row["label"],
            "seeds": f"{row['finished']} of {row['seeds']}",
            "score": number(row["val_score"]),
            "gain on val": percent(row["gain_validation"]),
            f"on {found['split']}": percent(row["gain"]),
            "operations": cost(row["flops"]),
            "parameters": cost(row["parameters"]),
            "": ", ".join(marks_of(row["label"], found)),
        }
        for row in found["settings"]
    ]
    right = ("score", "gain on val", f"on {found['split']}", "operations", "parameters")
    print_table(f"Means over seeds of {len(found['rows'])} trials", rows, right=right)
    for text in (
        verdict(found),
        found["rule"],
        *([KNEE] if found["knee"] else []),
        *(f"note: {note}" for note in found["notes"]),
    ):
        say(text)
    say(f"sweep:    {done.folder}\nreport:   {done.page}\nbest:     dmtg train -c {done.best_config}")
    return {
        "run_dir": str(done.folder),
        "run_id": done.run_id,
        **{key: found[key] for key in ("rows", "best", "pareto", "split", "notes")},
        "normalized_gain": found["best"]["gain"],
        "best_config": str(done.best_config),
        "report": str(done.page),
    }


@app.command()
def signal(
    config: ConfigFile, words: Words = None, ray_config: RayFile = "", as_json: Json = False, debug: Debug = False
) -> None:
    """Short runs that tell beforehand whether grouping can matter: how much is the grouping, how much the seed."""

    def body() -> dict[str, Any]:
        from pipelines.preflight import signal as work
        from pipelines.report.compare import two

        done = work(_load(config, words, ray_config), say)
        found = done.found
        overall = {"task": "all", **found["correlation"]}
        rows = [
            {
                "task": row["task"],
                "correlation": two(row["value"]),
                "interval": f"{two(row['low'])} to {two(row['high'])}",
                "between groupings": f"{100 * row['between']:.1f} %",
                "between seeds": f"{100 * row['within']:.1f} %",
            }
            for row in (overall, *({"task": name, **row} for name, row in found["by_task"].items()))
        ]
        title = (
            f"{len(found['partitions'])} random groupings × {len(found['seeds'])} seeds, {found['epochs']} epochs"
        )
        print_table(title, rows, right=("correlation", "between groupings", "between seeds"))
        say(f"verdict: {found['verdict']}\nsignal:  {done.folder}")
        return {"run_dir": str(done.folder), **found}

    run("signal", body, as_json=as_json, debug=debug)


@app.command()
def compare(
    config: ConfigFile, words: Words = None, ray_config: RayFile = "", as_json: Json = False, debug: Debug = False
) -> None:
    """The search beside naive MTL, a wide encoder, random groups and published selectors, over seeds."""
    run("compare", lambda: _compare(_load(config, words, ray_config)), as_json=as_json, debug=debug)


def _compare(config: Config) -> dict[str, Any]:
    from pipelines.compare import compare as work
    from pipelines.report.compare import interval, two
    from pipelines.report.sweep import cost

    done = work(config, say)
    found = done.found
    rows = [
        {
            "method": row["method"],
            "gain, errors": interval(row["gain"], " %"),
            "gain, losses": interval(row["gain_loss"], " %"),
            f"behind {found['reference']}": interval(row["behind"]),
            "training": f"{row['cost']:.1f}",
            "operations": cost(row["flops"]),
            "parameters": cost(row["parameters"]),
            "agreement": two(row["stability"]),
        }
        for row in found["rows"]
    ]
    title = (
        f"Over naive MTL on {found['split']}, {len(found['seeds'])} seeds, 95 % intervals; training in its runs"
    )
    print_table(title, rows, right=tuple(rows[0])[1:])
    for text in (*found["verdicts"], *(f"note: {note}" for note in found["notes"])):
        say(text)
    say(f"signal:     {found['signal'] or 'not asked: dmtg signal tells beforehand whether grouping can matter'}")
    say(f"comparison: {done.folder}\nreport:     {done.page}")
    ours = next((row for row in found["rows"] if row["method"] == found["reference"]), found["rows"][0])
    return {
        "run_dir": str(done.folder),
        "run_id": done.run_id,
        **{key: found[key] for key in ("rows", "split", "verdicts", "agreement", "notes")},
        "normalized_gain": ours["gain"]["value"],
        "report": str(done.page),
    }


@app.command()
def regroup(
    config: ConfigFile,
    words: Words = None,
    night: Annotated[str, typer.Option(help="Date of the night, YYYY-MM-DD; today's in UTC by default.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train and judge, but register, promote and tell nobody.")
    ] = False,
    wait: Annotated[float, typer.Option(help="Seconds to wait for another regroup of the same model.")] = 0.0,
    kept_ok: Annotated[
        bool, typer.Option("--kept-ok", help="Exit with 0, not 3, where the champion is kept.")
    ] = False,
    ray_config: RayFile = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The nightly job: a challenger on the newest data, which replaces the champion where it is better.

    Exit code 0 when it was promoted, 3 when the champion was kept. Run again for the same night, it goes on, or
    says what it said.
    """

    def body() -> dict[str, Any]:
        from pipelines.regroup import regroup as work

        found = work(_load(config, words, ray_config), night, dry_run=dry_run, wait_s=wait, say=say)
        return {"exit_code": 0 if found["verdict"] == "promoted" or kept_ok else KEPT, **_night(found)}

    run("regroup", body, as_json=as_json, debug=debug)


def _night(found: dict[str, Any]) -> dict[str, Any]:
    from pipelines.report.regroup import headline, task_rows

    rows = [
        {
            "task": row["task"],
            "metric": row["metric"],
            "champion": number(row["champion"]),
            "challenger": number(row["challenger"]),
            "error": "–" if row["value"] is None else f"{-row['value']:+.1f} %",
            "group": row["before"] if row["before"] == row["after"] else f"{row['before']} → {row['after']}",
        }
        for row in task_rows(found)
    ]
    if rows:
        print_table(f"{found['name']}, night {found['night']}, on {found['split']}", rows,
                    right=("champion", "challenger", "error"))  # fmt: skip
    for note in (*found["notes"], *found.get("data_drift", ())):
        say(f"note: {note}")
    say(f"verdict: {found['verdict']}{' (dry run)' if found.get('dry_run') else ''}. {headline(found)}")
    if found.get("report"):
        say(f"report:  {found['report']}")
    return found


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
def predict(
    model: Annotated[str, typer.Argument(help="models:/<name>/<version> or @<alias>, or a run folder.")],
    config: ConfigFile,
    out: Annotated[str, typer.Option(help="Folder for the predictions, local or s3://.")],
    words: Words = None,
    split: Annotated[str, typer.Option(help="train, val, test or all.")] = "test",
    ray_config: RayFile = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Predictions of a model for shards, as Parquet. Killed, it is run again and makes what is missing.

    Columns: id; for a binary task its probability; for a multiclass task the likeliest class, and <task>.<class>
    with the probability of each; for a regression task its value; for a dense task the raw bytes of its pixels,
    whose dtype and shape are in _predictions.json.
    """

    def body() -> dict[str, Any]:
        from pipelines.predict import predict as work

        done = work(_load(config, words, ray_config), model, out, split, say)
        rows = [
            {"task": name, "group": entry["group"], "kind": entry["kind"], "unit": entry["unit"],
             "columns": ", ".join(entry["columns"])}
            for name, entry in done.tasks.items()
        ]  # fmt: skip
        print_table(f"Predictions of {model} on {split}", rows)
        say(f"{done.rows} rows in {done.files} files ({done.kept} kept): {done.out}")
        return {"rows": done.rows, "files": done.files, "kept": done.kept, "out": str(done.out)}

    run("predict", body, as_json=as_json, debug=debug)


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


app.add_typer(config_app, name="config")
app.add_typer(models_app, name="models")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
