"""What trials cost, in runs of naive MTL with the configuration of the sweep."""

from __future__ import annotations

from collections.abc import Sequence

from dmtg_core.network.cost import naive_flops
from dmtg_core.search.budget import Budget
from dmtg_core.tasks import Task
from pipelines.config.loading import Config
from pipelines.data.manifest import Manifest
from pipelines.runs.files import METRICS, read_jsonl
from pipelines.sweep.trials import Trial


class Costs:
    """The costs of trials.

    A run of naive MTL has another cost if a setting changes the encoder or the number of epochs.

    Args:
        config: Configuration of the sweep.
        manifest: Manifest of the shards.
        tasks: Tasks of the data.
    """

    def __init__(self, config: Config, manifest: Manifest, tasks: Sequence[Task]) -> None:
        self.input, self.tasks = manifest.description.input, tasks
        self.runs: dict[str, float] = {}  # network → operations of an epoch of naive MTL
        self.most_of: dict[str, float] = {}  # label → the most training of a trial
        self.unit = self._run(config)

    def spent(self, trial: Trial) -> float:
        """The training of a trial so far."""
        records = read_jsonl(trial.run / METRICS)
        return float(records[-1]["spent"]) * self._run(trial.config) / self.unit if records else 0.0

    def most(self, trial: Trial) -> float:
        """The most training of a trial."""
        if trial.label not in self.most_of:
            budget = trial.budget
            if budget is None:
                spec, settings = trial.config.network_spec(self.input, self.tasks), trial.config.settings()
                budget = trial.reports * Budget(spec, settings, 1.0).epoch_of(spec)
            self.most_of[trial.label] = budget * self._run(trial.config) / self.unit
        return self.most_of[trial.label]

    def _run(self, config: Config) -> float:
        """Operations of a run of naive MTL for each sample."""
        spec = config.network_spec(self.input, self.tasks)
        key = repr(spec.encoder)
        if key not in self.runs:
            self.runs[key] = naive_flops(spec)
        return self.runs[key] * config.settings().epochs
