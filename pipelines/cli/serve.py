"""The commands that evaluate and serve registered models, and the nightly run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.completion import complete_config, complete_input
from pipelines.cli.console import KEPT, Next, log, print_table, run, show
from pipelines.cli.options import (
    ConfigFile,
    Debug,
    Json,
    LocalOk,
    Model,
    Overrides,
    PredictModel,
    RayFile,
    TrackUri,
    TrustCode,
    command_line,
    load,
    load_for_work,
    models_command,
    predict_command,
)
from pipelines.errors import UserError
from pipelines.report.formatting import figure, percent

if TYPE_CHECKING:
    from pipelines.config.loading import Config
    from pipelines.config.sections import TrackSection
    from pipelines.serving.new_rows import Wanted

OVERRIDE = re.compile(r"[a-z_]+(\.\w+)*=")


class Format(StrEnum):
    """Formats of predictions for new rows."""

    CSV = "csv"
    PARQUET = "parquet"
    JSONL = "jsonl"


class BadRows(StrEnum):
    """What happens if rows cannot be used."""

    REFUSE = "refuse"
    SKIP = "skip"


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

        loaded = load(config, overrides, ray_config, trust_code=trust_code)
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
    model: PredictModel,
    given: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE|SECTION.KEY=VALUE]",
            help="Tables of new rows (CSV, TSV, Parquet, JSON lines), images, folders of images, or - for stdin. "
            "With -c also section.key=value overrides.",
            autocompletion=complete_input,
        ),
    ] = None,
    config: Annotated[
        str,
        typer.Option(
            "--config",
            "-c",
            help="Configuration whose shards are predicted if no file is given.",
            autocompletion=complete_config,
        ),
    ] = "",
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help="File of the predictions, - for stdout; a folder if shards are predicted."
        ),
    ] = "-",
    form: Annotated[
        Format | None,
        typer.Option(
            "--format", help="Format of the predictions; by default it follows from the name of the file."
        ),
    ] = None,
    bad_rows: Annotated[
        BadRows, typer.Option(help="If rows cannot be used: refuse the file, or skip these rows.")
    ] = BadRows.REFUSE,
    id_column: Annotated[
        str, typer.Option("--id", help="Column to copy to the predictions; by default the id column of training.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    split: Annotated[str, typer.Option(help="Split of the shards: train, val, test or all.")] = "test",
    uri: TrackUri = "",
    ray_config: RayFile = "",
    trust_code: TrustCode = False,
    local_ok: LocalOk = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Predict new rows of a file, or shards, with a model.

    New rows are prepared as in training. The columns that the model reads are required; others are not read. The
    predictions have the order of the rows. Their file appears when it is complete.

    With -c and no file, shards are predicted into a folder of Parquet files. If it was killed, the same command
    resumes.

    Columns: the id, or the number of the row. A multiclass task has its most probable class, and <task>.<class>
    with the probability of each class; with more than 1000 classes it has only <task>.probability, that of the
    most probable class. A binary task has its more probable word, and <task>.<positive> with the probability of
    the positive one; a task of 0 and 1 has only the probability. A regression task has its value. A dense task
    has the raw bytes of its pixels; their dtype and shape are in _predictions.json, or in the metadata of the
    Parquet file.
    """
    files, overrides = _files_and_overrides(given or [], config)

    def body() -> dict[str, Any]:
        if files:
            from pipelines.config.loading import load_track
            from pipelines.serving.new_rows import Wanted

            track = _track_of(config, overrides, ray_config) if config else load_track(uri, ray_config)
            wanted = Wanted(model, files, out, form or "", bad_rows, id_column, force=force, trust_code=trust_code)
            return _predict_rows(wanted, track, as_json=as_json)
        loaded = load_for_work(config, overrides, ray_config, local_ok=local_ok, out=out, trust_code=trust_code)
        return _predict_shards(loaded, model, out, split, trust_code=trust_code)

    _check_use(files, config, out)
    run("predict", body, reads=", ".join(files) or config, as_json=as_json, debug=debug)


def _track_of(config: str, overrides: Sequence[str], ray_config: str) -> TrackSection:
    """The section `track` of a configuration, which also allows the code that it names."""
    from pipelines.config.code import allow_named

    loaded = load(config, overrides, ray_config)
    allow_named(loaded.model_dump())
    return loaded.track


def _files_and_overrides(given: Sequence[str], config: str) -> tuple[list[str], list[str]]:
    """The arguments that name files, and those that override values of a configuration."""
    overrides = [one for one in given if config and OVERRIDE.match(one) and not Path(one).exists()]
    return [one for one in given if one not in overrides], overrides


def _check_use(files: Sequence[str], config: str, out: str) -> None:
    """Check the combination of arguments.

    Raises:
        typer.BadParameter: With what is missing.
    """
    if not files and not config:
        raise typer.BadParameter("give a file with new rows, or the configuration of shards with -c")
    if not files and out == "-":
        raise typer.BadParameter("give the folder for the predictions of shards with --out")


