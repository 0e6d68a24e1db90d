"""Names of the files of a run folder, and readers of JSON Lines files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from pipelines.storage import Location

CONFIG = "config.yaml"  # the configuration of the run, resolved
GROUPING = "grouping.json"
RESULT = "result.json"  # written last: a run with this file is finished
SEARCHED = "searched.json"  # the result of the search, before the groups are trained on their own
MODELS = "models"  # a folder for each group
ESTIMATE = "estimate.json"  # the estimate before the start
DETAILS = "details.json"  # further content of the report
TREES = "trees.json"  # the figures of extra trees on the same table
METRICS = "metrics.jsonl"  # a record for each epoch
GATE = "gate.jsonl"  # the gate's probabilities, a record for each epoch
EVENTS = "events.jsonl"  # see `pipelines.runs.events`
CHECKPOINTS = "checkpoints"
REPORT = "report.html"
PROFILE = "profile"
IDENTITY = "identity.json"  # configuration, data and version that the folder belongs to
TRACKING = "tracking.json"  # the MLflow run and the digest of the data
REGISTERED = "models.json"  # the registered models of the run
LABELS = "labels.json"  # artifact of the MLflow run: statistics of the labels that a model was trained on


def read_jsonl(file: Location) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; none if the file does not exist."""
    return list(each_jsonl(file))


def each_jsonl(file: Location) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, one at a time: the file can be larger than the memory.

    Raises:
        UserError: When the storage fails.
    """
    if not file.exists():
        return
    try:
        with io.TextIOWrapper(file.filesystem.open_input_stream(file.path), encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    except OSError as error:
        raise file.unreachable(error) from error
