"""The commands that evaluate and serve registered models, and the nightly run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.console import KEPT, Next, log, print_table, run
from pipelines.cli.options import (
    ConfigFile,
    Debug,
    Json,
    LocalOk,
    Model,
    Overrides,
    RayFile,
    TrustCode,
    command_line,
    load,
    load_for_work,
    models_command,
    predict_command,
)
from pipelines.report.formatting import figure, percent

if TYPE_CHECKING:
    from pipelines.config.loading import Config


def evaluate(
    model: Model,
    config: ConfigFile,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    ray_config: RayFile = "",
    trust_code: TrustCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Evaluate a registered model, or a finished run, on shards."""

    def body() -> dict[str, Any]:
        from pipelines.serving.evaluate import evaluate as evaluate_model

        loaded = load(config, overrides, ray_config)
        metrics = evaluate_model(loaded, model, split, trust_code=trust_code)
        rows = [
            {"task": task, "metric": name, "value": figure(value)}
            for task, found in metrics.items()
            for name, value in found.items()
        ]
        print_table(f"{model} on {split}", rows, right=("value",))
        step = Next("predict with the model", predict_command(model, loaded, config, overrides, ray_config))
        return {"model": model, "split": split, "metrics": metrics, "next": step}

    run("evaluate", body, reads=config, as_json=as_json, debug=debug)


def predict(
    model: Model,
    config: ConfigFile,
    out: Annotated[str, typer.Option(help="Folder for the predictions, local or s3://.")],
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="train, val, test or all.")] = "test",
    ray_config: RayFile = "",
    trust_code: TrustCode = False,
    local_ok: LocalOk = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Predict shards with a model and write Parquet files. If it was killed, the same command resumes.

    Columns: id. A binary task has its probability. A multiclass task has its most probable class, and
    <task>.<class> with the probability of each class; with more than 1000 classes it has only <task>.probability,
    that of the most probable class. A regression task has its value. A dense task has the raw bytes of its pixels;
    their dtype and shape are in _predictions.json.
    """

    def body() -> dict[str, Any]:
        from dmtg_core.names import listed
        from pipelines.serving.predict import predict as predict_shards

        loaded = load_for_work(config, overrides, ray_config, local_ok=local_ok, out=out)
        done = predict_shards(loaded, model, out, split, log, trust_code=trust_code)
        rows = [
            {"task": name, "group": entry["group"], "kind": entry["kind"], "unit": entry["unit"],
             "columns": listed(entry["columns"])}
            for name, entry in done.tasks.items()
        ]  # fmt: skip
        print_table(f"Predictions of {model} on {split}", rows)
        log(f"{done.rows} rows in {done.files} files ({done.kept} kept): {done.out}")
        return {"rows": done.rows, "files": done.files, "kept": done.kept, "out": str(done.out),
                "next": _next_step(model, loaded)}  # fmt: skip

    run("predict", body, reads=config, as_json=as_json, debug=debug)


def _next_step(model: str, config: Config) -> Next:
    """The command after `predict`, which depends on the model's address."""
    name, _, alias = model.removeprefix("models:/").partition("@")
    name, _, version = name.partition("/")
    if not model.startswith("models:/"):
        return Next("list the registered models", models_command("list", config.track))
    if alias == "champion" or "." in name:
        return Next("show the model and its metrics", models_command("show", config.track, model))
    chosen = ["--version", version] if version else []
    return Next("make the model the champion", models_command("promote", config.track, name, *chosen))


def regroup(
    config: ConfigFile,
    overrides: Overrides = None,
    night: Annotated[str, typer.Option(help="Date of the data set, YYYY-MM-DD; today in UTC by default.")] = "",
    shard: Annotated[
        bool, typer.Option("--shard", help="First write the data set of the date from the source.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Train and evaluate, but do not register, promote or call the webhook."),
    ] = False,
    wait: Annotated[float, typer.Option(help="Seconds to wait for another regroup of the same model.")] = 0.0,
    kept_ok: Annotated[
        bool, typer.Option("--kept-ok", help="Exit with code 0, not 3, if the champion is kept.")
    ] = False,
    ray_config: RayFile = "",
    trust_code: TrustCode = False,
    local_ok: LocalOk = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the nightly job: train a challenger on the newest data and promote it if it beats the champion.

    The exit code is 0 if the challenger was promoted and 3 if the champion was kept. The same command with the
    same date resumes an unfinished run and repeats the verdict of a finished one.
    """

    def body() -> dict[str, Any]:
        from pipelines.nightly.driver import regroup as run_nightly

        loaded = load_for_work(config, overrides, ray_config, local_ok=local_ok)
        found = run_nightly(
            loaded, night, shard=shard, dry_run=dry_run, wait_s=wait, trust_code=trust_code, log=log
        )
        promoted = found["verdict"] == "promoted"
        if dry_run:
            again = [*(["--night", night] if night else []), *(["--shard"] if shard else [])]
            step = Next("run without --dry-run", command_line(["regroup"], config, overrides, ray_config, *again))
        elif promoted:
            step = Next("show the champion", models_command("show", loaded.track, f"{loaded.name}@champion"))
        else:
            step = Next("compare champion and challenger", models_command("diff", loaded.track, loaded.name))
        return {"exit_code": 0 if promoted or kept_ok else KEPT, **_print_verdict(found), "next": step}

    run("regroup", body, reads=config, as_json=as_json, debug=debug)


def _print_verdict(found: dict[str, Any]) -> dict[str, Any]:
    """Print the comparison and the verdict of a nightly run, and return it."""
    from pipelines.nightly.page import headline, task_rows

    rows = [
        {
            "task": row["task"],
            "metric": row["metric"],
            "champion": figure(row["champion"]),
            "challenger": figure(row["challenger"]),
            "gain": percent(row["value"]),
            "group": row["before"] if row["before"] == row["after"] else f"{row['before']} → {row['after']}",
        }
        for row in task_rows(found)
    ]
    if rows:
        print_table(f"{found['name']}, {found['night']}, on {found['split']}", rows,
                    right=("champion", "challenger", "gain"))  # fmt: skip
    for note in (*found["notes"], *found.get("data_drift", ())):
        log(f"note: {note}")
    log(f"verdict: {found['verdict']}{' (dry run)' if found.get('dry_run') else ''}. {headline(found)}")
    if found.get("report"):
        log(f"report:  {found['report']}")
    return found
