"""The aliases champion and challenger, and the history of champions.

The alias `champion` of the composite decides which version serves. It is set in one step; the aliases of the group
models are set after it. The history is a list in a tag of the registered composite and is written before the alias
is set. Entries after the version of the alias come from a promotion or a rollback that was interrupted; they are
ignored.
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
    """The champion as returned by `show_model`; None without one."""
    client = connect(section)
    model = registered(client, name)
    if model is None or CHAMPION not in model.aliases:
        return None
    return entry(client.get_model_version(name, str(model.aliases[CHAMPION])), model.aliases)


def set_challenger(section: TrackSection, name: str, version: int) -> None:
    """Set the alias `challenger` of a composite and its group models to a version and its members.

    Raises:
        UserError: When there is no such version, or it is not a composite.
    """
    client = connect(section)
    held = _composite(client, name, version)
    client.set_registered_model_alias(name, CHALLENGER, str(version))
    _set_member_aliases(client, held, CHALLENGER)


def promote(section: TrackSection, name: str, version: int | None = None) -> dict[str, Any]:
    """Make a version of a composite the champion. The same call completes a promotion that was interrupted.

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
    _set_member_aliases(client, held, CHAMPION)
    return _outcome(held, history[-2] if len(history) > 1 else None)


def rollback(section: TrackSection, name: str) -> dict[str, Any]:
    """Make the previous champion the champion again.

    A rollback that was interrupted may or may not have set the alias. `dmtg models list` shows it; promoting the
    right version completes the rest.

    Returns:
        As `promote`; `before` is the version that was rolled back.

    Raises:
        UserError: When there is no champion, or no previous one that still exists.
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
    _write(client, name, history)  # removes ignored entries, which could match the new version of the alias
    client.set_registered_model_alias(name, CHAMPION, str(held.version))
    _set_member_aliases(client, held, CHAMPION)
    return _outcome(held, history[-1])


def champions(section: TrackSection, name: str) -> list[int]:
    """The versions that were champion and were not rolled back, the current one last."""
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
    """The valid part of the list in the tag: up to the version of the alias, and only existing versions."""
    model = registered(client, name)
    if model is None or CHAMPION not in model.aliases:
        return []
    current = int(model.aliases[CHAMPION])
    held = json.loads(model.tags.get(HISTORY, "[]"))
    if current in held:
        held = held[: len(held) - held[::-1].index(current)]
    else:
        held.append(current)
    existing = {int(version.version) for version in versions(client, name)}
    return _without_repeats([number for number in held if number in existing])


def _without_repeats(numbers: Sequence[int]) -> list[int]:
    return [number for i, number in enumerate(numbers) if i == 0 or numbers[i - 1] != number]


def _write(client: Any, name: str, history: Sequence[int]) -> None:
    client.set_registered_model_tag(name, HISTORY, json.dumps(history[-KEEP:]))


def _set_member_aliases(client: Any, composite: Any, alias: str) -> None:
    """Set an alias of the group models to the members of a composite, and remove it from all other groups."""
    members = facts_of(composite, "members")["members"]
    for name, version in members.items():
        client.set_registered_model_alias(name, alias, str(version))
    for model in registered_models(client, f"{composite.name}.group_"):
        if model.name not in members and alias in model.aliases:
            client.delete_registered_model_alias(model.name, alias)
