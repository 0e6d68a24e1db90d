"""Versions of registered models: found by address, listed with their facts, and compared in pairs."""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dmtg_core.grouping import Grouping
from dmtg_core.names import by_number
from pipelines.config.sections import TrackSection
from pipelines.errors import UserError
from pipelines.registry.tracking import connect

CHAMPION, CHALLENGER = "champion", "challenger"
PREFIX = "dmtg."
LONGEST_TAG = 5000  # characters; longer values are only in DETAILS
DETAILS = "details.json"  # artifact with all facts of a version
TEXTS = ("kind", "composite", "grouping", "data_digest", "config_digest", "code_version", "run", "split")
OBJECTS = ("groups", "members", "metrics", "baseline", "headline")


def tags_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """The tags of a version, without values that are too long for one.

    Args:
        facts: Texts, and values that are written as JSON. Those that are too long are read from `DETAILS`.
    """
    tags = {PREFIX + key: v if isinstance(v, str) else json.dumps(v) for key, v in facts.items()}
    return {key: value for key, value in tags.items() if len(value) <= LONGEST_TAG}


def facts_of(version: Any, *keys: str) -> dict[str, Any]:
    """Facts of an MLflow model version, of `TEXTS` and `OBJECTS`; unknown ones are empty.

    The artifact is read only for values that are too long for a tag. Only versions of DMTG have it.
    """
    tags = {key: version.tags.get(PREFIX + key) for key in keys}
    if None in tags.values() and PREFIX + "kind" in version.tags:
        details = _details(version)
        return {key: details[key] for key in keys}
    return {key: json.loads(text or "{}") if key in OBJECTS else text or "" for key, text in tags.items()}


