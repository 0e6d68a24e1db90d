"""MLflow runs of drivers that were killed: no other process would end them.

An MLflow run has the host, the process and its start in a tag. Any later command on the same machine ends the runs
whose process does not run any more. Those of other machines are left alone, because nothing is known about them.
The command that resumes a run resumes its MLflow run as well.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from pipelines.runs.processes import has_ended, this_process

PROCESS = "dmtg.process"
ENDED = ("FAILED", "KILLED")  # states of a run that can be resumed
logger = logging.getLogger(__name__)
searched: set[tuple[str, str]] = set()  # addresses and experiments of this process


def owner_tag() -> dict[str, str]:
    """The tag of the MLflow runs of this process."""
    return {PROCESS: json.dumps(this_process())}


def end_lost_runs(client: Any, uri: str, experiment: str) -> None:
    """End the runs of an experiment whose driver was killed on this machine. It is done once in a process."""
    if (uri, experiment) in searched:
        return
    searched.add((uri, experiment))
    held = client.get_experiment_by_name(experiment)
    if held is None:
        return
    for run in client.search_runs([held.experiment_id], "attributes.status = 'RUNNING'", max_results=1000):
        if _is_lost(run.data.tags.get(PROCESS, "")):
            client.set_terminated(run.info.run_id, status="KILLED")
            logger.info("the MLflow run %s was left by a process that was killed; it has ended", run.info.run_name)


def _is_lost(tag: str) -> bool:
    try:
        process = json.loads(tag)
    except ValueError:  # no tag, or not ours
        return False
    return isinstance(process, dict) and bool(process.get("started")) and has_ended(process)
