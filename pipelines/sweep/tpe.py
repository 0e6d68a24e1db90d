"""Optuna's tree-structured Parzen estimator (TPE), which proposes the settings of a sweep.

Nothing of it is stored: a study is built again from the settings of a sweep and the results of their trials.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study, create_study
from optuna.trial import FrozenTrial, Trial, TrialState

from pipelines.config.value_ranges import Range
from pipelines.sweep.plan import Outcome
from pipelines.sweep.space import Space, Values
from pipelines.sweep.trials import Setting, label

RANDOM = 10  # largest number of settings that are drawn at random first, as in Optuna
REPEATED = 50  # proposals of settings that have been tried, before the search ends
Parameters = dict[str, Any]  # key → value of its distribution


class AskTell(Protocol):
    """A study: asked for parameters, told how they ended."""

    def ask(self, number: int) -> Parameters:
        """Parameters for the proposal with this number."""
        ...

    def tell(self, number: int, outcome: Outcome) -> None:
        """Report how the proposal ended."""
        ...


class SeededTPE(BaseSampler):
    """Optuna's TPE with random numbers that depend on the number of a proposal, not on the earlier draws.

    A session that resumes a sweep therefore proposes what an undisturbed one would have proposed.

    Args:
        startup: Settings that are drawn at random first.
    """

    def __init__(self, startup: int) -> None:
        self.startup = startup
        self.use(0, 0)

    def use(self, *key: int) -> None:
        """Draw the next proposal with the seed that follows from these numbers."""
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        self.inner = TPESampler(n_startup_trials=self.startup, seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """See `BaseSampler`."""
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See `BaseSampler`."""
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """See `BaseSampler`."""
        return self.inner.sample_independent(study, trial, param_name, param_distribution)


class OptunaStudy:
    """A study in the process of the sweep.

    Args:
        space: Distribution of every key.
        known: Parameters of the first proposals.
        sampler: Proposes the others.
    """

    def __init__(
        self, space: dict[str, BaseDistribution], known: Sequence[Parameters], sampler: BaseSampler
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.study = space, create_study(sampler=sampler)
        for parameters in known:
            self.study.enqueue_trial(parameters)
        self.trials: dict[int, Trial] = {}

    def ask(self, number: int) -> Parameters:
        """See `AskTell`."""
        self.trials[number] = self.study.ask(self.space)
        return self.trials[number].params

    def tell(self, number: int, outcome: Outcome) -> None:
        """See `AskTell`."""
        trial = self.trials[number]
        if outcome.score is None:
            self.study.tell(trial, state=TrialState.FAIL)
        elif outcome.epoch is None:
            self.study.tell(trial, outcome.score)
        else:
            trial.report(outcome.score, outcome.epoch)
            self.study.tell(trial, state=TrialState.PRUNED)


OpenStudy = Callable[[dict[str, BaseDistribution], Sequence[Parameters], BaseSampler], AskTell]


class TPESearch:
    """Proposes settings.

    Args:
        space: The space of the sweep.
        settings: The settings that it has so far, in the order of their proposals.
        most: Largest number of settings; None if it is not known.
        open_study: Opens the study.
    """

    def __init__(
        self, space: Space, settings: Sequence[Setting], most: int | None, open_study: OpenStudy = OptunaStudy
    ) -> None:
        self.space = space
        self.sampler = SeededTPE(RANDOM if most is None else min(RANDOM, math.ceil(most / 3)))
        distributions = {key: distribution(values) for key, values in space.values.items()}
        known = [{key: _parameter(space, key, value) for key, value in one.items()} for one in settings]
        self.study = open_study(distributions, known, self.sampler)
        self.numbers: dict[str, int] = {}  # label → number of the proposal
        self.asked = 0
        for setting in settings:
            self._ask()
            self.numbers[label(setting)] = self.asked - 1

    def propose(self) -> Setting | None:
        """A setting that has not been tried; None if the study repeats those that have been."""
        for attempt in range(REPEATED):
            self.sampler.use(len(self.numbers), attempt)
            setting = {key: _value(self.space, key, found) for key, found in self._ask().items()}
            setting = {key: setting[key] for key in self.space.values}
            if label(setting) not in self.numbers:
                self.numbers[label(setting)] = self.asked - 1
                return setting
            self.study.tell(self.asked - 1, Outcome(None))
        return None

    def tell(self, name: str, outcome: Outcome) -> None:
        """Report how the setting with this label ended."""
        self.study.tell(self.numbers[name], outcome)

    def _ask(self) -> Mapping[str, Any]:
        self.asked += 1
        return self.study.ask(self.asked - 1)


def distribution(values: Values) -> BaseDistribution:
    """The values of a key as a distribution of Optuna; those of a list are written as JSON."""
    if not isinstance(values, Range):
        return CategoricalDistribution([_json(value) for value in values])
    if values.whole:
        low, high, step = int(values.low), int(values.ends[1]), int(values.step or 1)
        return IntDistribution(low, high, log=values.log, step=step)
    return FloatDistribution(values.low, values.ends[1], log=values.log, step=values.step)


def _parameter(space: Space, key: str, value: Any) -> Any:
    return value if isinstance(space.values[key], Range) else _json(value)


def _value(space: Space, key: str, parameter: Any) -> Any:
    values = space.values[key]
    if isinstance(values, Range):
        return parameter
    return next(value for value in values if _json(value) == parameter)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
