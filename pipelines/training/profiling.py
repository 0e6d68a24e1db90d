"""`dmtg train --profile`: the time of each part of a training step, measured on the workers of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dmtg_core.training.profile import OPERATORS, SHARES, TRACE
from pipelines.cluster import session
from pipelines.config.loading import Config
from pipelines.data.ingest import keeps_in_memory, load_splits
from pipelines.data.reader import Reader
from pipelines.data.shards import ensure_shards
from pipelines.runs.files import PROFILE
from pipelines.storage import Location, locate
from pipelines.training.driver import check_all
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
        manifest = ensure_shards(config, log)
        folder = locate(config.data.shards)
        reader = Reader(folder, manifest, check_all(config, manifest, folder))
        held = load_splits(reader) if keeps_in_memory(reader, config.data) else None
        run_workers(Job(config, reader, held, run, event_log=start_event_log(), profile=True), log)
    return Profiled((run / PROFILE / SHARES).read_json(), run / PROFILE)
