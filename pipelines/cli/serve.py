"""The commands that use registered models, and the nightly one that makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.console import KEPT, Next, log, number, print_table, run
from pipelines.cli.options import ConfigFile, Debug, Json, Model, RayFile, Words, load, models, predicting, same

if TYPE_CHECKING:
    from pipelines.config.loading import Config


def evaluate(
    model: Model,
    config: ConfigFile,
    words: Words = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    ray_config: RayFile = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Metrics of a registered model (or a finished run) on shards."""

    def body() -> dict[str, Any]:
        from pipelines.serving.evaluate import evaluate as measure

        loaded = load(config, words, ray_config)
        metrics = measure(loaded, model, split)
        rows = [
            {"task": task, "metric": name, "value": number(value)}
            for task, found in metrics.items()
            for name, value in found.items()
        ]
        print_table(f"{model} on {split}", rows, right=("value",))
        step = Next("its predictions", predicting(model, loaded, config, words, ray_config))
        return {"model": model, "split": split, "metrics": metrics, "next": step}

    run("evaluate", body, as_json=as_json, debug=debug)


def predict(
    model: Model,
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
    with the probability of each (of more than 1000 classes <task>.probability, that of the likeliest alone); for a
    regression task its value; for a dense task the raw bytes of its pixels, whose dtype and shape are in
    _predictions.json.
    """

    def body() -> dict[str, Any]:
        from dmtg_core.names import listed
        from pipelines.serving.predict import predict as work

        loaded = load(config, words, ray_config)
        done = work(loaded, model, out, split, log)
        rows = [
            {"task": name, "group": entry["group"], "kind": entry["kind"], "unit": entry["unit"],
             "columns": listed(entry["columns"])}
            for name, entry in done.tasks.items()
        ]  # fmt: skip
        print_table(f"Predictions of {model} on {split}", rows)
        log(f"{done.rows} rows in {done.files} files ({done.kept} kept): {done.out}")
        return {"rows": done.rows, "files": done.files, "kept": done.kept, "out": str(done.out),
                "next": _after(model, loaded)}  # fmt: skip

    run("predict", body, as_json=as_json, debug=debug)


def _after(model: str, config: Config) -> Next:
    """What follows on the predictions of a model."""
    name, _, alias = model.removeprefix("models:/").partition("@")
    name, _, version = name.partition("/")
    if not model.startswith("models:/"):
        return Next("the models that are registered", models("list", config.track))
    if alias == "champion" or "." in name:
        return Next("where it comes from, and its metrics", models("show", config.track, model))
    chosen = ["--version", version] if version else []
    return Next("make it the one that serves", models("promote", config.track, name, *chosen))


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
        from pipelines.nightly.driver import regroup as work

        loaded = load(config, words, ray_config)
        found = work(loaded, night, dry_run=dry_run, wait_s=wait, log=log)
        promoted = found["verdict"] == "promoted"
        if dry_run:
            again = ["--night", night] if night else []
            step = Next("in earnest", same(["regroup"], config, words, ray_config, *again))
        elif promoted:
            step = Next("what serves now", models("show", loaded.track, f"{loaded.name}@champion"))
        else:
            step = Next("what the challenger does otherwise", models("diff", loaded.track, loaded.name))
        return {"exit_code": 0 if promoted or kept_ok else KEPT, **_night(found), "next": step}

    run("regroup", body, as_json=as_json, debug=debug)


def _night(found: dict[str, Any]) -> dict[str, Any]:
    from pipelines.nightly.page import headline, task_rows

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
        log(f"note: {note}")
    log(f"verdict: {found['verdict']}{' (dry run)' if found.get('dry_run') else ''}. {headline(found)}")
    if found.get("report"):
        log(f"report:  {found['report']}")
    return found
