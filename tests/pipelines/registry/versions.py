"""Registered versions without the files of models."""

from __future__ import annotations

from pipelines.config.sections import TrackSection
from pipelines.registry.records import registered_models, tags_of
from pipelines.registry.tracking import connect

TWO, THREE = [["sick", "cost"], ["days"]], [["sick"], ["cost"], ["days"]]


def add_version(section: TrackSection, name: str, groups: list[list[str]]) -> int:
    """A version of a composite and of its group models as `register` creates them, without the files of models."""
    client = connect(section)
    served = {f"group_{i}": tasks for i, tasks in enumerate(groups)}
    held = {model.name for model in registered_models(client, name)}
    facts = dict.fromkeys(("composite", "grouping", "data_digest", "config_digest", "code_version", "run"), "x")
    facts |= {"composite": name, "split": "test", "metrics": {}, "baseline": {}, "headline": {}, "tasks": "many"}
    members: dict[str, int] = {}
    for model in (*(f"{name}.{group}" for group in served), name):
        if model not in held:
            client.create_registered_model(model)
        own = {"kind": "composite" if model == name else "group", "members": dict(members), "groups": served}
        made = client.create_model_version(model, "file:///nowhere", tags=tags_of(facts | own))
        members[model] = int(made.version)
    return members[name]


def aliases(section: TrackSection, name: str) -> dict[str, dict[str, int]]:
    """Alias → model → version, of a composite and its group models."""
    found: dict[str, dict[str, int]] = {}
    for model in registered_models(connect(section), name):
        for alias, version in model.aliases.items():
            found.setdefault(alias, {})[model.name.removeprefix(name)] = int(version)
    return found
