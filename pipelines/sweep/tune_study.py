"""Ray Tune's search with Optuna, for a sweep on a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from ray.tune.result import TRAINING_ITERATION
from ray.tune.search.optuna import OptunaSearch

from pipelines.sweep.plan import Outcome

SCORE = "val_score"


class TuneStudy:
    """A study of Optuna in Ray Tune's `OptunaSearch`; see `pipelines.sweep.tpe.AskTell`.

    Args:
        space: Distribution of every key.
        known: Parameters of the first proposals.
        sampler: Proposes the others.
    """

    def __init__(
        self, space: dict[str, BaseDistribution], known: Sequence[dict[str, Any]], sampler: BaseSampler
    ) -> None:
        self.search = OptunaSearch(space, SCORE, "min", points_to_evaluate=list(known), sampler=sampler)

    def ask(self, number: int) -> dict[str, Any]:
        """See `AskTell`."""
        return dict(self.search.suggest(str(number)) or {})

    def tell(self, number: int, outcome: Outcome) -> None:
        """See `AskTell`."""
        if outcome.score is None:
            self.search.on_trial_complete(str(number), error=True)
        elif outcome.epoch is None:
            self.search.on_trial_complete(str(number), {SCORE: outcome.score})
        else:  # Optuna ranks a setting that was stopped by its last result
            self.search.on_trial_result(str(number), {SCORE: outcome.score, TRAINING_ITERATION: outcome.epoch})
            self.search.on_trial_complete(str(number))
