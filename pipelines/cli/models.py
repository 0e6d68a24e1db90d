"""`dmtg models …`: commands of the model registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from pipelines.cli.completion import complete_address, complete_name
from pipelines.cli.console import Next, log, print_table, run, show
from pipelines.cli.options import Debug, Json, PredictModel, RayFile, RunDir, TrackUri, TrustCode
from pipelines.errors import without_credentials
from pipelines.report.formatting import figure

if TYPE_CHECKING:
    from pipelines.config.sections import TrackSection

T = TypeVar("T")
Form = Literal["torch-export", "onnx", "merged"]

models_app = typer.Typer(
    name="models", no_args_is_help=True, help="List, compare, promote and register models in the model registry."
)

DEMO = Next("run the demo, which registers models", ("dmtg", "demo"))
Name = Annotated[str, typer.Argument(help="Registered name of a composite model.", autocompletion=complete_name)]
Address = Annotated[
    str,
    typer.Argument(
        help="name for the newest version, name/version or name@alias; the prefix models:/ is optional.",
        autocompletion=complete_address,
    ),
]


@models_app.command("list", epilog="Example: dmtg models list")
def models_list(uri: TrackUri = "", ray_config: RayFile = "", as_json: Json = False, debug: Debug = False) -> None:
    """List the newest version of every registered model, and all versions with an alias."""

    def body() -> dict[str, Any]:
        from dmtg_core.names import listed, unquoted
        from pipelines.registry.versions import list_models

        found = _query(uri, ray_config, list_models)
        columns = ("name", "version", "aliases", "tasks", "grouping", "created")
        shown = {"aliases": ", ".join, "tasks": lambda text: listed(unquoted(text))}
        rows = [{key: shown[key](m[key]) if key in shown else m[key] for key in columns} for m in found]
        print_table("Registered models", rows, right=("version",))
        whole = [model["uri"] for model in found if "." not in model["name"]]
        step = Next("show a model", _command("show", uri, ray_config, whole[0])) if whole else DEMO
        return {"models": [model["uri"] for model in found], "entries": found, "next": step}

    run("models list", body, as_json=as_json, debug=debug)


@models_app.command("show", epilog="Example: dmtg models show mydata@champion")
def models_show(
    address: Address, uri: TrackUri = "", ray_config: RayFile = "", as_json: Json = False, debug: Debug = False
) -> None:
    """Show a version: the group of each task, the metrics, the data and the run."""

    def body() -> dict[str, Any]:
        from pipelines.registry.versions import show_model

        found = _query(uri, ray_config, lambda section: show_model(section, address))
        tables = ("groups", "members", "metrics", "baseline", "headline", "tasks")
        rows = [{"": key, "value": _plain(value)} for key, value in found.items() if key not in tables]
        print_table(found["uri"], rows)
        print_table("Tasks and their groups", _task_rows(found))
        print_table(f"Metrics on {found['split']}", _metric_rows(found), right=("value", "naive MTL"))
        step = Next("make this version the champion", _command("promote", uri, ray_config, *_version(found)))
        if "champion" in found["aliases"]:
            step = _serve_command(_section(uri, ray_config), f"models:/{found['name']}@champion")
        elif "." in found["name"]:
            step = Next("list the registered models", _command("list", uri, ray_config))
        return found | {"next": step}

    run("models show", body, as_json=as_json, debug=debug)


@models_app.command("diff", epilog="Example: dmtg models diff mydata")
def models_diff(
    before: Annotated[
        str,
        typer.Argument(
            help="Address as in show; without a second address, the name of a model: "
            "its champion is compared with its challenger.",
            autocompletion=complete_address,
        ),
    ],
    after: Annotated[str, typer.Argument(help="Address to compare with.", autocompletion=complete_address)] = "",
    uri: TrackUri = "",
    ray_config: RayFile = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare two versions: groupings, moved tasks and metrics."""

    def body() -> dict[str, Any]:
        from pipelines.registry.versions import diff_models

        found = _query(uri, ray_config, lambda section: diff_models(section, before, after))
        first, second = found["before"]["uri"], found["after"]["uri"]
        rows = [
            {"task": task, first: _group(found["before"], task), second: _group(found["after"], task),
             "moved": "yes" if task in found["moved"] else ""}
            for task in (*found["tasks"], *found["only_before"], *found["only_after"])
        ]  # fmt: skip
        print_table("Groupings", rows)
        show(f"adjusted Rand index {found['adjusted_rand_index']:.3f} (1: equal groupings, 0: chance)")
        metrics = [
            {
                "task": row["task"],
                "metric": row["metric"],
                first: figure(row["before"]),
                second: figure(row["after"]),
            }
            for row in found["metrics"]
        ]
        print_table("Metrics", metrics, right=(first, second))
        for note in found["notes"]:
            show(f"note: {note}")
        step = Next(
            "make the second version the champion",
            _command("promote", uri, ray_config, *_version(found["after"])),
        )
        if "champion" in found["after"]["aliases"] or "." in found["after"]["name"]:
            step = Next("show the second version", _command("show", uri, ray_config, second))
        return found | {"next": step}

    run("models diff", body, as_json=as_json, debug=debug)


