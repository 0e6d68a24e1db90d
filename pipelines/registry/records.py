"""What MLflow records: the metrics of a run, the versions of registered models, and the facts of a version.

A metric is named `<family>/<stage or split>/<task>`, so that MLflow shows one section for each family and stage.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmtg_core.names import by_number, key_of, quoted
from pipelines.runs.tree_figures import tree_values
from pipelines.scratch import temporary_folder

PREFIX = "dmtg."
LONGEST_TAG = 5000  # characters; longer values are only in DETAILS
DETAILS = "details.json"  # artifact with all facts of a version
TEXTS = ("kind", "composite", "grouping", "data_digest", "config_digest", "code_version", "run", "split")
SCORE = "score"  # family of the validation score
PICTURE = "grouping.png"  # artifact of a run: the picture of its groups
OBJECTS = ("groups", "members", "metrics", "baseline", "headline")


def tags_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """The tags of a version, without values that are too long for one.

    Args:
        facts: Texts, and values that are written as JSON. Those that are too long are read from `DETAILS`.
    """
    texts = {key: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for key, v in facts.items()}
    return {PREFIX + key: text for key, text in texts.items() if len(text) <= LONGEST_TAG}


def epoch_metrics(record: Mapping[str, Any]) -> list[Any]:
    """The metrics of an epoch. The validation score is the last one: if MLflow has it, it has them all.

    Args:
        record: The record of the epoch; records of earlier versions lack some figures.
    """
    from mlflow.entities import Metric

    stage, gate = record["stage"], record.get("gate", {})
    values = {
        f"gain/{stage}/error": record.get("gain"), f"gate/{stage}/entropy": gate.get("entropy"),
        f"gate/{stage}/confidence": gate.get("confidence"), f"gate/{stage}/groups": record.get("groups"),
        f"throughput/{stage}/samples_per_second": record.get("samples_per_second"),
        f"throughput/{stage}/waiting_for_data": record.get("data_share"),
    }  # fmt: skip
    for task, found in record["val"].items():
        values |= {f"{name}/{stage}/{key_of(task)}": value for name, value in found.items()}
        values[f"train_loss/{stage}/{key_of(task)}"] = record["train_loss"][task]
    score = record["val_score"]
    defined = {key: value for key, value in values.items() if value is not None}
    defined[f"{SCORE}/{stage}"] = math.nan if score is None else score
    stamp = int(record["time"] * 1000)
    return [Metric(key, value, stamp, record["epoch"]) for key, value in defined.items()]


def final_metrics(result: Mapping[str, Any], held: Mapping[str, float]) -> list[Any]:
    """The metrics of a result that MLflow does not have, or has with another value.

    Args:
        result: As in `result.json`.
        held: The metrics that MLflow has.
    """
    from mlflow.entities import Metric

    split = result["split"]
    values = {
        f"{name}/{split}/{key_of(task)}": value
        for task, found in result.get("metrics", {}).items()
        for name, value in found.items()
    }
    values |= {f"gain/{split}/{form}": value for form, value in result.get("gains", {}).items()}
    values["normalized_gain"] = result.get("normalized_gain")
    values |= tree_values(result)
    stamp = int(time.time() * 1000)
    return [Metric(k, v, stamp, 0) for k, v in values.items() if v is not None and held.get(k) != v]


def digest_of(files: Mapping[str, str | bytes]) -> str:
    """SHA-256 of the names and the content of files."""
    found = hashlib.sha256()
    for name, content in sorted(files.items()):
        found.update(hashlib.sha256(name.encode()).digest())
        found.update(hashlib.sha256(content.encode() if isinstance(content, str) else content).digest())
    return found.hexdigest()


def run_description(text: str, run_id: str, files: Container[str]) -> str:
    """The text that MLflow shows for a run, with the picture of its groups if it is among the artifacts."""
    picture = f"\n\n![groups](get-artifact?path={PICTURE}&run_uuid={run_id})" if PICTURE in files else ""
    return f"{text[:LONGEST_TAG]}{picture}"


def model_card(facts: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """The text that MLflow shows for a version: the result, its tasks, its data and its limits.

    Args:
        facts: The facts of the version.
        notes: The notes of the run.
    """
    made = f"Configuration `{facts['config_digest']}`, DMTG {facts['code_version']}."
    head = [f"{outcome}\n" if (outcome := facts.get("outcome")) else "", f"Grouping {facts['grouping']}.", ""]
    origin = ["", f"Data: digest `{facts['data_digest']}`, metrics of its {facts['split']} split. {made}"]
    limits = ["", "Limits: the metrics hold for samples like those of this data set, from one run."]
    limits += [f"- {note}" for note in notes]
    parts = ([*head, *_task_table(facts), *origin, *limits], [*head, *_groups(facts), *origin])
    count = f"{len(facts['metrics'])} tasks in {len(facts['groups'])} group{'s' * (len(facts['groups']) > 1)}"
    short = [*head, f"{count}; the artifact `{DETAILS}` names them.", *origin]
    texts = ("\n".join(lines).strip() for lines in (*parts, short))
    return next((text for text in texts if len(text) <= LONGEST_TAG), "")


def _task_table(facts: Mapping[str, Any]) -> Iterator[str]:
    """The rows of a table: each task with its group, headline metric, and that of naive MTL."""
    yield "| task | group | metric | value | naive MTL |"
    yield "|---|---|---|---|---|"
    for group, tasks in sorted(facts["groups"].items(), key=lambda one: by_number(one[0])):
        for task in tasks:
            metric = facts["headline"][task]
            values = (facts["metrics"][task].get(metric), facts["baseline"].get(task, {}).get(metric))
            shown = " | ".join("–" if value is None else f"{value:.4g}" for value in values)
            yield f"| {quoted(task).replace('|', '&#124;')} | {group} | {metric} | {shown} |"


def _groups(facts: Mapping[str, Any]) -> list[str]:
    """The tasks of each group, in a line."""
    groups = facts["groups"]
    return [f"- {group}: {', '.join(map(quoted, groups[group]))}" for group in sorted(groups, key=by_number)]


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
