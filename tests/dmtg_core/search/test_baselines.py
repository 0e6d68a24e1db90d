"""Baselines: hard networks with fixed groups, and the cost of their selectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dmtg_core import ArrayData, Grouping, LocalContext, TrainSettings, evaluate, training_flops
from dmtg_core.network.cost import naive_flops, wide_spec
from dmtg_core.search.baselines import hard_network, together, train_hard, train_naive_with_affinities
from dmtg_core.training.loop import score_of
from tests.dmtg_core import samples
from tests.dmtg_core.samples import SAMPLEWISE, assert_same_tensors, mlp_spec, snapshot

SPEC = mlp_spec(SAMPLEWISE[:4])
SETTINGS = TrainSettings(epochs=3, batch_size=16, learning_rate=1e-2)
CPU = LocalContext(device="cpu")
APART = Grouping.of([[task.name] for task in SPEC.tasks])


@pytest.fixture(scope="module")
def data() -> ArrayData:
    return samples.data(SPEC.input, SPEC.tasks, missing=0.2)


@pytest.mark.parametrize("grouping", [together(SPEC), APART, Grouping.from_assignment(
    [task.name for task in SPEC.tasks], [0, 1, 0, 1])])  # fmt: skip
def test_a_hard_network_keeps_its_groups_and_its_best_epoch(data: ArrayData, grouping: Grouping) -> None:
    records: list[float] = []
    found = train_hard(
        hard_network(SPEC, grouping), data, SETTINGS, context=CPU,
        on_epoch=lambda state: records.append(state.history[-1]["val_score"]),
    )  # fmt: skip
    assert found.network.grouping() == grouping
    assert len(found.network.pairs) == len(SPEC.tasks)
    assert len(records) == 3
    assert found.score == min(records) == pytest.approx(score_of(SPEC.tasks, found.metrics["val"]))
    for split, metrics in found.metrics.items():
        assert evaluate(found.network, data, split, context=CPU) == metrics


def test_costs_are_in_units_of_naive_mtl(data: ArrayData) -> None:
    unit = naive_flops(SPEC)
    naive = train_hard(hard_network(SPEC, together(SPEC)), data, SETTINGS, context=CPU, unit=unit)
    four = train_hard(hard_network(SPEC, APART), data, SETTINGS, context=CPU, unit=unit)
    wide = train_hard(hard_network(wide_spec(SPEC), together(SPEC)), data, SETTINGS, context=CPU, unit=unit)
    assert naive.cost == 1
    assert four.cost == pytest.approx(training_flops(hard_network(SPEC, APART)) / unit)
    assert 3 < four.cost <= 4
    assert 2 < wide.cost <= SPEC.groups


def test_measuring_affinities_does_not_change_naive_mtl(data: ArrayData) -> None:
    found, affinities, costs = train_naive_with_affinities(SPEC, data, SETTINGS, context=CPU)
    alone = train_hard(hard_network(SPEC, together(SPEC)), data, SETTINGS, context=CPU)
    assert_same_tensors(snapshot(found.network), snapshot(alone.network))
    assert found.metrics == alone.metrics
    assert affinities.keys() == costs.keys() == {"cs", "tag", "etap", "gradtag"}
    for name, affinity in affinities.items():
        assert affinity.shape == (4, 4)
        assert torch.isfinite(affinity).all()
        assert costs[name] > 0
    assert costs["tag"] > costs["cs"] == costs["etap"]


def test_two_networks_of_one_seed_have_the_same_initial_weights() -> None:
    first = hard_network(SPEC, together(SPEC))
    again = hard_network(replace(SPEC, groups=1), together(SPEC))
    other = hard_network(replace(SPEC, seed=SPEC.seed + 1), together(SPEC))
    assert_same_tensors(snapshot(first), snapshot(again))
    assert not torch.equal(next(iter(first.branches.parameters())), next(iter(other.branches.parameters())))
