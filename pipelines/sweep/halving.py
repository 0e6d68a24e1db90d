"""Asynchronous successive halving (ASHA, Li et al. 2020, algorithm 2) for the trials of a sweep.

The embedded executor uses `Halving`. On Ray the decisions are those of Ray Tune's scheduler, with the same rungs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.config.sections import SweepSection
from pipelines.sweep.trials import STOPPED, Trial

WORST = 1e9  # stands for a score that is not defined
Record = Mapping[str, Any]


def score(record: Record) -> float:
    """The validation score of an epoch; WORST if it is not defined."""
    found = record["val_score"]
    return WORST if found is None else float(found)


def grace_and_last(section: SweepSection, trials: Mapping[str, Trial]) -> tuple[int, int]:
    """The epoch of the first rung, and the last epoch of any trial."""
    last = max(trial.reports for trial in trials.values())
    return min(section.grace_epochs + max(trial.prelude for trial in trials.values()), last), last


def is_never_stopped(trial: Trial, epoch: int) -> bool:
    """Whether a trial continues whatever its score: naive MTL, and a trial in its last epoch."""
    return trial.naive or epoch >= trial.reports


def write_stopped(trial: Trial, section: SweepSection, epoch: int, value: float) -> None:
    """Write the reason of a stop into the run folder of a trial."""
    why = f"not among the best 1/{section.reduction} of the trials at epoch {epoch}"
    (trial.run / STOPPED).write_json({"epoch": epoch, "val_score": value, "reason": why})


def in_order_of_time(records: Mapping[str, Sequence[Record]]) -> Iterator[tuple[str, int, Record]]:
    """Name, epoch and record of the epochs of several trials, in their order in time."""
    ended = [(one["time"], name, i, one) for name, held in records.items() for i, one in enumerate(held, 1)]
    for _, name, epoch, record in sorted(ended, key=lambda entry: entry[:3]):
        yield name, epoch, record


class Rungs:
    """The rungs of ASHA: at each of them a trial continues if it is among the best `1 / reduction` so far.

    Args:
        grace: Epoch of the first rung.
        last: Last epoch of any trial.
        reduction: Ratio of the epochs of two neighbouring rungs, and of the trials that pass.
    """

    def __init__(self, grace: int, last: int, reduction: float) -> None:
        count = int(math.log(last / grace) / math.log(reduction) + 1)
        self.rungs: list[tuple[float, dict[str, float]]] = [
            (grace * reduction**k, {}) for k in reversed(range(count))
        ]
        self.quantile = 1 / reduction

    def passes(self, name: str, epoch: int, value: float) -> bool:
        """Whether a trial continues after an epoch. A lower value is better."""
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
        trials: All trials of the sweep by name.
        ended: Records of the epochs of trials that ended in an earlier session, by name.
    """

    def __init__(
        self, section: SweepSection, trials: Mapping[str, Trial], ended: Mapping[str, Sequence[Record]]
    ) -> None:
        self.section, self.trials = section, trials
        self.rungs = Rungs(*grace_and_last(section, trials), section.reduction)
        for name, epoch, record in in_order_of_time(ended):
            self._passes(name, epoch, score(record))

    def stops(self, name: str, epoch: int, record: Record) -> bool:
        """Whether a trial is stopped after an epoch. The reason is written into its run folder first."""
        if self._passes(name, epoch, score(record)):
            return False
        write_stopped(self.trials[name], self.section, epoch, score(record))
        return True

    def _passes(self, name: str, epoch: int, value: float) -> bool:
        return is_never_stopped(self.trials[name], epoch) or self.rungs.passes(name, epoch, value)
