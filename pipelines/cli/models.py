"""`dmtg models …`: the model registry on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pipelines.cli.completion import complete_address, complete_name
from pipelines.cli.console import Next, log, number, print_table, run
from pipelines.cli.options import Debug, Json, RayFile, TrackUri

if TYPE_CHECKING:
    from pipelines.config.sections import TrackSection

T = TypeVar("T")

models_app = typer.Typer(
    name="models", no_args_is_help=True, help="Look into the model registry, and say which version serves."
)

TRY = Next("a run that registers some", ("dmtg", "demo"))
Name = Annotated[str, typer.Argument(help="Registered name of a composite.", autocompletion=complete_name)]
Address = Annotated[
    str,
    typer.Argument(
        help="name for the newest version, name/version or name@alias, models:/ before it or not.",
        autocompletion=complete_address,
    ),
]


@models_app.command("list")
def models_list(uri: TrackUri = "", ray_config: RayFile = "", as_json: Json = False, debug: Debug = False) -> None:
    """The newest version of every registered model, and all versions that have an alias."""

    def body() -> dict[str, Any]:
        from dmtg_core.names import listed
        from pipelines.registry.versions import list_models

        found = _ask(uri, ray_config, list_models)
        columns = ("name", "version", "aliases", "tasks", "grouping", "created")
        shown = {"aliases": ", ".join, "tasks": lambda text: listed(text.split(", "))}
        rows = [{key: shown[key](m[key]) if key in shown else m[key] for key in columns} for m in found]
        print_table("Registered models", rows, right=("version",))
        whole = [model["uri"] for model in found if "." not in model["name"]]
        step = Next("one of them", _same("show", uri, ray_config, whole[0])) if whole else TRY
        return {"models": [model["uri"] for model in found], "entries": found, "next": step}

    run("models list", body, as_json=as_json, debug=debug)


@models_app.command("show")
def models_show(
    address: Address, uri: TrackUri = "", ray_config: RayFile = "", as_json: Json = False, debug: Debug = False
) -> None:
    """One version: which group serves each task, how well, from which data and run."""

    def body() -> dict[str, Any]:
        from pipelines.registry.versions import show_model

        found = _ask(uri, ray_config, lambda section: show_model(section, address))
        tables = ("groups", "members", "metrics", "baseline", "headline", "tasks")
        rows = [{"": key, "value": _plain(value)} for key, value in found.items() if key not in tables]
        print_table(found["uri"], rows)
        print_table("Which group serves each task", _served(found))
        print_table(f"Metrics on {found['split']}", _figures(found), right=("value", "naive MTL"))
        step = Next("make it the one that serves", _same("promote", uri, ray_config, *_version(found)))
        if "champion" in found["aliases"]:
            step = _serve(_section(uri, ray_config), f"models:/{found['name']}@champion")
        elif "." in found["name"]:
            step = Next("the models that are registered", _same("list", uri, ray_config))
        return found | {"next": step}

    run("models show", body, as_json=as_json, debug=debug)


@models_app.command("diff")
def models_diff(
    before: Annotated[
        str,
        typer.Argument(
            help="An address as in show; alone, champion against challenger.", autocompletion=complete_address
        ),
    ],
    after: Annotated[
        str, typer.Argument(help="The address to compare with.", autocompletion=complete_address)
    ] = "",
    uri: TrackUri = "",
    ray_config: RayFile = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Two versions side by side: groupings, which tasks moved, metrics."""

    def body() -> dict[str, Any]:
        from pipelines.registry.versions import diff_models

        found = _ask(uri, ray_config, lambda section: diff_models(section, before, after))
        first, second = found["before"]["uri"], found["after"]["uri"]
        rows = [
            {"task": task, first: _group(found["before"], task), second: _group(found["after"], task),
             "moved": "yes" if task in found["moved"] else ""}
            for task in (*found["tasks"], *found["only_before"], *found["only_after"])
        ]  # fmt: skip
        print_table("Groupings", rows)
        log(f"adjusted Rand index {found['adjusted_rand_index']:.3f} (1: the same grouping, 0: as by chance)")
        metrics = [
            {
                "task": row["task"],
                "metric": row["metric"],
                first: number(row["before"]),
                second: number(row["after"]),
            }
            for row in found["metrics"]
        ]
        print_table("Metrics", metrics, right=(first, second))
        for note in found["notes"]:
            log(f"note: {note}")
        step = Next(
            "make the second the one that serves", _same("promote", uri, ray_config, *_version(found["after"]))
        )
        if "champion" in found["after"]["aliases"] or "." in found["after"]["name"]:
            step = Next("the second, and its metrics", _same("show", uri, ray_config, second))
        return found | {"next": step}

    run("models diff", body, as_json=as_json, debug=debug)


