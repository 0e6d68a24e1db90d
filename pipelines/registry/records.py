"""What MLflow records of registered models: their versions, and the facts in the tags of a version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmtg_core.names import by_number, quoted
from pipelines.scratch import temporary_folder

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
    texts = {key: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for key, v in facts.items()}
    return {PREFIX + key: text for key, text in texts.items() if len(text) <= LONGEST_TAG}


def description_of(facts: Mapping[str, Any]) -> str:
    """The text that MLflow shows for a version: the result of the search, and the tasks or their number."""
    groups = facts["groups"]
    lines = [f"- {group}: {', '.join(map(quoted, groups[group]))}" for group in sorted(groups, key=by_number)]
    found = f"{outcome}\n\n" if (outcome := facts.get("outcome")) else ""
    head = f"{found}Grouping {facts['grouping']}, {facts['split']} metrics in the tag `{PREFIX}metrics`."
    text = "\n".join([head, "", *lines])
    if len(text) <= LONGEST_TAG:
        return text
    count = f"{sum(map(len, groups.values()))} tasks in {len(groups)} group{'s' * (len(groups) > 1)}"
    return f"{head} {count}; the artifact `{DETAILS}` names them."


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

    with temporary_folder() as folder:
        place = f"models:/{version.name}/{version.version}/artifacts/{DETAILS}"
        text = Path(mlflow.artifacts.download_artifacts(place, dst_path=str(folder))).read_text(encoding="utf-8")
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


def last(client: Any, name: str) -> list[Any]:
    """The newest version of a registered model, in a list; an empty list without versions."""
    return versions(client, name, max_results=1, order_by=["version_number DESC"])


def version_of(client: Any, name: str, number: str) -> Any:
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
