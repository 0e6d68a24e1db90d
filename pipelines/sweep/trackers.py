"""The MLflow trackers of the trials of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipelines.data.manifest import Manifest
from pipelines.errors import UserError
from pipelines.registry.tracking import NullTracker, Tracker, open_tracker
from pipelines.storage import Location
from pipelines.sweep.trials import Trial


class Trackers:
    """Trackers of the trials. The tracker of a trial is opened when the trial starts.

    Ray Tune pickles its callbacks before the first trial, and with them an object of this class. It must not hold
    an open tracker by then.

    Args:
        parent: MLflow run of the sweep.
        manifest: Manifest of the shards.
        log: Log callback.
    """

    def __init__(self, parent: str, manifest: Manifest, log: Callable[[str], None]) -> None:
        self.parent, self.manifest, self.log = parent, manifest, log
        self.by_name: dict[str, Tracker] = {}

    def open(self, trial: Trial) -> Tracker:
        """Open the tracker of a trial, unless it is open. The trial runs even if the server is unreachable."""
        if trial.name not in self.by_name:
            try:
                found = open_tracker(trial.config, trial.run, self.manifest, self.parent)
            except UserError as error:
                self.log(f"note: {trial.name} has no MLflow run yet: {error.what}")
                found = NullTracker()
            self.by_name[trial.name] = found
        return self.by_name[trial.name]

    def reopen(self, trial: Trial) -> Tracker:
        """The tracker of a trial, opened again if the server was unreachable when the trial started."""
        if trial.name in self.by_name and not self.by_name[trial.name].run_id:
            del self.by_name[trial.name]
        return self.open(trial)

    @contextmanager
    def failing(self, folder: Location, sweep: Tracker) -> Iterator[None]:
        """Mark the MLflow runs of trials and sweep as failed after an error. An interruption names the folder."""
        try:
            yield
        except BaseException as error:
            for one in (*self.by_name.values(), sweep):
                one.fail()
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(str(folder)) from error
            raise
