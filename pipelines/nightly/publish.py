"""Publishes a verdict: to its report, to MLflow, to the webhook, and as metrics.

`published.json` records what has been done.

Each step can be repeated. A step that failed, or was interrupted, is owed: the same command does it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipelines.config.loading import Config
from pipelines.nightly.evaluation import VERDICT
from pipelines.nightly.metrics import leave_metrics
from pipelines.nightly.page import write_page
from pipelines.nightly.webhook import send
from pipelines.registry.tracking import connect
from pipelines.storage import Location

REPORT, PUBLISHED = "regroup.html", "published.json"
SENT = "webhook.json"  # in nightly runs of earlier versions, after the webhook has accepted the verdict
PAGE, MLFLOW, WEBHOOK, METRICS = "report", "mlflow", "webhook", "metrics"


def publish(config: Config, folder: Location, log: Callable[[str], None]) -> None:
    """Do the steps that are owed. A step that fails does not stop the others."""
    verdict = (folder / VERDICT).read_json()
    steps: dict[str, Callable[[], str]] = {
        PAGE: lambda: _write_page(folder),
        MLFLOW: lambda: _track(config, folder, verdict),
        WEBHOOK: lambda: send(config.regroup.webhook, verdict),
        METRICS: lambda: leave_metrics(config, folder),
    }
    for name in owed(config, folder):
        problem = steps[name]()
        if problem:
            log(f"note: {name} did not accept the verdict: {problem}; the same command sends it again")
        else:
            (folder / PUBLISHED).write_json({**_done(folder), name: True})


def owed(config: Config, folder: Location) -> list[str]:
    """The steps that have not been done: report, mlflow, webhook, metrics."""
    wanted = {WEBHOOK: config.regroup.webhook, METRICS: config.regroup.metrics}
    steps = [PAGE, MLFLOW, *(name for name, place in wanted.items() if place)]
    return [name for name in steps if not _done(folder).get(name)]


def job_result(config: Config, folder: Location) -> dict[str, Any]:
    """The verdict of a finished nightly run, with the address of its report and the steps that are `owed`."""
    verdict: dict[str, Any] = (folder / VERDICT).read_json()
    return verdict | {"report": str(folder / REPORT), "owed": owed(config, folder)}


def _done(folder: Location) -> dict[str, bool]:
    file = folder / PUBLISHED
    found: dict[str, bool] = file.read_json() if file.exists() else {}
    return {WEBHOOK: (folder / SENT).exists()} | found


def _write_page(folder: Location) -> str:
    write_page(folder)
    return ""


def _track(config: Config, folder: Location, verdict: Mapping[str, Any]) -> str:
    """Copy the verdict to the MLflow run of the challenger; the reason of a failure."""
    try:
        client = connect(config.track)
        for name in (VERDICT, REPORT):
            client.log_text(verdict["run_id"], (folder / name).read_text(), name)
        client.set_tag(verdict["run_id"], "dmtg.verdict", verdict["verdict"])
        client.set_tag(verdict["run_id"], "dmtg.night", verdict["night"])
    except Exception as error:  # noqa: BLE001 - the verdict is written; a missing copy must not undo it
        return str(error).partition("\n")[0][:200]
    return ""
