"""A training whose length does not have to be known when it begins."""

import math
from dataclasses import replace

import pytest

from dmtg_core import GroupingNetwork, TrainSettings
from dmtg_core.search.baselines import hard_network, together, train_within
from dmtg_core.search.extendable import complete, extend, has_turned, held, patience_of
from dmtg_core.training.loop import advance, reporting
from dmtg_core.training.state import TrainState
from tests.dmtg_core import samples
from tests.dmtg_core.interrupted import Interrupted, interrupt_at, without_times
from tests.dmtg_core.samples import assert_same_tensors, mlp_spec, snapshot
from tests.dmtg_core.searches import local

SPEC = mlp_spec()
SETTINGS = TrainSettings(epochs=10, search_share=0.4, batch_size=16, learning_rate=0.01)


@pytest.fixture(scope="module")
def data():
    return samples.data(SPEC.input, SPEC.tasks, missing=0.2)


def state_of(spec=SPEC, settings=SETTINGS) -> TrainState:
    return TrainState.fresh(GroupingNetwork(spec), settings)


def rates(state: TrainState) -> list[float]:
    """Learning rates of the epochs as shares of the initial one."""
    return [record["learning_rate"] / SETTINGS.learning_rate for record in state.history]


def test_the_rate_is_constant_until_an_eighth_of_the_epochs_is_left(data):
    state = state_of(settings=replace(SETTINGS, patience=100))
    complete(state, data, replace(SETTINGS, patience=100), local(), most=32)
    # four epochs of a cosine from 1 to 0, of which neither end is an epoch: (1 + cos(π i / 5)) / 2
    decay = [(1 + math.cos(math.pi * i / 5)) / 2 for i in (1, 2, 3, 4)]
    assert rates(state) == pytest.approx([1.0] * 28 + decay)
    assert state.decay == (28, 32)


@pytest.mark.parametrize(("epochs", "hold", "expected"), [(6, 0, [1.0, 0.933013, 0.75, 0.5, 0.25, 0.066987]),
                                                          (4, 3, [1, 1, 1, 0.5])])  # fmt: skip
def test_a_hold_leaves_the_cosine_for_the_rest(data, epochs, hold, expected):
    settings = replace(SETTINGS, epochs=epochs, lr_hold=hold)
    state = state_of(settings=settings)
    advance(state, data, settings, local(), until=epochs)
    assert rates(state) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("parts", [(1,), (3,), (2, 3, 7)])
def test_a_training_in_parts_is_that_in_one_piece(data, parts):
    whole = state_of()
    complete(whole, data, SETTINGS, local(), most=12)
    state = state_of()
    for until in parts:
        extend(state, data, SETTINGS, local(), until=until)
        assert state.epoch == until
    complete(state, data, SETTINGS, local(), most=12)
    assert without_times(state.history) == without_times(whole.history)
    assert_same_tensors(snapshot(state.network), snapshot(whole.network))


def test_a_gate_is_trained_for_as_many_epochs_as_without_a_budget(data):
    assert [held(SETTINGS, n).search_epochs for n in (1, 4, 5, 7, 40, 333)] == [SETTINGS.search_epochs] * 6
    state = state_of(settings=replace(SETTINGS, patience=100))
    complete(state, data, replace(SETTINGS, patience=100), local(), most=20)
    assert [record["phase"] for record in state.history] == ["search"] * 4 + ["finetune"] * 16
    assert all(record["heads"] == len(SPEC.tasks) for record in state.history[4:])


def test_the_decay_begins_at_the_best_epoch_when_validation_does_not_improve(data):
    settings = replace(SETTINGS, learning_rate=0.5, patience=3)  # the rate is far too high
    state = state_of(settings=settings)
    complete(state, data, settings, local(), most=60)
    first, last = state.decay
    scores = [record["val_score"] for record in state.history]
    best = scores.index(min(scores[:first]))
    assert best + 1 + 3 <= first < 45
    assert [has_turned(scores[:n], settings) for n in range(1, first + 1)] == [False] * (first - 1) + [True]
    assert last - first == max(round((best + 1) / 7), 1)  # an eighth of the epochs without those of the patience
    assert state.epoch == last < 60
    rate = [record["learning_rate"] for record in state.history]
    assert rate[:first] == [0.5] * first
    assert all(value < 0.5 for value in rate[first:])