@models_app.command("promote")
def models_promote(
    name: Name,
    version: Annotated[int | None, typer.Option(help="The challenger by default.")] = None,
    uri: TrackUri = "",
    ray_config: RayFile = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a version the champion, and those of its groups. Killed, the same words complete it."""

    def body() -> dict[str, Any]:
        from pipelines.registry.aliases import promote

        known = name.removeprefix("models:/")
        outcome = _moved(_ask(uri, ray_config, lambda section: promote(section, known, version)))
        return outcome | {"next": Next("what serves now", _same("show", uri, ray_config, f"{known}@champion"))}

    run("models promote", body, as_json=as_json, debug=debug)


@models_app.command("rollback")
def models_rollback(
    name: Name, uri: TrackUri = "", ray_config: RayFile = "", as_json: Json = False, debug: Debug = False
) -> None:
    """Make the champion before this one serve again."""

    def body() -> dict[str, Any]:
        from pipelines.registry.aliases import rollback

        known = name.removeprefix("models:/")
        outcome = _moved(_ask(uri, ray_config, lambda section: rollback(section, known)))
        return outcome | {"next": Next("what serves now", _same("show", uri, ray_config, f"{known}@champion"))}

    run("models rollback", body, as_json=as_json, debug=debug)


def _section(uri: str, ray_config: str) -> TrackSection:
    from pipelines.config.loading import load_track

    return load_track(uri, ray_config)


def _same(command: str, uri: str, ray_config: str, *more: str) -> tuple[str, ...]:
    """Another command on the same registry."""
    from pipelines.registry.errors import without_credentials

    place = [
        *(["--uri", without_credentials(uri)] if uri else []),
        *(["--ray-config", ray_config] if ray_config else []),
    ]
    return "dmtg", "models", command, *more, *place


def _version(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return entry["name"], "--version", str(entry["version"])


def _serve(section: TrackSection, model: str) -> Next:
    """A server for a model, which needs no Ray and none of this package's commands."""
    from pipelines.registry.errors import without_credentials

    server = ("env", f"MLFLOW_TRACKING_URI={without_credentials(section.uri)}") if section.uri else ()
    return Next(
        "a server that answers with it",
        (*server, "mlflow", "models", "serve", "-m", model, "--env-manager", "local"),
    )


def _ask(uri: str, ray_config: str, question: Callable[[TrackSection], T]) -> T:
    """The answer of the registry that is meant, or one error where it has none."""
    from pipelines.registry.errors import reached
    from pipelines.registry.tracking import tracking_uri

    section = _section(uri, ray_config)
    with reached(tracking_uri(section)):
        return question(section)


def _moved(outcome: dict[str, Any]) -> dict[str, Any]:
    uri = f"models:/{outcome['name']}/{outcome['version']}"
    before = "none" if outcome["before"] is None else f"version {outcome['before']}"
    print_table(f"{outcome['name']}@champion", [{"now": f"version {outcome['version']}", "before": before,
                "grouping": outcome["grouping"]}])  # fmt: skip
    return outcome | {"models": [uri]}


def _group(entry: Mapping[str, Any], task: str) -> str:
    return next((name for name, tasks in entry["groups"].items() if task in tasks), "–")


def _plain(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _served(entry: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each task; the model of a group is known to the composite only."""
    models = {name.rpartition(".")[2]: f"models:/{name}/{v}" for name, v in entry["members"].items()}
    return [
        {"task": task, "group": group, "model": models.get(group, entry["uri"])}
        for group, tasks in entry["groups"].items()
        for task in tasks
    ]


def _figures(entry: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {"task": task, "metric": f"{name} *" if name == entry["headline"].get(task) else name,
         "value": number(value), "naive MTL": number(entry["baseline"].get(task, {}).get(name))}
        for task, values in entry["metrics"].items()
        for name, value in values.items()
    ]  # fmt: skip


@models_app.command("register")
def models_register(
    run_dir: Annotated[str, typer.Argument(help="Folder of a finished run.")],
    uri: Annotated[str, typer.Option("--uri", help="Server; that of the run by default.")] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Hand a finished run to MLflow where its server was away: the figures, models and artifacts that it lacks."""

    def body() -> dict[str, Any]:
        from pipelines.training.publish import register_run

        done = register_run(run_dir, uri, log)
        for model in done.models:
            log(f"model: {model.uri}")
        log(f"MLflow run {done.run_id} at {done.uri}")
        whole = [model.uri for model in done.models[:1]]
        step = Next("the model, and its metrics", _same("show", uri, "", *whole)) if whole else TRY
        return {"run_dir": str(done.run), "run_id": done.run_id, "models": [model.uri for model in done.models],
                "next": step}  # fmt: skip

    run("models register", body, as_json=as_json, debug=debug)
