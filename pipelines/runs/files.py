"""The names of the files of a run folder, and files of one JSON object a line."""

from __future__ import annotations

import json
from typing import Any

from pipelines.storage import Location

CONFIG = "config.yaml"  # the configuration of the run, resolved
GROUPING = "grouping.json"
RESULT = "result.json"  # written last: a folder that has it is a finished run
SEARCHED = "searched.json"  # a result whose groups are still to be fine-tuned on their own
MODELS = "models"  # a folder a group
DETAILS = "details.json"  # what the report shows beside the result
METRICS = "metrics.jsonl"  # one record an epoch
GATE = "gate.jsonl"  # the gate's probabilities, one record an epoch
EVENTS = "events.jsonl"  # see `pipelines.runs.events`
CHECKPOINTS = "checkpoints"
REPORT = "report.html"
PROFILE = "profile"
TRACKING = "tracking.json"  # the MLflow run, and the data that it was trained on
REGISTERED = "models.json"  # the registered models of the run
LABELS = "labels.json"  # artifact of the MLflow run: statistics of the labels that a model was trained on


def read_jsonl(file: Location) -> list[dict[str, Any]]:
    """The objects of a file with one on every line; empty where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
