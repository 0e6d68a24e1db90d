"""Distillation: mixed targets, and the gain of distilling several networks."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dmtg_core import EncoderSpec, GroupingNetwork, LocalContext, NetworkSpec, Task, TrainSettings, evaluate
from dmtg_core.network.cost import wide_spec
from dmtg_core.search.baselines import (
    hard_network,
    together,
    train_distilled,
    train_hard,
    train_within,
)
from dmtg_core.search.distillation import (
    OVERFIT,
    WEIGHT,
    Teachers,
    distil,
    distillation_state,
    mixed_target,
    teacher_share,
)
from dmtg_core.training import loop as training
from dmtg_core.training.loop import generalisation_gap, score_of
from dmtg_core.training.losses import PairLosses, label_counts, sample_loss, valid
from tests.dmtg_core import samples
from tests.dmtg_core.planted import planted_data
from tests.dmtg_core.samples import assert_same_tensors

FLAG, COLOUR = Task("flag", "binary"), Task("colour", "multiclass", channels=3)
PLACE, REGIONS = Task("place", "regression", channels=2), Task("regions", "dense_classification", channels=3)


def test_a_binary_label_is_mixed_with_the_mean_of_the_teachers_and_a_missing_one_replaced():
    outputs = [torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 2.0, 3.0])]
    mean = (outputs[0].sigmoid() + outputs[1].sigmoid()) / 2
    found = mixed_target(FLAG, torch.tensor([1.0, 0.0, torch.nan]), outputs)
    expected = [(1 - WEIGHT) + WEIGHT * mean[0], WEIGHT * mean[1], mean[2]]
    assert torch.allclose(found, torch.stack(expected))


def test_values_are_mixed_in_network_units():
    target = torch.tensor([[1.0, torch.nan], [3.0, 4.0]])
    found = mixed_target(PLACE, target, [torch.full((2, 2), 2.0), torch.full((2, 2), 4.0)])
    own = 1 - WEIGHT
    assert torch.allclose(found, torch.tensor([[own + 3 * WEIGHT, 3.0], [3.0, 4 * own + 3 * WEIGHT]]))


@pytest.mark.parametrize(("task", "shape"), [(COLOUR, ()), (REGIONS, (4, 5))])
def test_class_ids_become_probabilities_of_the_classes(task, shape):
    target = torch.randint(0, 3, (6, *shape))
    target[0] = task.ignore_index
    outputs = [torch.randn(6, 3, *shape) for _ in range(2)]
    found = mixed_target(task, target, outputs)
    mean = (outputs[0].softmax(1) + outputs[1].softmax(1)) / 2
    assert found.shape == (6, 3, *shape)
    assert torch.allclose(found.sum(1), torch.ones(6, *shape))
    assert torch.allclose(found[0], mean[0])
    chosen = found.gather(1, target.clamp(min=0).unsqueeze(1))[1:]
    assert torch.allclose(
        chosen, WEIGHT * mean.gather(1, target.clamp(min=0).unsqueeze(1))[1:] + 1 - WEIGHT, atol=1e-6
    )
    assert valid(task, found).shape == target.shape
    assert valid(task, found).all()


def test_losses_take_probabilities_and_count_a_label_for_each_sample_or_pixel():
    spec = samples.image_spec(samples.ONE_OF_EACH, groups=2)
    network = GroupingNetwork(spec)
    batch = samples.batch(spec.input, spec.tasks)
    soft = dict(batch.targets)
    for task in spec.tasks:
        if task.classes:
            hard = batch.targets[task.name].where(valid(task, batch.targets[task.name]), 1)
            soft[task.name] = F.one_hot(hard, task.channels).movedim(-1, 1).float()
            batch.targets[task.name].copy_(hard)
    assert torch.equal(label_counts(spec.tasks, soft), label_counts(spec.tasks, batch.targets))
    outputs, losses = network.forward_pairs(batch.inputs), PairLosses(spec.tasks, network.pairs)
    assert torch.allclose(losses(outputs, soft), losses(outputs, batch.targets), atol=1e-5)
    hard_outputs = network(batch.inputs)
    for task in spec.tasks:
        one, other = (sample_loss(task, hard_outputs[task.name], t[task.name]) for t in (soft, batch.targets))
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-4), task.name


def test_teachers_change_only_targets_and_fill_missing_labels():
    spec = samples.mlp_spec()
    teach = Teachers([GroupingNetwork(replace(spec, seed=seed)) for seed in (1, 2)])
    batch = samples.batch(spec.input, spec.tasks, 16, missing=0.3)
    mixed = teach(batch)
    assert torch.equal(mixed.inputs, batch.inputs)
    for task in spec.tasks:
        before, after = batch.targets[task.name], mixed.targets[task.name]
        assert after.is_floating_point()
        assert not after.isnan().any()
        assert after.shape != before.shape or not torch.equal(after, before)


def test_the_time_of_teachers_does_not_count_as_waiting_for_data(monkeypatch):
    spec, settings = samples.mlp_spec(), TrainSettings(epochs=1, search_share=1.0, batch_size=16)
    data, context = samples.data(spec.input, spec.tasks), LocalContext(device="cpu")
    state, clock = distillation_state(GroupingNetwork(spec), -9.0, settings), [0.0]
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Slow(GroupingNetwork):
        def forward(self, raw):
            clock[0] += 1
            return super().forward(raw)

    distil(state, [Slow(spec)], data, settings, context, gap=0)
    assert clock[0] == data.steps(16)
    assert state.history[-1]["data_share"] == 0
    assert state.best_score == -9.0  # no epoch was better, so the initial network is kept
    begun = GroupingNetwork(spec)
    begun.prune(2.0)
    assert_same_tensors(samples.snapshot(state.network), samples.snapshot(begun))


def test_the_weight_of_the_teachers_decreases_unless_a_network_overfits():
    assert [teacher_share(OVERFIT + 0.01, epoch, 5) for epoch in range(5)] == [WEIGHT] * 5
    assert [teacher_share(OVERFIT, epoch, 5) for epoch in range(5)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0])
    assert teacher_share(0, 0, 1) == WEIGHT
    targets = torch.tensor([1.0, torch.nan])
    assert mixed_target(FLAG, targets, [torch.zeros(2)], 0).tolist() == [1, 0.5]


def test_the_gap_is_the_mean_logarithm_of_validation_over_training_losses():
    record = {"train_loss": {"a": 1.0, "b": 0.5}, "val": {"a": {"loss": 2.0}, "b": {"loss": 4.0}}}
    assert generalisation_gap(record) == pytest.approx(2 * math.log(2))


def test_teachers_that_are_no_better_do_not_limit_a_network():
    inputs, tasks, data, _ = planted_data(0)
    spec = wide_spec(NetworkSpec(inputs, tasks, EncoderSpec("mlp", options={"widths": [16, 4]}), groups=3, seed=0))
    settings = TrainSettings(epochs=2, batch_size=128, learning_rate=1e-2, seed=0, search_share=1.0)
    specs = [replace(spec, seed=seed) for seed in (0, 1, 2)]
    short = [train_hard(hard_network(one, together(one)), data, settings) for one in specs]
    assert max(one.gap for one in short) < OVERFIT
    scores = {}
    for gap in (short[0].gap, 1.0):
        state = distillation_state(short[0].network, short[0].score, replace(settings, epochs=6))
        teachers = [one.network for one in short]
        distil(state, teachers, data, replace(settings, epochs=6), LocalContext(), gap=gap)
        scores[gap] = state.best_score
    assert scores[short[0].gap] < scores[1.0] < short[0].score


def test_three_networks_distilled_into_one_are_better_than_each_at_the_same_inference_cost():
    inputs, tasks, data, _ = planted_data(0)
    spec = wide_spec(NetworkSpec(inputs, tasks, EncoderSpec("mlp", options={"widths": [16, 4]}), groups=3, seed=0))
    settings = TrainSettings(epochs=6, batch_size=128, learning_rate=1e-2, seed=0)
    specs = [replace(spec, seed=seed) for seed in (0, 1, 2)]
    alone = [train_hard(hard_network(one, together(one)), data, settings) for one in specs]
    # three trainings, the distillation, and a forward pass of each teacher
    distilled = train_distilled(specs, data, settings, 5.0)
    assert distilled.score < min(one.score for one in alone)
    assert score_of(tasks, evaluate(distilled.network, data, "test")) < min(
        score_of(tasks, one.metrics["test"]) for one in alone
    )
    assert 4 < distilled.cost <= 5


@pytest.mark.parametrize(
    ("runs", "epochs", "distillation"), [(0.1, [1], 0), (0.6, [1], 0), (1.1, [1, 1], 0), (3.2, [1, 1, 1], 1)]
)
def test_a_small_budget_has_fewer_networks_or_no_distillation(
    runs: float, epochs: list[int], distillation: int
) -> None:
    inputs, tasks, data, _ = planted_data(0)
    spec = NetworkSpec(inputs, tasks, EncoderSpec("mlp", options={"widths": [16, 4]}), groups=1, seed=0)
    settings = TrainSettings(epochs=2, batch_size=128, learning_rate=1e-2, seed=0)  # an epoch is half a run
    specs = [replace(spec, seed=seed) for seed in (0, 1, 2)]
    found = train_distilled(specs, data, settings, runs)
    alone = [
        train_within(hard_network(one, together(one)), data, settings, count / 2)
        for one, count in zip(specs, epochs, strict=False)
    ]
    assert [one.cost for one in alone] == [count / 2 for count in epochs]
    # a step has three times the operations of a forward pass: three teachers double those of an epoch
    assert found.cost == pytest.approx(sum(epochs) / 2 + distillation)
    if not distillation:
        best = min(alone, key=lambda one: one.score)
        assert (found.score, found.metrics) == (best.score, best.metrics)