def _details(version: Any) -> dict[str, Any]:
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        place = f"models:/{version.name}/{version.version}/artifacts/{DETAILS}"
        text = Path(mlflow.artifacts.download_artifacts(place, dst_path=folder)).read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def registered(client: Any, name: str) -> Any:
    """A registered model with its aliases and tags; None if it does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def registered_models(client: Any, name: str = "") -> list[Any]:
    """All registered models whose name starts with `name`, in order."""
    found, token = [], None
    while True:
        page = client.search_registered_models(page_token=token)
        found += [model for model in page if model.name.startswith(name)]
        token = page.token
        if not token:
            return sorted(found, key=lambda model: by_number(model.name))


def find(client: Any, address: str) -> tuple[Any, dict[str, str]]:
    """The version of an address, and the aliases of its model.

    Args:
        address: `name` for the newest version, `name/version` or `name@alias`, with or without `models:/`.

    Raises:
        UserError: When there is no such model, version or alias; it lists the closest matches.
    """
    path = address.removeprefix("models:/")
    name, _, alias = path.partition("@")
    name, _, number = name.partition("/")
    model = registered(client, name)
    if model is None:
        names = [held.name for held in registered_models(client)]
        raise _missing(f"no registered model {name!r}", name, names, "train a model first")
    aliases = {key: str(value) for key, value in model.aliases.items()}
    if alias:
        if alias not in aliases:
            raise _missing(
                f"{name} has no alias {alias!r}", alias, aliases, f"dmtg models promote {name} sets one"
            )
        number = aliases[alias]
    if not number:
        return newest(client, name), aliases
    version = _version(client, name, number)
    if version is None:
        numbers = sorted((str(held.version) for held in versions(client, name)), key=by_number)
        raise _missing(f"{name} has no version {number!r}", number, numbers, "train a model first")
    return version, aliases


def versions(client: Any, name: str, **search: Any) -> list[Any]:
    """The versions of a registered model.

    Args:
        search: As MLflow's `search_model_versions` takes it.
    """
    quote = '"' if "'" in name else "'"
    found: list[Any] = []
    while True:
        page = client.search_model_versions(f"name={quote}{name}{quote}", **search)
        found += page
        if not page.token or "max_results" in search:
            return found
        search["page_token"] = page.token


def newest(client: Any, name: str) -> Any:
    """The newest version of a registered model.

    Raises:
        UserError: When all of them have been deleted.
    """
    found = _last(client, name)
    if not found:
        raise _missing(f"{name} has no versions", name, (), "train a model first")
    return found[0]


def _last(client: Any, name: str) -> list[Any]:
    return versions(client, name, max_results=1, order_by=["version_number DESC"])


def _version(client: Any, name: str, number: str) -> Any:
    """A version; None if it does not exist."""
    from mlflow.exceptions import MlflowException

    if not number.isdecimal():
        return None
    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _missing(what: str, wanted: str, held: Iterable[str], otherwise: str) -> UserError:
    known = list(held)
    nearest = difflib.get_close_matches(wanted, known, n=5) or known[-10:]
    return UserError(
        what,
        where="MLflow registry",
        remedy=f"use one of {', '.join(nearest)}" if nearest else otherwise,
    )


def list_models(section: TrackSection, name: str = "") -> list[dict[str, Any]]:
    """The newest version and those with an alias of each registered model whose name starts with `name`."""
    client = connect(section)
    found = []
    for model in registered_models(client, name):
        held = {int(version.version): version for version in _last(client, model.name)}
        for number in {int(number) for number in model.aliases.values()} - set(held):
            held[number] = client.get_model_version(model.name, str(number))
        found += [_shown(held[number], model.aliases) for number in sorted(held, reverse=True)]
    return found


def _shown(version: Any, aliases: Mapping[str, str]) -> dict[str, Any]:
    tasks = version.tags.get(PREFIX + "tasks", "")
    return {
        "name": version.name,
        "version": int(version.version),
        "aliases": sorted((a for a, v in aliases.items() if str(v) == str(version.version)), key=by_number),
        "tasks": tasks,
        "grouping": version.tags.get(PREFIX + "grouping", ""),
        "created": datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).strftime(
            "%Y-%m-%d %H:%M:%S UTC"
        ),
        "run_id": version.run_id,
        "uri": f"models:/{version.name}/{version.version}",
    }


def show_model(section: TrackSection, address: str) -> dict[str, Any]:
    """One version: an entry of `list_models` with its groups, metrics and origin.

    Raises:
        UserError: When there is no such version.
    """
    version, aliases = find(connect(section), address)
    return entry(version, aliases)


def entry(version: Any, aliases: Mapping[str, str]) -> dict[str, Any]:
    """An MLflow model version as returned by `show_model`."""
    return _shown(version, aliases) | facts_of(version, *TEXTS, *OBJECTS)


def diff_models(section: TrackSection, before: str, after: str = "") -> dict[str, Any]:
    """Compare two versions of a composite.

    Args:
        before: An address. If `after` is empty, the name of a composite, for its champion and challenger.
        after: The other address.

    Returns:
        `before` and `after` as returned by `show_model`; `tasks` that both have; `only_before`, `only_after`;
        `adjusted_rand_index` of the groupings of the common tasks and the tasks that `moved`; `metrics`, a row for
        each common task and metric; `notes` on differences that limit the comparison.

    Raises:
        UserError: When there is no such version, one of them is not a composite, or they have no task in common.
    """
    name = before.removeprefix("models:/")
    pair = (before, after) if after else (f"{name}@{CHAMPION}", f"{name}@{CHALLENGER}")
    old, new = (show_model(section, address) for address in pair)
    for found in (old, new):
        if found["kind"] != "composite":
            raise UserError(
                f"{found['uri']} is not the composite of a grouping",
                where="MLflow registry",
                remedy=f"compare versions of {found['name'].partition('.')[0]}",
                wrong_use=True,
            )
    first, second = (Grouping.of(found["groups"].values()) for found in (old, new))
    tasks, others = first.tasks, second.tasks
    common = [task for task in tasks if task in others]
    if not common:
        raise UserError(
            f"{old['uri']} and {new['uri']} have no task in common",
            where=f"{', '.join(tasks)}; {', '.join(others)}",
            remedy="compare models of the same tasks",
            wrong_use=True,
        )
    first, second = first.among(common), second.among(common)
    return {
        "before": old,
        "after": new,
        "tasks": common,
        "only_before": [task for task in tasks if task not in others],
        "only_after": [task for task in others if task not in tasks],
        "adjusted_rand_index": first.adjusted_rand_index(second),
        "moved": first.moved(second),
        "metrics": _metric_rows(old, new, common),
        "notes": _notes(old, new, tasks, others),
    }


def _metric_rows(old: Mapping[str, Any], new: Mapping[str, Any], tasks: Iterable[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for task in tasks:
        first, second = old["metrics"].get(task, {}), new["metrics"].get(task, {})
        rows += [
            {"task": task, "metric": metric, "before": first.get(metric), "after": second.get(metric)}
            for metric in dict.fromkeys([*first, *second])
        ]
    return rows


def _notes(
    old: Mapping[str, Any], new: Mapping[str, Any], tasks: Iterable[str], others: Iterable[str]
) -> list[str]:
    notes = []
    if set(tasks) != set(others):
        notes.append("the two have different tasks; only those that both have are compared")
    if old["split"] != new["split"]:
        notes.append(f"metrics are of different splits: {old['split']} and {new['split']}")
    if old["data_digest"] != new["data_digest"]:
        notes.append("metrics are of different data: the manifests of the shards differ")
    return notes
