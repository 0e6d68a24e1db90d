"""Changes of the aliases of a composite and of its group models, as one.

MLflow sets one alias at a time. A change is therefore written to a tag of the registered composite first (the
journal), then carried out, then removed from the tag. A command that finds a change in the tag finishes it before
it does anything else; a change to a version that has been deleted is undone.

The alias of the composite decides which version serves, and the composite holds the models of all groups. The
aliases of the group models are copies for other programs.

The history of champions is a list in another tag, written before the alias is set. Its entries after the version
of the alias are ignored.

A rollback that is repeated goes back further. A third tag therefore says that its answer has not been printed: the
same command then gives the answer of the rollback that was done. The tag is removed after the answer, or by a
promotion.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.registry.records import PREFIX, facts_of, registered, registered_models, version_of, versions

CHAMPION, CHALLENGER = "champion", "challenger"
PROMOTE, ROLLBACK = "promote", "rollback"
HISTORY, JOURNAL, UNANSWERED = "dmtg.champions", "dmtg.change", "dmtg.unanswered"
KEEP = 500  # champions; a tag of a registered model holds 5000 characters
GROUP = re.compile(r"(.+)\.group_\d+")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """A change of an alias.

    Args:
        command: promote, rollback or challenger.
        alias: Alias of the composite and its members.
        version: Its version of the composite after the change.
        before: The champion before the change; None if there was none.
        history: The history of champions after the change; empty if the alias is not `champion`.
        key: Tells this change from others to the same version.
    """

    command: str
    alias: str
    version: int
    before: int | None = None
    history: tuple[int, ...] = ()
    key: str = field(default_factory=lambda: uuid.uuid4().hex[:12])


def make(client: Any, name: str, change: Change) -> None:
    """Carry out a change. After an interruption at any point, the next command finishes it."""
    client.set_registered_model_tag(name, JOURNAL, json.dumps(asdict(change)))
    _finish(client, name, change)


def pending(model: Any) -> Change | None:
    """The change of a registered model that was not finished."""
    return _change_in(model, JOURNAL)


def unanswered(model: Any) -> Change | None:
    """The rollback to the champion of a registered model whose answer has not been printed."""
    change = _change_in(model, UNANSWERED)
    current = model.aliases.get(CHAMPION)
    return change if change is not None and str(change.version) == str(current) else None


def _change_in(model: Any, tag: str) -> Change | None:
    try:
        values = json.loads(model.tags[tag])
        return Change(**{**values, "history": tuple(values["history"])})
    except (KeyError, TypeError, ValueError):  # no such tag, or not of this version
        return None


def finished(client: Any, name: str) -> Change | None:
    """Finish the pending change of a composite, and return it; None without one."""
    model = registered(client, name)
    change = None if model is None else pending(model)
    if change is not None:
        logger.info(
            "note: finishing an interrupted change: %s of %s is version %s", change.alias, name, change.version
        )
        _finish(client, name, change)
    return change


def settle(client: Any, model: Any) -> bool:
    """Finish the pending change of a registered model before it is read; whether there was one.

    A reader without the permission to write reads on: the alias of the composite is one version at any time.
    """
    from mlflow.exceptions import MlflowException

    if pending(model) is None:
        return False
    try:
        finished(client, model.name)
    except MlflowException as error:
        logger.warning("the interrupted change of %s could not be finished: %s", model.name, error)
    return True


def settled(client: Any, model: Any) -> Any:
    """A registered model, or None, without a pending change of it or of its composite."""
    if model is None:
        return None
    owner = composite_of(client, model)
    changed = settle(client, model if owner is None else owner)
    return registered(client, model.name) if changed else model


def composite_of(client: Any, model: Any) -> Any:
    """The registered composite of a registered group model; None for other models."""
    match = GROUP.fullmatch(model.name)
    return registered(client, match[1]) if match else None


def aliases_of(client: Any, model: Any) -> dict[str, str]:
    """The aliases of a registered model; for a group model, champion and challenger are those of its composite."""
    aliases = {key: str(value) for key, value in model.aliases.items()}
    owner = composite_of(client, model)
    for alias in (CHAMPION, CHALLENGER) if owner is not None else ():
        if alias in owner.aliases:
            held = facts_of(client.get_model_version(owner.name, str(owner.aliases[alias])), "kind", "members")
            version = held["members"].get(model.name)
            if held["kind"] == "composite":
                aliases.pop(alias, None)
                aliases |= {} if version is None else {alias: str(version)}
    return aliases


def champions(client: Any, name: str) -> list[int]:
    """The versions that were champion and were not rolled back, the current one last; those that exist."""
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


def _finish(client: Any, name: str, change: Change) -> None:
    """Carry out the steps of a change that is in the journal. Each of them can be repeated."""
    target = version_of(client, name, str(change.version))
    if target is not None and _is_ours(client, name, change):
        if change.history:
            client.set_registered_model_tag(name, HISTORY, json.dumps(change.history[-KEEP:]))
        client.set_registered_model_alias(name, change.alias, str(change.version))
    if _is_ours(client, name, change):
        _set_members(client, name, change.alias)
        if change.command == ROLLBACK:
            client.set_registered_model_tag(name, UNANSWERED, json.dumps(asdict(change)))
        elif change.command == PROMOTE:
            acknowledge(client, name)
        client.delete_registered_model_tag(name, JOURNAL)


def acknowledge(client: Any, name: str) -> None:
    """Remove the tag of a rollback: its answer has been printed, or does not matter any more."""
    model = registered(client, name)
    if model is not None and UNANSWERED in model.tags:
        client.delete_registered_model_tag(name, UNANSWERED)


def _is_ours(client: Any, name: str, change: Change) -> bool:
    """Whether the journal still has this change: another command may have finished it meanwhile."""
    model = registered(client, name)
    return model is not None and pending(model) == change


def _set_members(client: Any, name: str, alias: str) -> None:
    """Set an alias of the group models to the members of the composite, and remove it from its other groups."""
    model = registered(client, name)
    number = model.aliases.get(alias)
    held = {} if number is None else facts_of(client.get_model_version(name, str(number)), "members")
    members = held.get("members", {})
    for member, version in members.items():
        if version_of(client, member, str(version)) is not None:  # somebody may have deleted it
            client.set_registered_model_alias(member, alias, str(version))
    for other in registered_models(client, f"{name}.group_"):
        if other.name not in members and alias in other.aliases and _is_group(client, name, other, alias):
            client.delete_registered_model_alias(other.name, alias)


def _is_group(client: Any, name: str, model: Any, alias: str) -> bool:
    """Whether an alias of a model is that of a group of the composite, and not of a model with a similar name."""
    match = GROUP.fullmatch(model.name)
    if match is None or match[1] != name:
        return False
    tags = client.get_model_version(model.name, str(model.aliases[alias])).tags
    return bool(tags.get(f"{PREFIX}kind") == "group" and tags.get(f"{PREFIX}composite") == name)