@models_app.command("promote", epilog="Example: dmtg models promote mydata --version 3")
def models_promote(
    name: Name,
    version: Annotated[int | None, typer.Option(help="Version to promote; the challenger by default.")] = None,
    uri: TrackUri = "",
    ray_config: RayFile = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a version and its group models the champion.

    If the command was killed, the same command completes the change.
    """

    def body() -> dict[str, Any]:
        from pipelines.registry.aliases import promote

        model = name.removeprefix("models:/")
        outcome = _print_champion(_query(uri, ray_config, lambda section: promote(section, model, version)))
        return outcome | {
            "next": Next("show the champion", _command("show", uri, ray_config, f"{model}@champion"))
        }

    run("models promote", body, as_json=as_json, debug=debug)


@models_app.command("rollback", epilog="Example: dmtg models rollback mydata")
def models_rollback(
    name: Name, uri: TrackUri = "", ray_config: RayFile = "", as_json: Json = False, debug: Debug = False
) -> None:
    """Make the previous champion the champion again.

    If the command was killed, the same command completes it and does not go back twice.
    """

    def body() -> dict[str, Any]:
        from pipelines.registry.aliases import rollback

        model = name.removeprefix("models:/")
        outcome = _query(uri, ray_config, lambda section: rollback(section, model, acknowledged=False))
        return _print_champion(outcome) | {
            "next": Next("show the champion", _command("show", uri, ray_config, f"{model}@champion")),
            "answered": lambda: _acknowledge(uri, ray_config, model),
        }

    run("models rollback", body, as_json=as_json, debug=debug)


def _acknowledge(uri: str, ray_config: str, name: str) -> None:
    from pipelines.errors import UserError
    from pipelines.registry.aliases import acknowledge

    try:
        _query(uri, ray_config, lambda section: acknowledge(section, name))
    except UserError as error:
        log(f"note: {error.what}; the next rollback gives this answer once more")


def _section(uri: str, ray_config: str) -> TrackSection:
    from pipelines.config.loading import load_track

    return load_track(uri, ray_config)


def _command(command: str, uri: str, ray_config: str, *more: str) -> tuple[str, ...]:
    """Another command with the same registry."""
    server = ["--uri", without_credentials(uri)] if uri else []
    ray = ["--ray-config", ray_config] if ray_config else []
    return "dmtg", "models", command, *more, *server, *ray


def _version(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return entry["name"], "--version", str(entry["version"])


def _serve_command(section: TrackSection, model: str) -> Next:
    """The MLflow command that serves a model. The server needs no Ray."""
    server = ("env", f"MLFLOW_TRACKING_URI={without_credentials(section.uri)}") if section.uri else ()
    return Next(
        "serve the model over HTTP",
        (*server, "mlflow", "models", "serve", "-m", model, "--env-manager", "local"),
    )


def _query(uri: str, ray_config: str, query: Callable[[TrackSection], T]) -> T:
    """Query the registry; an MLflow error becomes one `UserError`."""
    from pipelines.registry.errors import reached
    from pipelines.registry.tracking import tracking_uri

    section = _section(uri, ray_config)
    with reached(tracking_uri(section)):
        return query(section)


def _print_champion(outcome: dict[str, Any]) -> dict[str, Any]:
    uri = f"models:/{outcome['name']}/{outcome['version']}"
    before = "none" if outcome["before"] is None else f"version {outcome['before']}"
    print_table(f"{outcome['name']}@champion", [{"now": f"version {outcome['version']}", "before": before,
                "grouping": outcome["grouping"]}])  # fmt: skip
    return outcome | {"models": [uri]}


def _group(entry: Mapping[str, Any], task: str) -> str:
    return next((name for name, tasks in entry["groups"].items() if task in tasks), "–")


def _plain(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _task_rows(entry: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each task, with the model of its group. Only composites know the models of their groups."""
    models = {name.rpartition(".")[2]: f"models:/{name}/{v}" for name, v in entry["members"].items()}
    return [
        {"task": task, "group": group, "model": models.get(group, entry["uri"])}
        for group, tasks in entry["groups"].items()
        for task in tasks
    ]


def _metric_rows(entry: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {"task": task, "metric": f"{name} *" if name == entry["headline"].get(task) else name,
         "value": figure(value), "naive MTL": figure(entry["baseline"].get(task, {}).get(name))}
        for task, values in entry["metrics"].items()
        for name, value in values.items()
    ]  # fmt: skip


@models_app.command("register", epilog="Example: dmtg models register work/mydata/runs/mydata-0a1b2c3d")
def models_register(
    run_dir: RunDir,
    uri: Annotated[str, typer.Option("--uri", help="Tracking server; the server of the run by default.")] = "",
    trust_code: TrustCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Publish a finished run whose MLflow server was unreachable.

    Only missing metrics, models and artifacts are sent.
    """

    def body() -> dict[str, Any]:
        from pipelines.training.publish import register_run

        done = register_run(run_dir, uri, log, trust_code=trust_code)
        for model in done.models:
            show(f"model: {model.uri}")
        show(f"MLflow run {done.run_id} at {done.uri}")
        whole = [model.uri for model in done.models[:1]]
        step = Next("show the model", _command("show", uri, "", *whole)) if whole else DEMO
        return {"run_dir": str(done.run), "run_id": done.run_id, "models": [model.uri for model in done.models],
                "next": step}  # fmt: skip

    run("models register", body, reads=run_dir, as_json=as_json, debug=debug)


@models_app.command("export", epilog="Example: dmtg models export mydata@champion --to onnx --out exported")
def models_export(
    model: PredictModel,
    to: Annotated[Form, typer.Option("--to", help="torch-export, onnx, or merged for weights without adapters.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for the files; a new or an empty one.")],
    uri: TrackUri = "",
    ray_config: RayFile = "",
    trust_code: TrustCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model as a graph, or as plain weights.

    The input is stored input of any number of samples; it is normalised inside. The outputs are decoded
    predictions, one for each task. export.json describes them. The export is compared with the model, and refused
    if it differs.
    """

    def body() -> dict[str, Any]:
        from pipelines.serving.export import export

        done = export(model, to, out, _section(uri, ray_config), trust_code=trust_code)
        show(f"{', '.join(done.files)} in {done.out}")
        show(f"largest difference from the model: {done.difference:.1e} (relative)")
        step = Next("read the description", ("cat", str(done.out / "export.json")))
        return {"model": done.address, "out": str(done.out), "files": done.files, "to": to,
                "difference": done.difference, "next": step}  # fmt: skip

    run("models export", body, reads=model, as_json=as_json, debug=debug)
