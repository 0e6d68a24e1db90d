"""The aliases champion and challenger: promotion and rollback; see `pipelines.registry.changes`."""

from __future__ import annotations

import logging
from typing import Any

from pipelines.config.sections import TrackSection
from pipelines.errors import UserError
from pipelines.registry import changes
from pipelines.registry.changes import CHALLENGER, CHAMPION, PROMOTE, ROLLBACK, Change
from pipelines.registry.records import facts_of, registered
from pipelines.registry.tracking import connect
from pipelines.registry.versions import entry, find

logger = logging.getLogger(__name__)


def champion(section: TrackSection, name: str) -> dict[str, Any] | None:
    """The champion as returned by `show_model`; None without one."""
    client = connect(section)
    model = changes.settled(client, registered(client, name))
    if model is None or CHAMPION not in model.aliases:
        return None
    return entry(client.get_model_version(name, str(model.aliases[CHAMPION])), model.aliases)


def set_challenger(section: TrackSection, name: str, version: int) -> None:
    """Set the alias `challenger` of a composite and its group models to a version and its members.

    Raises:
        UserError: When there is no such version, or it is not a composite.
    """
    client = connect(section)
    changes.finished(client, name)
    _composite(client, name, version)
    changes.make(client, name, Change("challenger", CHALLENGER, version))


def promote(section: TrackSection, name: str, version: int | None = None) -> dict[str, Any]:
    """Make a version of a composite the champion. The same call completes a promotion that was interrupted.

    Args:
        version: The challenger by default.

    Returns:
        `name`, `version`, the champion `before` (None where there was none), the `grouping` and its `groups`.

    Raises:
        UserError: When there is no such version, or it is not a composite.
    """
    client = connect(section, create=False)
    changes.finished(client, name)
    if version is None:
        version = int(find(client, f"{name}@{CHALLENGER}")[0].version)
    held = _composite(client, name, version)
    history = changes.champions(client, name)
    if history[-1:] != [version]:
        history.append(version)
    before = history[-2] if len(history) > 1 else None
    changes.make(client, name, Change(PROMOTE, CHAMPION, version, before, tuple(history)))
    return _outcome(held, before)


def rollback(section: TrackSection, name: str, *, acknowledged: bool = True) -> dict[str, Any]:
    """Make the previous champion the champion again. The same call completes a rollback that was interrupted.

    Args:
        acknowledged: False if `acknowledge` is called when the user has the answer; until then, the same call
            returns the same answer, so that a command that is killed and repeated does not go back twice.

    Returns:
        As `promote`; `before` is the version that was rolled back.

    Raises:
        UserError: When there is no champion, or no previous one that still exists.
    """
    client = connect(section, create=False)
    changes.finished(client, name)
    find(client, name)
    done = changes.unanswered(registered(client, name))
    if done is None:
        done = _roll_back(client, name)
    else:
        logger.info("note: %s was rolled back by an interrupted command; repeat it to go back further", name)
    outcome = _outcome(_composite(client, name, done.version), done.before)
    if acknowledged:
        changes.acknowledge(client, name)
    return outcome


def _roll_back(client: Any, name: str) -> Change:
    history = changes.champions(client, name)
    if len(history) < 2:
        raise UserError(
            f"{name} has had no champion before this one" if history else f"{name} has no champion",
            where="MLflow registry",
            remedy=f"dmtg models promote {name} --version N makes another version champion",
        )
    _composite(client, name, history[-2])
    made = Change(ROLLBACK, CHAMPION, history[-2], before=history[-1], history=tuple(history[:-1]))
    changes.make(client, name, made)
    return made


def acknowledge(section: TrackSection, name: str) -> None:
    """The user has the answer of a rollback: the next call rolls back again."""
    changes.acknowledge(connect(section), name)


def champions(section: TrackSection, name: str) -> list[int]:
    """The versions that were champion and were not rolled back, the current one last."""
    return changes.champions(connect(section), name)


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
