"""The moving average of the weights, and the network of the search that has them."""

from dataclasses import replace

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from dmtg_core import EncoderSpec, GroupingNetwork, TrainSettings
from dmtg_core.network.grouping_network import clone
from dmtg_core.search.extendable import complete, extend
from dmtg_core.training.loop import evaluate, score_of
from dmtg_core.training.objective.averaging import averaging
from dmtg_core.training.state import TrainState
from tests.dmtg_core import samples
from tests.dmtg_core.samples import assert_same_tensors, mlp_spec, snapshot
from tests.dmtg_core.searches import local

SPEC = mlp_spec()
CONVNET = samples.image_spec()
SETTINGS = TrainSettings(epochs=4, search_share=0.5, batch_size=16, learning_rate=0.05, average=1.5)


@pytest.fixture(scope="module")
def data():
    return samples.data(SPEC.input, SPEC.tasks)


def change(network: GroupingNetwork, generator: torch.Generator) -> None:
    """Change weights and statistics as a training step does, by random numbers."""
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=generator))
            elif value.dtype != torch.bool:
                value.add_(1)


@pytest.mark.parametrize(("spec", "steps"), [(SPEC, 1), (SPEC, 7.5), (CONVNET, 30), (SPEC, 300)])
def test_it_is_the_average_of_pytorch_with_the_same_weights(spec, steps):
    network, generator = GroupingNetwork(spec), torch.Generator().manual_seed(0)
    average, count = clone(network), 0

    def expected(mean, value, _number):
        weight = max(1 / steps, 9 / (count + 9))
        return mean + (value - mean) * weight if mean.is_floating_point() else value

    theirs = AveragedModel(network, avg_fn=expected, use_buffers=True)
    theirs.update_parameters(network)  # the first call copies
    update = averaging(average, network, steps)
    for step in range(1, 60):
        change(network, generator)
        count = step
        update(step)
        theirs.update_parameters(network)
    found, others, last = average.state_dict(), theirs.module.state_dict(), network.state_dict()
    for name, value in found.items():
        if name == "gate.logits" or not value.is_floating_point():
            assert torch.equal(value, last[name]), name  # the present one
        else:
            torch.testing.assert_close(value, others[name], rtol=1e-5, atol=1e-5, msg=name)


def test_frozen_weights_are_shared_and_not_changed():
    spec = replace(SPEC, encoder=EncoderSpec("mlp", 1, {"widths": [8, 8]}, branch="last"))
    network = GroupingNetwork(spec)
    average, before = clone(network), snapshot(network.stem)
    averaging(average, network, 10)(1)
    assert average.stem is network.stem
    assert_same_tensors(snapshot(average.stem), before)


def test_the_averaged_network_is_validated_pruned_and_kept(data):
    state = TrainState.fresh(GroupingNetwork(SPEC), SETTINGS)
    extend(state, data, SETTINGS, local(), until=3)
    assert state.average is state.validated is not state.network
    assert torch.equal(state.average.gate.alive, state.network.gate.alive)
    assert len(state.average.pairs) == len(SPEC.tasks)
    found = score_of(SPEC.tasks, evaluate(state.average, data, "val"))
    assert state.history[-1]["val_score"] == pytest.approx(found)
    assert found != pytest.approx(score_of(SPEC.tasks, evaluate(state.network, data, "val")), rel=1e-3)
    complete(state, data, SETTINGS, local(), most=8)
    assert state.average is None
    assert score_of(SPEC.tasks, evaluate(state.network, data, "val")) == pytest.approx(state.best_score)


def test_without_an_average_the_network_itself_is_validated(data):
    settings = replace(SETTINGS, average=0)
    state = TrainState.fresh(GroupingNetwork(SPEC), settings)
    extend(state, data, settings, local(), until=2)
    assert state.average is None
    found = score_of(SPEC.tasks, evaluate(state.network, data, "val"))
    assert state.history[-1]["val_score"] == pytest.approx(found)


def test_an_average_varies_less_from_epoch_to_epoch():
    spec, scores = mlp_spec(seed=3), {}
    data = samples.data(spec.input, spec.tasks, rows=200)
    for average in (0.0, 1.0):
        settings = TrainSettings(epochs=30, search_share=0.1, batch_size=16, learning_rate=0.05, average=average)
        state = TrainState.fresh(GroupingNetwork(spec), settings)
        extend(state, data, settings, local(), until=30)
        late = torch.tensor([record["val_score"] for record in state.history[15:]])
        scores[average] = float(late.diff().abs().mean())
    assert scores[1.0] < 0.7 * scores[0.0]
