"""A training whose length does not have to be known when it begins.

The learning rate is constant at first, and decreases only at the end (Zhai et al. 2022, section 3.5; Hägele et al.
2024). The constant part can therefore be extended, and networks that are compared after a few epochs go on without
a restart. It ends when validation does not improve any more, or when the budget leaves only the decay. All scores
are those of averaged weights, which vary less from epoch to epoch and are lower before the decay.

This replaces the schedule "cosine". The other schedules do not depend on the number of epochs, and apply as they
are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from dmtg_core.network.grouping_network import clone
from dmtg_core.training.context import TrainContext
from dmtg_core.training.data import Data
from dmtg_core.training.loop import NO_HOOKS, Hooks, advance
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState

DECAY = 0.125  # share of the decay in all epochs
PATIENCE = 0.2  # last epochs whose scores are compared with the best one, as a share of `TrainSettings.epochs`
LEAST_PATIENCE = 3
LEAST_EPOCHS = 0.5  # epochs before which validation has not turned, as a share of `TrainSettings.epochs`
LONGER = 1 / 3  # least patience of a long training, as a share of the epochs until the best one


def patience_of(settings: TrainSettings) -> int:
    """Return the number of last epochs whose validation scores are compared with the best one before."""
    return settings.patience or max(round(PATIENCE * settings.epochs), LEAST_PATIENCE)


def has_turned(scores: Sequence[float], settings: TrainSettings) -> bool:
    """Whether validation gets worse: none of the last epochs is as good as the best one before, within the noise.

    At a constant learning rate the score of a network that still learns varies from epoch to epoch, and a decay
    after more epochs is better. It has turned only if it is worse by more than it varies.

    The last epochs are those of `patience_of`. Without `settings.patience` they are at least a third of the epochs
    until the best one, because a network improves the slower, the longer it has learned; and it has not turned in
    the first half of `settings.epochs`, because the scores of a few long epochs vary most at first.

    Args:
        scores: Validation scores of all epochs.
        settings: Training settings.
    """
    if not scores:
        return False
    last, noise = patience_of(settings), score_noise(scores)
    if not settings.patience:
        if len(scores) < LEAST_EPOCHS * settings.epochs:
            return False
        last = max(last, round(LONGER * (scores.index(min(scores)) + 1)))
    before, late = scores[:-last], scores[-last:]
    return bool(before) and min(late) > min(before) + noise


def score_noise(scores: Sequence[float]) -> float:
    """Return the noise of the validation score: its mean absolute change between epochs of the second half."""
    late = scores[len(scores) // 2 :]
    changes = [abs(a - b) for a, b in pairwise(late) if math.isfinite(a - b)]
    return sum(changes) / len(changes) if changes else 0.0


def held(settings: TrainSettings, epochs: int) -> TrainSettings:
    """Return the settings for the constant part of at most `epochs` epochs.

    A gate is trained for `settings.search_epochs` epochs, as in a training of fixed length.
    """
    epochs = max(epochs, settings.search_epochs)
    return replace(
        settings, epochs=epochs, lr_hold=epochs, search_share=settings.search_epochs / epochs, patience=0
    )


def begin_average(state: TrainState, settings: TrainSettings) -> None:
    """Give a fresh state the average of its weights, unless `settings.average` is 0."""
    if settings.average and not state.step:
        state.average = clone(state.network)


def extend(
    state: TrainState,
    data: Data,
    settings: TrainSettings,
    context: TrainContext,
    *,
    until: int,
    hooks: Hooks = NO_HOOKS,
) -> None:
    """Train at the constant learning rate until epoch `until`. It can be called again with a later epoch."""
    begin_average(state, settings)
    advance(state, data, held(settings, until), context, until=until, hooks=hooks)


def complete(
    state: TrainState,
    data: Data,
    settings: TrainSettings,
    context: TrainContext,
    *,
    most: int,
    hooks: Hooks = NO_HOOKS,
) -> None:
    """Train to the end, and take the hard network of the best epoch.

    The decay begins when validation has turned, with the network of the best epoch; or when only the epochs of the
    decay are left.

    Args:
        state: A fresh state, one of `extend`, or one that was interrupted in this function.
        data, context, hooks: As for `advance`.
        settings: Training settings. `epochs` is the unit of the patience and of the gate's training.
        most: Largest number of epochs, including those before.

    Raises:
        NonFiniteLossError: If the loss is not finite.
    """
    begin_average(state, settings)
    if state.decay is None:
        constant = max(most - max(round(DECAY * most), 1), state.epoch)

        def turned(state: TrainState) -> bool:
            return has_turned([record["val_score"] for record in state.history], settings)

        stopping = replace(hooks, should_stop=turned)
        advance(state, data, held(settings, constant), context, until=constant, hooks=stopping)
        _begin_decay(state, settings, most, turned=turned(state))
    assert state.decay is not None
    first, last = state.decay
    searched = first / last if 0 < first < last else 1.0  # the gate is not trained any more
    settings = replace(settings, epochs=max(last, 1), lr_hold=first, search_share=searched, patience=0)
    advance(state, data, settings, context, until=last, hooks=hooks)
    state.take_best()


def _begin_decay(state: TrainState, settings: TrainSettings, most: int, *, turned: bool) -> None:
    """Prune the network to one head for each task, and plan the decay."""
    length = most - state.epoch
    if turned:
        scores = [record["val_score"] for record in state.history]
        best = scores.index(min(scores)) + 1
        length = min(length, max(round(best * DECAY / (1 - DECAY)), 1))
        state.restart_from_best(settings)
    state.keep(state.network.gate.survivors(2.0), settings)
    state.decay = (state.epoch, state.epoch + length)
