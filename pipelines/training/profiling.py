"""`dmtg train --profile`: the time of each part of a training step, measured on the workers of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dmtg_core.training.profile import OPERATORS, SHARES, TRACE
from pipelines.cluster import session
from pipelines.config.loading import Config
from pipelines.runs.files import PROFILE
from pipelines.storage import Location, locate
from pipelines.training.checks import prepare
from pipelines.training.ray.events import start_event_log
from pipelines.training.ray.trainer import run_workers
from pipelines.training.worker import Job


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
    run = locate(config.run.root) / config.run_name()
    run.check_writable()
    config.check_options()
    with session(config.ray):
        data = prepare(config, log)
        run_workers(Job(config, data.reader, data.samples(), run, event_log=start_event_log(), profile=True), log)
    return Profiled((run / PROFILE / SHARES).read_json(), run / PROFILE)
