"""Which version serves: the aliases champion and challenger, and the champions there have been.

The alias `champion` of the composite is the truth, and it moves in one step; those of the group models follow. The
champions before are a list in a tag of the registered composite, written before the alias moves: what comes after
the version that the alias has is a promotion or a rollback that was not finished, and is not read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pipelines.config.sections import TrackSection
from pipelines.errors import UserError
from pipelines.registry.tracking import connect
from pipelines.registry.versions import (
    CHALLENGER,
    CHAMPION,
    entry,
    facts_of,
    find,
    registered,
    registered_models,
    versions,
)

HISTORY = "dmtg.champions"
KEEP = 500  # champions; a tag of a registered model holds 5000 characters


def champion(section: TrackSection, name: str) -> dict[str, Any] | None:
    """The version that serves, as `show_model` gives it; None where there is none yet."""
    client = connect(section)
    model = registered(client, name)
    if model is None or CHAMPION not in model.aliases:
        return None
    return entry(client.get_model_version(name, str(model.aliases[CHAMPION])), model.aliases)


def set_challenger(section: TrackSection, name: str, version: int) -> None:
    """Let the alias `challenger` of a composite and of its group models be that version and its members.

    Raises:
        UserError: When there is no such version, or it is not a composite.
    """
    client = connect(section)
    held = _composite(client, name, version)
    client.set_registered_model_alias(name, CHALLENGER, str(version))
    _follow(client, held, CHALLENGER)


def promote(section: TrackSection, name: str, version: int | None = None) -> dict[str, Any]:
    """Make a version of a composite the champion; one that was killed half-way is completed by the same words.

    Args:
        version: The challenger by default.

    Returns:
        `name`, `version`, the champion `before` (None where there was none), the `grouping` and its `groups`.

    Raises:
        UserError: When there is no such version, or it is not a composite.
    """
    client = connect(section)
    if version is None:
        version = int(find(client, f"{name}@{CHALLENGER}")[0].version)
    held = _composite(client, name, version)
    history = _history(client, name)
    if history[-1:] != [version]:
        history.append(version)
        _write(client, name, history)
        client.set_registered_model_alias(name, CHAMPION, str(version))
    _follow(client, held, CHAMPION)
    return _outcome(held, history[-2] if len(history) > 1 else None)


def rollback(section: TrackSection, name: str) -> dict[str, Any]:
    """Make the champion before the present one serve again.

    A rollback that was killed may or may not have moved the alias: look at `dmtg models list`, then promote the
    version that is to serve, which also completes what was left.

    Returns:
        As `promote`; `before` is the version that was rolled back.

    Raises:
        UserError: When there is no champion, or none before it that still exists.
    """
    client = connect(section)
    find(client, name)
    history = _history(client, name)
    if len(history) < 2:
        raise UserError(
            f"{name} has had no champion before this one" if history else f"{name} has no champion",
            where="MLflow registry",
            remedy=f"dmtg models promote {name} --version N makes another version champion",
        )
    held = _composite(client, name, history[-2])
    _write(
        client, name, history
    )  # without a rest that could be mistaken for the present, once the alias is elsewhere
    client.set_registered_model_alias(name, CHAMPION, str(held.version))
    _follow(client, held, CHAMPION)
    return _outcome(held, history[-1])


def champions(section: TrackSection, name: str) -> list[int]:
    """The versions that have served and were not rolled back, the present one last."""
    return _history(connect(section), name)


def _outcome(held: Any, before: int | None) -> dict[str, Any]:
    facts = facts_of(held, "grouping", "groups")
    return {"name": held.name, "version": int(held.version), "before": before} | facts


def _composite(client: Any, name: str, version: int) -> Any:
    held, _ = find(client, f"{name}/{version}")
    if facts_of(held, "kind")["kind"] != "composite":
        raise UserError(
            f"models:/{name}/{version} is not the composite of a grouping",
            where="MLflow registry",
            remedy=f"give the composite {name.partition('.')[0]}: the aliases of its group models follow it",
            wrong_use=True,
        )
    return held


def _history(client: Any, name: str) -> list[int]:
    """The list in the tag as far as it is true: it ends with what the alias has, and holds what exists."""
    model = registered(client, name)
    if model is None or CHAMPION not in model.aliases:
        return []
    present = int(model.aliases[CHAMPION])
    held = json.loads(model.tags.get(HISTORY, "[]"))
    if present in held:
        held = held[: len(held) - held[::-1].index(present)]
    else:
        held.append(present)
    existing = {int(version.version) for version in versions(client, name)}
    return _without_repeats([number for number in held if number in existing])


def _without_repeats(numbers: Sequence[int]) -> list[int]:
    return [number for i, number in enumerate(numbers) if i == 0 or numbers[i - 1] != number]


def _write(client: Any, name: str, history: Sequence[int]) -> None:
    client.set_registered_model_tag(name, HISTORY, json.dumps(history[-KEEP:]))


def _follow(client: Any, composite: Any, alias: str) -> None:
    """Let an alias of the group models be that of the members of a composite, and of no group that it has not."""
    members = facts_of(composite, "members")["members"]
    for name, version in members.items():
        client.set_registered_model_alias(name, alias, str(version))
    for model in registered_models(client, f"{composite.name}.group_"):
        if model.name not in members and alias in model.aliases:
            client.delete_registered_model_alias(model.name, alias)