def test_the_result_is_the_hard_network_of_the_best_epoch(data):
    state = state_of()
    complete(state, data, SETTINGS, local(), most=3)  # shorter than the training of the gate
    assert len(state.network.pairs) == len(SPEC.tasks)
    assert state.best_score == min(record["val_score"] for record in state.history)


@pytest.mark.parametrize("epoch", [1, 5, 8, 9, 12])
def test_an_interrupted_training_has_the_same_result(data, tmp_path, epoch):
    def train(folder, stop=None):
        context = local(folder, on_record=interrupt_at(stop) if stop else None)
        latest = context.latest()
        state = TrainState.load(latest, SETTINGS, context.device) if latest else state_of()
        complete(state, data, SETTINGS, context, most=12, hooks=reporting(context))
        return state

    expected = train(None)
    with pytest.raises(Interrupted):
        train(tmp_path, epoch)
    found = train(tmp_path)
    assert without_times(found.history) == without_times(expected.history)
    assert found.decay == expected.decay
    assert_same_tensors(snapshot(found.network), snapshot(expected.network))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([], False),
        ([3.0, 2.0], False),  # no epoch before the last two
        ([1.0, 3.0, 3.5], True),
        ([1.0, 3.0, 1.5], False),  # worse by 0.5, the noise is 1.5
        ([3.0, 1.0, 1.25, 1.125], False),  # worse by 0.125, which is no more than the noise
        ([3.0, 1.0, 1.25, 1.5], False),
        ([3.0, 1.0, 1.3, 1.4], True),  # worse by 0.3, the noise is 0.1
        ([3.0, 1.0, 0.9, 5.0], False),
        ([2.0, 1.0, float("inf"), float("inf")], True),
    ],
)
def test_validation_has_turned_if_the_last_epochs_are_worse_by_more_than_the_noise(scores, expected):
    assert has_turned(scores, TrainSettings(epochs=1, patience=2)) is expected


@pytest.mark.parametrize(
    ("patience", "epochs", "expected"), [(3, 100, True), (0, 8, True), (0, 10, True), (0, 11, False)]
)
def test_the_first_half_does_not_end_a_training_unless_it_has_a_patience(patience, epochs, expected):
    scores = [2.0, 1.0, 3.0, 3.0, 3.0]
    assert has_turned(scores, TrainSettings(epochs=epochs, patience=patience)) is expected


@pytest.mark.parametrize(
    ("patience", "late", "expected"), [(3, 2, False), (3, 3, True), (0, 3, False), (0, 9, False), (0, 10, True)]
)
def test_the_patience_grows_with_the_epochs_until_the_best_one(patience, late, expected):
    scores = [40 - 0.1 * n for n in range(30)] + [90.0] * late  # the thirtieth is the best
    assert has_turned(scores, TrainSettings(epochs=10, patience=patience)) is expected


@pytest.mark.parametrize(("patience", "epochs", "expected"), [(7, 10, 7), (0, 100, 20), (0, 10, 3), (0, 1, 3)])
def test_the_patience_is_a_share_of_the_epochs_if_it_is_not_set(patience, epochs, expected):
    assert patience_of(TrainSettings(epochs=epochs, patience=patience)) == expected


@pytest.mark.parametrize("runs", [0.01, 1.0, 2.5])
def test_a_network_with_fixed_groups_is_trained_within_a_budget(data, runs):
    found = train_within(hard_network(SPEC, together(SPEC)), data, replace(SETTINGS, patience=100), runs)
    assert found.cost == pytest.approx(max(round(10 * runs), 1) / 10)
    assert set(found.metrics) == {"val", "test"}
