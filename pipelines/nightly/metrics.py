"""The metrics that a nightly run leaves for Prometheus: a job that has ended has no endpoint."""

from __future__ import annotations

import time
from http.client import HTTPException

from pipelines.config.loading import Config
from pipelines.errors import UserError, without_credentials
from pipelines.monitoring.exporter import Series, Values
from pipelines.monitoring.names import CHAMPION, FINISHED, KEPT, MODEL
from pipelines.monitoring.prometheus import leave
from pipelines.nightly.datasets import DATE
from pipelines.nightly.evaluation import PROMOTED, VERDICT
from pipelines.registry.changes import CHAMPION as ALIAS
from pipelines.registry.tracking import connect
from pipelines.registry.versions import find
from pipelines.storage import Location


def leave_metrics(config: Config, folder: Location) -> str:
    """Leave the metrics of a nightly run on the configured Pushgateway or in the configured file.

    Args:
        config: The configuration.
        folder: The folder of the nightly run.

    Returns:
        The reason of a failure; empty after success.
    """
    from mlflow.exceptions import MlflowException

    try:
        leave(nightly_values(config, folder), config.regroup.metrics, {MODEL: config.name})
    except (OSError, HTTPException, UserError, MlflowException) as error:
        return without_credentials(str(error)).partition("\n")[0][:200]
    return ""


def nightly_values(config: Config, folder: Location) -> Values:
    """The metrics of a nightly run.

    Args:
        config: The configuration.
        folder: The folder of the nightly run.
    """
    labels = (config.name,)
    champion, _ = find(connect(config.track), f"{config.name}@{ALIAS}")
    values: dict[Series, float] = {
        (FINISHED, labels): time.time(),
        (KEPT, labels): kept_in_a_row(folder),
        (CHAMPION, labels): champion.creation_timestamp / 1000,
    }
    return values


def kept_in_a_row(folder: Location) -> int:
    """The number of nightly runs up to this one that kept the champion, since the last that replaced it."""
    root, count = folder.parent, 0
    dates = sorted((name for name in root.folders() if DATE.fullmatch(name) and name <= folder.name), reverse=True)
    for date in dates:
        file = root / date / VERDICT
        if not file.exists():
            continue
        if file.read_json()["verdict"] == PROMOTED:
            break
        count += 1
    return count
