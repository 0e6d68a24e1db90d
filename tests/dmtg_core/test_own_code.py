"""Losses, metrics, encoders and aggregators that are code of the user."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dmtg_core import (
    ArrayData,
    EncoderSpec,
    GroupingNetwork,
    InputSpec,
    MetricSums,
    NetworkSpec,
    Task,
    TrainSettings,
    addresses,
    allow_code,
    fit,
)
from dmtg_core.evaluation.bootstrap import BlockSums, compare
from dmtg_core.evaluation.planted import planted
from dmtg_core.search.distillation import mixed_target
from dmtg_core.training.aggregation import load_aggregator
from dmtg_core.training.checkpoint import code_of, load_network, save_network
from dmtg_core.training.losses import PairLosses, label_counts, sample_loss
from dmtg_core.training.metrics import error_of, normalized_gain
from tests.dmtg_core import own

NAN = math.nan
FEATURES = InputSpec("features", (6,))


def at(name: str) -> str:
    return f"{own.HERE}:{name}"


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_allowed", {})
    monkeypatch.setattr(addresses, "_loaded", {})
    allow_code(*(at(name) for name in vars(own) if not name.startswith("_")))


NUMBER = Task("number", "regression", loss=at("absolute"), metric=at("distance"), offset=(10.0,), scale=(2.0,))
CLASSES = Task("classes", "multiclass", 3, loss=at("cross"), metric=at("wrong_class"))
VECTOR = Task("vector", "regression", 2, loss=at("absolute"))
PIXELS = Task("pixels", "dense_regression", loss=at("known_pixels"))


def test_a_loss_of_values_is_summed_over_samples_with_a_label() -> None:
    output, target = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, NAN, 5.0])
    assert sample_loss(NUMBER, output, target).tolist() == [0.5, 0.0, 2.0]
    assert label_counts([NUMBER], {"number": target}).tolist() == [2]


def test_a_missing_label_has_no_gradient() -> None:
    output = torch.tensor([1.0, 2.0], requires_grad=True)
    sample_loss(NUMBER, output, torch.tensor([NAN, 1.0])).sum().backward()
    assert output.grad.tolist() == [0.0, 1.0]


def test_a_loss_of_classes_gets_class_ids() -> None:
    output, target = torch.zeros(3, 3), torch.tensor([2, -1, 0])
    found = sample_loss(CLASSES, output, target)
    torch.testing.assert_close(found, torch.tensor([math.log(3), 0.0, math.log(3)]))
    assert label_counts([CLASSES], {"classes": target}).tolist() == [2]


def test_classes_of_a_distillation_have_the_cross_entropy() -> None:
    mixed = mixed_target(CLASSES, torch.tensor([2, -1]), [torch.zeros(2, 3)])
    found = sample_loss(CLASSES, torch.zeros(2, 3), mixed)
    torch.testing.assert_close(found, torch.full((2,), math.log(3)))
    assert label_counts([CLASSES], {"classes": mixed}).tolist() == [2]


def test_a_sample_of_which_some_values_are_missing_has_no_label() -> None:
    target = torch.tensor([[1.0, 2.0], [NAN, 2.0]])
    assert sample_loss(VECTOR, torch.zeros(2, 2), target).tolist() == [3.0, 0.0]
    assert label_counts([VECTOR], {"vector": target}).tolist() == [1]


def test_a_loss_of_pixels_sees_those_that_are_missing() -> None:
    target = torch.full((2, 1, 2, 2), NAN)
    target[0, 0, 0] = torch.tensor([1.0, -2.0])
    assert sample_loss(PIXELS, torch.zeros(2, 1, 2, 2), target).tolist() == [3.0, 0.0]
    assert label_counts([PIXELS], {"pixels": target}).tolist() == [1]


def test_a_loss_that_returns_no_value_for_each_sample_is_refused() -> None:
    task = replace(NUMBER, loss=at("one_number"))
    with pytest.raises(ValueError, match=r"one_number must return one value for each sample, \(2,\), got \(\)"):
        sample_loss(task, torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("members", [0, 2])
def test_the_losses_of_all_heads_are_those_of_each(members: int) -> None:
    encoder = EncoderSpec("tabm", options={"members": members, "width": 8}) if members else EncoderSpec("mlp")
    others = (Task("flag", "binary"), Task("plain", "regression"), replace(NUMBER, name="second"))
    tasks = (NUMBER, CLASSES, *others, VECTOR)
    network = GroupingNetwork(NetworkSpec(FEATURES, tasks, encoder, groups=2))
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(5, 6, generator=generator)
    numbers = torch.randn(5, generator=generator)
    numbers[3] = NAN
    targets = {
        "number": numbers, "second": numbers.flip(0), "plain": numbers, "flag": torch.tensor([0.0, 1, 1, 0, NAN]),
        "classes": torch.tensor([0, 1, -1, 2, 0]), "vector": torch.randn(5, 2, generator=generator),
    }  # fmt: skip
    outputs = network.eval().forward_pairs(inputs)
    losses = PairLosses(tasks, network.pairs)
    found = losses(outputs, targets)
    assert found.shape == (12, 5)
    torch.testing.assert_close(torch.stack(losses.separate(outputs, targets)), found)
    if not members:
        for place, (k, n) in enumerate(network.pairs):
            hard = GroupingNetwork(NetworkSpec(FEATURES, tasks, encoder, groups=2))
            hard.load_state_dict(network.state_dict())
            alive = torch.zeros(6, 2, dtype=torch.bool)
            alive[:, k] = True
            hard.keep(alive)
            own_output = hard.eval()(inputs)[tasks[n].name]
            torch.testing.assert_close(found[place], sample_loss(tasks[n], own_output, targets[tasks[n].name]))


def test_a_metric_gets_values_in_raw_units_and_is_a_mean_over_samples_with_a_label() -> None:
    sums = MetricSums([NUMBER])
    sums.update({"number": torch.tensor([0.0, 1.0])}, {"number": torch.tensor([1.0, NAN])})
    sums.update({"number": torch.tensor([3.0])}, {"number": torch.tensor([1.0])})
    found = sums.compute()["number"]
    assert found[at("distance")] == pytest.approx((2 + 4) / 2)  # scale 2
    assert found["mae"] == pytest.approx(3)
    assert found["loss"] == pytest.approx((1 + 2) / 2)


def test_a_metric_of_classes_gets_probabilities() -> None:
    sums = MetricSums([CLASSES])
    sums.update({"classes": torch.eye(3)}, {"classes": torch.tensor([0, 2, -1])})
    assert sums.compute()["classes"][at("wrong_class")] == 0.5


def test_a_metric_without_labels_is_undefined() -> None:
    sums = MetricSums([NUMBER])
    sums.update({"number": torch.zeros(2)}, {"number": torch.full((2,), NAN)})
    assert math.isnan(sums.compute()["number"][at("distance")])


def test_a_metric_of_the_user_is_an_error() -> None:
    assert error_of(at("distance"), 0.25) == 0.25
    gain = normalized_gain([NUMBER], {"number": {at("distance"): 1.0}}, {"number": {at("distance"): 4.0}})
    assert gain == 75


def test_a_bootstrap_compares_a_metric_of_the_user() -> None:
    sides = []
    for shift in (2.0, 1.0):
        sums = BlockSums([NUMBER], 40)
        sums.update({"number": torch.full((40,), shift)}, {"number": torch.zeros(40)})
        sides.append(sums)
    found = compare(*sides, resamples=20)
    assert found.gain.value == found.gain.low == pytest.approx(50)


@pytest.mark.parametrize(
    ("encoder", "count"),
    [
        (EncoderSpec(at("Net"), options={"inputs": 6}), 1),
        (EncoderSpec(at("Layers"), 1, {"width": 4}), 3),
        (EncoderSpec(at("stages"), 1), 2),
        (EncoderSpec(at("AnyOptions"), options={"inputs": 6}), 1),
    ],
)
def test_a_class_or_a_function_is_an_encoder(encoder: EncoderSpec, count: int) -> None:
    encoder.check()
    assert len(encoder.stages(FEATURES)) == count
    network = GroupingNetwork(NetworkSpec(FEATURES, (Task("a", "binary"), Task("b", "binary")), encoder, groups=2))
    assert network(torch.zeros(3, 6))["a"].shape == (3,)
    assert sum(1 for _ in network.stem.children()) == encoder.stem
    first, second = (torch.cat([p.flatten() for p in network.branches[k].parameters()]) for k in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("encoder", "text"),
    [
        (EncoderSpec(at("Net"), 1, {"inputs": 6}), "the stem takes 0 to 0 of its stages, got 1"),
        (
            EncoderSpec(at("Net"), options={"inputs": 6, "depth": 3}),
            "no option 'depth', its options are: inputs, width",
        ),
        (EncoderSpec(at("Layers"), options={"spec": 3}), "no option 'spec', its options are: width"),
        (EncoderSpec(at("Net")), "missing 1 required"),
        (EncoderSpec(at("Net"), options={"inputs": 5}), r"does not take an input of shape \(1, 6\)"),
        (EncoderSpec(at("Pair"), options={"inputs": 6}), r"must return \(B, C\) or \(B, C, H, W\), got tuple"),
        (EncoderSpec(at("no_stages")), "must return modules, got int"),
        (EncoderSpec("tests.dmtg_core.own:Nothing"), "not import"),
    ],
)
def test_an_encoder_that_cannot_be_used_is_refused_with_the_reason(encoder: EncoderSpec, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        GroupingNetwork(NetworkSpec(FEATURES, (Task("a", "binary"),), encoder, groups=1))


def test_an_aggregator_is_a_function_of_the_gramian() -> None:
    weigh = load_aggregator(at("weigh_first"))
    assert weigh(torch.tensor([[1.0, 0.5], [0.5, 2.0]]), 3).tolist() == [1, 0]
    assert weigh(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), 3).tolist() == [0, 1]  # the only gradient there is
    with pytest.raises(ValueError, match=r"must return the weights \(N,\).*got float"):
        load_aggregator(at("weigh_nothing"))


def test_code_is_trained_written_and_read_again(tmp_path: Path) -> None:
    spec, tasks, splits, _ = planted(0, rows=200)
    own_tasks = (replace(tasks[0], loss=at("flags"), metric=at("distance")), *tasks[1:])
    encoder, settings = EncoderSpec(at("Layers"), 1), TrainSettings(epochs=2, batch_size=64)
    state, plain = (
        fit(GroupingNetwork(NetworkSpec(spec, each, encoder, groups=2)), ArrayData(splits, each), settings)
        for each in (own_tasks, tasks)
    )
    assert state.history[-1]["train_loss"] == pytest.approx(plain.history[-1]["train_loss"])
    save_network(tmp_path, state.network)
    records = code_of(tmp_path)
    assert [(one["kind"], one["address"]) for one in records] == [
        ("encoder", at("Layers")), ("loss", at("flags")), ("metric", at("distance")),
    ]  # fmt: skip
    assert len({one["sha256"] for one in records}) == 1
    addresses._allowed.clear()
    with pytest.raises(addresses.CodeError, match="not imported"):
        load_network(tmp_path)
    x = torch.zeros(2, *spec.shape)
    loaded = load_network(tmp_path, trust_code=True)
    assert torch.equal(loaded.eval()(x)[tasks[0].name], state.network.eval()(x)[tasks[0].name])
