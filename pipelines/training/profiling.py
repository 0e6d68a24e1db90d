"""`dmtg train --profile`: the time of each part of a training step, measured on the workers of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dmtg_core.training.profile import OPERATORS, SHARES, TRACE
from pipelines.config.loading import Config
from pipelines.execution.choice import open_executor
from pipelines.runs.files import PROFILE
from pipelines.runs.identity import open_run
from pipelines.storage import Location
from pipelines.training.checks import prepare
from pipelines.training.worker import Job
from pipelines.training.workers import new_event_log, run_workers


@dataclass(frozen=True)
class Profiled:
    """Measurements as returned by `dmtg_core.training.profile.profile_steps`, and the folder of their files."""

    found: dict[str, Any]
    folder: Location

    @property
    def operators(self) -> Location:
        """The slowest operators, as text."""
        return self.folder / OPERATORS

    @property
    def trace(self) -> Location:
        """The trace, for Perfetto or chrome://tracing."""
        return self.folder / TRACE


def profile(config: Config, log: Callable[[str], None]) -> Profiled:
    """Train a new network for a few steps, as `train` would, without a change to the run.

    Raises:
        UserError: As `train`.
    """
    run = open_run(config)
    config.check_options()
    with open_executor(config.ray) as executor:
        data = prepare(config, executor, log)
        held, event_log = data.samples(executor), new_event_log(executor)
        job = Job(config, data.reader, held, run, event_log=event_log, profile=True, outputs=data.outputs)
        run_workers(job, executor, log)
    return Profiled((run / PROFILE / SHARES).read_json(), run / PROFILE)