def _predict_rows(wanted: Wanted, track: TrackSection, *, as_json: bool) -> dict[str, Any]:
    from pipelines.serving.new_rows import predict_rows

    if wanted.out == "-" and as_json:
        raise UserError("stdout cannot hold both the predictions and the JSON object", where="--json, --out -",
                        remedy="name a file with -o", wrong_use=True)  # fmt: skip
    done = predict_rows(wanted, track, log)
    if wanted.out != "-":
        print_table(f"Predictions of {done.address}", _column_rows(done.tasks))
        show(f"{done.rows} rows, {done.skipped} left out: {wanted.out}")
    else:
        log(f"{done.rows} rows, {done.skipped} left out")
    return {"rows": done.rows, "skipped": done.skipped, "out": wanted.out, "model": done.address,
            "next": _next_step(wanted.model, track)}  # fmt: skip


def _predict_shards(loaded: Config, model: str, out: str, split: str, *, trust_code: bool) -> dict[str, Any]:
    from pipelines.serving.predict import predict as predict_shards

    done = predict_shards(loaded, model, out, split, log, trust_code=trust_code)
    print_table(f"Predictions of {model} on {split}", _column_rows(done.tasks))
    show(f"{done.rows} rows in {done.files} files ({done.kept} kept): {done.out}")
    return {"rows": done.rows, "files": done.files, "kept": done.kept, "out": str(done.out),
            "next": _next_step(model, loaded.track)}  # fmt: skip


def _column_rows(tasks: Mapping[str, Any]) -> list[dict[str, str]]:
    from dmtg_core.names import listed

    return [
        {"task": name, "group": entry["group"], "kind": entry["kind"], "unit": entry["unit"],
         "columns": listed(entry["columns"]), "content": _content(entry)}
        for name, entry in tasks.items()
    ]  # fmt: skip


def _content(entry: Mapping[str, Any]) -> str:
    """What the first column of a task holds."""
    labels = entry.get("labels", ())
    if entry["kind"] == "binary":
        return f"{labels[0]} or {labels[1]}" if len(labels) == 2 else "probability of 1"
    return {"multiclass": "class", "regression": "value"}.get(entry["kind"], "pixels")


def _next_step(model: str, track: TrackSection) -> Next:
    """The command after `predict`, which depends on the model's address."""
    name, _, alias = model.removeprefix("models:/").partition("@")
    name, _, version = name.partition("/")
    if not model.startswith("models:/"):
        return Next("list the registered models", models_command("list", track))
    if alias == "champion" or "." in name:
        return Next("show the model and its metrics", models_command("show", track, model))
    chosen = ["--version", version] if version else []
    return Next("make the model the champion", models_command("promote", track, name, *chosen))


def serve(
    model: PredictModel,
    host: Annotated[str, typer.Option(help="Address to listen at; other machines reach 0.0.0.0.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Processes that predict.")] = 1,
    per_group: Annotated[
        bool,
        typer.Option("--per-group", help="Each group has its own replicas; by default one predicts all tasks."),
    ] = False,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs of a replica.")] = 1.0,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of a replica; .5 for two on one GPU.")] = 0.0,
    max_batch: Annotated[int, typer.Option(min=1, help="Most requests that are predicted together.")] = 64,
    batch_wait_ms: Annotated[
        float, typer.Option(min=0, help="How long a batch waits for more requests, in milliseconds.")
    ] = 0.0,
    uri: TrackUri = "",
    ray_config: RayFile = "",
    trust_code: TrustCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP with Ray Serve, until the command is interrupted.

    POST /predict takes a list of rows, or the JSON objects of MLflow's scoring server, and returns a record for
    each row with the columns of dmtg predict. GET /healthz says which model is loaded. GET /docs and /openapi.json
    describe requests and answers. Requests that arrive at the same time are predicted together.
    """

    def body() -> dict[str, Any]:
        from pipelines.serving.server import serve_model

        values = {"model": model, "uri": uri, "ray_config": ray_config, "trust_code": trust_code,
                  "replicas": replicas, "per_group": per_group, "cpus": cpus, "gpus": gpus,
                  "max_batch": max_batch, "batch_wait_ms": batch_wait_ms}  # fmt: skip
        serve_model(values, host, port, log)
        return {"model": model}

    run("serve", body, reads=model, as_json=as_json, debug=debug)


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

        loaded = load_for_work(config, overrides, ray_config, local_ok=local_ok, trust_code=trust_code)
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
        show(f"note: {note}")
    show(f"verdict: {found['verdict']}{' (dry run)' if found.get('dry_run') else ''}. {headline(found)}")
    if found.get("report"):
        show(f"report:  {found['report']}")
    return found
