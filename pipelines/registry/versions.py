"""Versions of registered models: found by address, listed with their facts, and compared in pairs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from dmtg_core.addresses import Code
from dmtg_core.grouping import Grouping
from dmtg_core.names import by_number
from pipelines.config.sections import TrackSection
from pipelines.errors import UserError
from pipelines.registry import changes
from pipelines.registry.changes import CHALLENGER, CHAMPION
from pipelines.registry.records import (
    OBJECTS,
    PREFIX,
    TEXTS,
    facts_of,
    last,
    registered,
    registered_models,
    version_of,
    versions,
)
from pipelines.registry.tracking import connect, exists


def find(client: Any, address: str) -> tuple[Any, dict[str, str]]:
    """The version of an address, and the aliases of its model.

    A change of aliases that was interrupted is finished first. The aliases of a group model are those of its
    composite, so that a reader gets the versions of one composite during a change, too.

    Args:
        address: `name` for the newest version, `name/version` or `name@alias`, with or without `models:/`.

    Raises:
        UserError: When there is no such model, version or alias; it lists the closest matches.
    """
    path = address.removeprefix("models:/")
    name, _, alias = path.partition("@")
    name, _, number = name.partition("/")
    model = changes.settled(client, registered(client, name))
    if model is None:
        names = [held.name for held in registered_models(client)]
        raise _missing(f"no registered model {name!r}", name, names, "train a model first")
    aliases = changes.aliases_of(client, model)
    if alias:
        if alias not in aliases:
            raise _missing(
                f"{name} has no alias {alias!r}", alias, aliases, f"dmtg models promote {name} sets one"
            )
        number = aliases[alias]
    if not number:
        return _newest(client, name), aliases
    version = version_of(client, name, number)
    if version is None:
        numbers = sorted((str(held.version) for held in versions(client, name)), key=by_number)
        raise _missing(f"{name} has no version {number!r}", number, numbers, "train a model first")
    return version, aliases


def _newest(client: Any, name: str) -> Any:
    found = last(client, name)
    if not found:
        raise _missing(f"{name} has no versions", name, (), "train a model first")
    return found[0]


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
    if not exists(section):
        return []
    client = connect(section)
    models, found = registered_models(client, name), []
    changed = [changes.settle(client, model) for model in models]
    for model in registered_models(client, name) if any(changed) else models:
        held = {int(version.version): version for version in last(client, model.name)}
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
        "outcome": version.tags.get(PREFIX + "outcome", ""),
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
    version, aliases = find(connect(section, create=False), address)
    return entry(version, aliases)


def entry(version: Any, aliases: Mapping[str, str]) -> dict[str, Any]:
    """An MLflow model version as returned by `show_model`."""
    return _shown(version, aliases) | facts_of(version, *TEXTS, *OBJECTS) | _code(version)


def _code(version: Any) -> dict[str, list[str]]:
    """The code of other packages that a version needs, as lines; empty without any."""
    records = map(Code.of_stored, json.loads(version.tags.get(f"{PREFIX}code", "[]")))
    lines = [f"{code.kind} {code.address} of {code.package}" for code in records]
    return {"code": lines} if lines else {}


def diff_models(section: TrackSection, before: str, after: str = "") -> dict[str, Any]:
    """Compare two versions of a composite.

    Args:
        before: An address. If `after` is empty, the name of a composite, for its champion and challenger. If they
            are the same version, which a promotion leaves, it is compared with the champion before it.
        after: The other address.

    Returns:
        `before` and `after` as returned by `show_model`; `tasks` that both have; `only_before`, `only_after`;
        `adjusted_rand_index` of the groupings of the common tasks and the tasks that `moved`; `metrics`, a row for
        each common task and metric; `notes` on differences that limit the comparison.

    Raises:
        UserError: When there is no such version, one of them is not a composite, or they have no task in common.
    """
    pair = (before, after) if after else _compared(section, before.removeprefix("models:/"))
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


def _compared(section: TrackSection, name: str) -> tuple[str, str]:
    """The addresses of champion and challenger; after a promotion, of the champion before it and the champion.

    Raises:
        UserError: When they are the same version, and there was no champion before.
    """
    client = connect(section, create=False)
    aliases = find(client, name)[1]
    if CHAMPION not in aliases or aliases[CHAMPION] != aliases.get(CHALLENGER):
        return f"{name}@{CHAMPION}", f"{name}@{CHALLENGER}"
    history = changes.champions(client, name)
    if len(history) < 2:
        raise UserError(
            f"{name}/{aliases[CHAMPION]} is champion and challenger, and there was no champion before it",
            where="MLflow registry",
            remedy=f"give two addresses, such as {name}/1 {name}@{CHAMPION}",
        )
    return f"{name}/{history[-2]}", f"{name}/{history[-1]}"


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
