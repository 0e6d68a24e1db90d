"""Proposals of Optuna's TPE: they are those of the library, and the same after a restart and on Ray Tune."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.samplers import TPESampler

from pipelines.config.value_ranges import parse_range
from pipelines.sweep.plan import Outcome
from pipelines.sweep.space import Space
from pipelines.sweep.tpe import OpenStudy, OptunaStudy, SeededTPE, TPESearch, distribution
from pipelines.sweep.trials import Setting, label

GROUPS, RATE, STEM, SAMPLING = "network.groups", "train.learning_rate", "network.stem", "gate.sampling"
SPACE = Space(
    {GROUPS: (2, 3, 4), RATE: parse_range("loguniform(1e-4, 1e-1)"), STEM: parse_range("randint(0, 5)"),
     SAMPLING: ("gumbel", "softmax")}
)  # fmt: skip
MOST = 24


def outcome(setting: Setting) -> Outcome:
    """A score that is lowest at three groups and a learning rate of 0.01; high ones are stopped or fail."""
    score = abs(np.log10(setting[RATE]) + 2) + abs(setting[GROUPS] - 3) + 0.1 * setting[STEM]
    if score > 2.5:
        return Outcome(None)
    return Outcome(float(score), 3 if score > 1.5 else None)


def proposals(
    count: int, settings: Sequence[Setting] = (), open_study: OpenStudy = OptunaStudy, space: Space = SPACE
) -> list[Setting]:
    """The settings of a search that resumes after some settings, each reported before the next one."""
    search, found = TPESearch(space, settings, MOST, open_study), list(settings)
    for setting in settings:
        search.tell(label(setting), outcome(setting))
    while len(found) < count:
        setting = search.propose()
        assert setting is not None
        found.append(setting)
        search.tell(label(setting), outcome(setting))
    return found


def test_a_search_that_resumes_proposes_what_it_would_have_proposed() -> None:
    whole = proposals(MOST)
    assert len({label(one) for one in whole}) == MOST
    for after in (1, 9, 17):
        assert proposals(MOST, whole[:after]) == whole


def test_the_search_on_ray_tune_proposes_the_same_settings() -> None:
    from pipelines.sweep.tune_study import TuneStudy

    whole = proposals(MOST)
    assert proposals(MOST, open_study=TuneStudy) == whole
    assert proposals(MOST, whole[:11], TuneStudy) == whole


def test_proposals_are_those_of_optuna() -> None:
    whole = proposals(MOST)
    startup = SeededTPE(8).inner
    assert isinstance(startup, TPESampler)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    distributions = {key: distribution(values) for key, values in SPACE.values.items()}
    for setting in whole[:-1]:
        found, coded = outcome(setting), {key: _coded(key, value) for key, value in setting.items()}
        state = optuna.trial.TrialState
        study.add_trial(
            optuna.create_trial(
                params=coded, distributions=distributions, value=found.score,
                intermediate_values={found.epoch: found.score} if found.epoch else {},
                state=state.FAIL if found.score is None else state.PRUNED if found.epoch else state.COMPLETE,
            )
        )  # fmt: skip
    seed = int(np.random.SeedSequence((MOST - 1, 0)).generate_state(1)[0])
    study.sampler = TPESampler(n_startup_trials=8, seed=seed)
    assert study.ask(distributions).params == {key: _coded(key, value) for key, value in whole[-1].items()}


def _coded(key: str, value: Any) -> Any:
    import json

    return json.dumps(value) if isinstance(SPACE.values[key], tuple) else value


def test_later_proposals_are_better_than_random_ones() -> None:
    def score(setting: Setting) -> float:
        return float(abs(np.log10(setting[RATE]) + 2) + abs(setting[GROUPS] - 3) + 0.1 * setting[STEM])

    whole = proposals(MOST)
    assert np.mean([score(one) for one in whole[-8:]]) < 0.7 * np.mean([score(one) for one in whole[:8]])


def test_settings_of_a_small_space_are_proposed_once() -> None:
    small = Space({GROUPS: (2, 3), RATE: (0.01, 0.1), STEM: (0,)})
    found = proposals(4, space=small)
    assert len({label(one) for one in found}) == 4
    search = TPESearch(small, found, MOST)
    assert search.propose() is None


@pytest.mark.parametrize("open_name", ["embedded", "Ray Tune"])
def test_running_settings_are_taken_into_account(open_name: str) -> None:
    from pipelines.sweep.tune_study import TuneStudy

    known = proposals(12)
    search = TPESearch(SPACE, known, MOST, OptunaStudy if open_name == "embedded" else TuneStudy)
    for setting in known[:10]:  # the others are running
        search.tell(label(setting), outcome(setting))
    first, second = search.propose(), search.propose()
    assert first is not None
    assert second is not None
    assert label(first) != label(second)
