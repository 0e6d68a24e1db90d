"""Asynchronous successive halving (ASHA, Li et al. 2020, algorithm 2) for the settings of a sweep.

The first seed of a setting that reaches a rung decides for all seeds: they are stopped together, or not at all.
The embedded executor uses `Halving`. On Ray the decisions are those of Ray Tune's scheduler, with the same rungs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.config.sweep_section import SweepSection
from pipelines.sweep.plan import Plan
from pipelines.sweep.trials import STOPPED, Trial

WORST = 1e9  # stands for a score that is not defined
Record = Mapping[str, Any]


def score(record: Record) -> float:
    """The validation score of an epoch; WORST if it is not defined."""
    found = record["val_score"]
    return WORST if found is None else float(found)


def grace_and_last(section: SweepSection, trials: Sequence[Trial]) -> tuple[int, int]:
    """The epoch of the first rung, and the last epoch of any trial."""
    last = max(trial.reports for trial in trials)
    return min(section.grace_epochs + max(trial.prelude for trial in trials), last), last


def is_never_stopped(trial: Trial, epoch: int) -> bool:
    """Whether a trial continues whatever its score: naive MTL, and a trial in its last epoch."""
    return trial.naive or epoch >= trial.reports


def write_stopped(trial: Trial, section: SweepSection, epoch: int, value: float) -> None:
    """Write the reason of a stop into the run folder of a trial."""
    why = f"not among the best 1/{section.reduction} of the settings at epoch {epoch}"
    (trial.run / STOPPED).write_json({"epoch": epoch, "val_score": value, "reason": why})


def stop_with_setting(trial: Trial, plan: Plan) -> None:
    """Write into the run folder of a trial that its setting was stopped, and why."""
    other = next(one for one in plan.seeds(trial.label) if (one.run / STOPPED).exists())
    if other.name != trial.name:
        held = (other.run / STOPPED).read_json()
        (trial.run / STOPPED).write_json({**held, "reason": f"with seed {other.seed}, {held['reason']}"})


def in_order_of_time(records: Mapping[str, Sequence[Record]]) -> Iterator[tuple[str, int, Record]]:
    """Name, epoch and record of the epochs of several trials, in their order in time."""
    ended = [(one["time"], name, i, one) for name, held in records.items() for i, one in enumerate(held, 1)]
    for _, name, epoch, record in sorted(ended, key=lambda entry: entry[:3]):
        yield name, epoch, record


class Rungs:
    """The rungs of ASHA: at each of them a setting continues if it is among the best `1 / reduction` so far.

    Args:
        grace: Epoch of the first rung.
        last: Last epoch of any trial.
        reduction: Ratio of the epochs of two neighbouring rungs, and of the settings that pass.
    """

    def __init__(self, grace: int, last: int, reduction: float) -> None:
        count = int(math.log(last / grace) / math.log(reduction) + 1)
        self.rungs: list[tuple[float, dict[str, float]]] = [
            (grace * reduction**k, {}) for k in reversed(range(count))
        ]
        self.quantile = 1 / reduction

    def passes(self, name: str, epoch: int, value: float) -> bool:
        """Whether a setting continues after an epoch, once for each rung. A lower value is better."""
        for at, values in self.rungs:
            if epoch < at:
                continue
            if name in values:
                return True
            limit = np.quantile(list(values.values()), self.quantile) if values else math.inf
            values[name] = value
            return value <= float(limit)
        return True


class Halving:
    """The decisions of a sweep.

    Args:
        section: Grace epochs and reduction factor.
        plan: The trials of the sweep.
        ended: Records of the epochs of trials that ended in an earlier session, by name.
    """

    def __init__(self, section: SweepSection, plan: Plan, ended: Mapping[str, Sequence[Record]]) -> None:
        self.section, self.plan = section, plan
        self.rungs = Rungs(*grace_and_last(section, plan.checked), section.reduction)
        self.stopped: set[str] = set()
        for name, epoch, record in in_order_of_time(ended):
            self._passes(plan.trials[name], epoch, score(record))

    def stops(self, name: str, epoch: int, record: Record) -> bool:
        """Whether a trial is stopped after an epoch. The reason is written into its run folder first."""
        trial = self.plan.trials[name]
        if trial.label in self.stopped:
            stop_with_setting(trial, self.plan)
            return True
        if self._passes(trial, epoch, score(record)) or self.plan.has_finished(trial):
            return False
        write_stopped(trial, self.section, epoch, score(record))
        self.stopped.add(trial.label)
        return True

    def _passes(self, trial: Trial, epoch: int, value: float) -> bool:
        return is_never_stopped(trial, epoch) or self.rungs.passes(trial.label, epoch, value)
