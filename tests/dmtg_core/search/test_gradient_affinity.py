"""Gradient affinities of published selectors, against values computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dmtg_core import (
    EncoderSpec,
    GradientAffinities,
    GroupingNetwork,
    InputSpec,
    NetworkSpec,
    Task,
    projected_affinity,
)
from dmtg_core.search.gradient_affinity import _linear, shared_parameters
from dmtg_core.training.data import Batch
from tests.dmtg_core import samples
from tests.dmtg_core.samples import ONE_OF_EACH, SAMPLEWISE, assert_same_tensors, image_spec, mlp_spec, snapshot

VALUES = tuple(Task(name, "regression") for name in "abc")


def linear() -> tuple[GroupingNetwork, Batch]:
    """One linear layer for all tasks: b has the labels of a inverted, c has other labels."""
    spec = NetworkSpec(InputSpec("features", (2,)), VALUES, EncoderSpec("mlp", options={"widths": [2]}), groups=1)
    network = GroupingNetwork(spec)
    with torch.no_grad():
        for parameter in network.branches.parameters():  # the identity, in the positive range of ReLU
            parameter.copy_(torch.eye(2) if parameter.dim() == 2 else torch.full((2,), 10.0))
        for task, row in zip(VALUES, ([1.0, 0.0], [1.0, 0.0], [0.0, 1.0]), strict=True):
            network.bank.weights[0][network.bank.rows(0, task)] = torch.tensor([row])
            network.bank.biases[0][network.bank.rows(0, task)] = -10.0
    x = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [0.5, -0.5], [-0.5, -0.5]])
    targets = {"a": x[:, 0] + 1, "b": x[:, 0] - 1, "c": x[:, 1] + 2}
    return network, Batch(x, targets)


def test_a_step_on_one_of_two_opposite_tasks_hurts_the_other() -> None:
    network, batch = linear()
    affinities = GradientAffinities(VALUES)
    affinities.update(network, batch, 1e-4)
    found = affinities.means()
    for value in found.values():
        assert value.shape == (3, 3)
        assert value[0, 1] < 0
        assert value[1, 0] < 0
        assert (value.diagonal() == 0).all()
    assert found["cs"][0, 1] == pytest.approx(-1, abs=1e-4)
    assert found["cs"][0, 2] == pytest.approx(0, abs=1e-3)


def test_etap_is_the_first_order_of_tag() -> None:
    spec = mlp_spec(SAMPLEWISE[:4], groups=1, sampling="fixed")
    network, batch = GroupingNetwork(spec), samples.batch(spec.input, spec.tasks, 32)
    affinities = GradientAffinities(spec.tasks)
    affinities.update(network, batch, 1e-3)
    found = affinities.means()
    assert torch.allclose(
        found["tag"] / 1e-3, found["etap"], rtol=0.05, atol=0.05 * float(found["etap"].abs().max())
    )


def test_etap_and_cs_are_products_of_the_gradients_of_the_shared_weights() -> None:
    spec = mlp_spec(SAMPLEWISE[:3], groups=1, sampling="fixed")
    network, batch = GroupingNetwork(spec), samples.batch(spec.input, spec.tasks, 16)
    affinities = GradientAffinities(spec.tasks)
    affinities.update(network, batch, 1e-3)
    rows, losses = [], []
    from dmtg_core.training.losses import label_counts, sample_loss

    counts = label_counts(spec.tasks, batch.targets)
    for task, count in zip(spec.tasks, counts, strict=True):
        network.zero_grad()
        loss = sample_loss(task, network.eval()(batch.inputs)[task.name], batch.targets[task.name]).sum() / count
        loss.backward()
        rows.append(torch.cat([p.grad.flatten() for p in network.branches.parameters()]).double())
        losses.append(float(loss.detach()))
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            if i != j:
                assert affinities.means()["etap"][i, j] == pytest.approx(float(a @ b) / losses[j], rel=1e-3)
                cosine = float(a @ b / (a.norm() * b.norm()))
                assert affinities.means()["cs"][i, j] == pytest.approx(cosine, rel=1e-3)


@pytest.mark.parametrize("spec", [mlp_spec(SAMPLEWISE, groups=1), image_spec(ONE_OF_EACH, groups=1)])
def test_updates_do_not_change_the_network_and_are_averaged(spec: NetworkSpec) -> None:
    network = GroupingNetwork(replace(spec, sampling="fixed")).train()
    before = snapshot(network)
    first, second = (samples.batch(spec.input, spec.tasks, 6, seed=seed, missing=0.2) for seed in (0, 1))
    both = GradientAffinities(spec.tasks)
    alone = []
    for batch in (first, second):
        both.update(network, batch, 1e-3)
        one = GradientAffinities(spec.tasks)
        one.update(network, batch, 1e-3)
        alone.append(one.means())
    assert_same_tensors(snapshot(network), before)
    assert network.training
    for name, mean in both.means().items():
        assert torch.isfinite(mean).all()
        assert torch.allclose(mean, (alone[0][name] + alone[1][name]) / 2)


def test_the_projected_estimate_separates_opposite_tasks() -> None:
    network, batch = linear()
    found = projected_affinity(network, batch, batch, directions=6)
    assert found.shape == (3, 3)
    assert (found.diagonal() > -1).all()  # training alone improves each task
    assert found[0, 1] < found[1, 1] - 0.1
    assert found[1, 0] < found[0, 0] - 0.1


def test_the_projected_estimate_takes_tasks_of_all_kinds_and_changes_nothing() -> None:
    spec = image_spec(ONE_OF_EACH, groups=1, sampling="fixed")
    network = GroupingNetwork(spec).train()
    before = snapshot(network)
    batches = [samples.batch(spec.input, spec.tasks, 6, seed=seed, missing=0.2) for seed in (0, 1)]
    found = projected_affinity(network, *batches, directions=3)
    assert torch.isfinite(found).all()
    assert torch.equal(found, projected_affinity(network, *batches, directions=3))
    assert_same_tensors(snapshot(network), before)
    assert network.training


@pytest.mark.parametrize(
    "encoder",
    [EncoderSpec("embedding_bag", 0, {"embedding": 8, "widths": [6]}),
     EncoderSpec("text_transformer", 0, {"width": 8, "layers": 1, "heads": 2})],
    ids=lambda encoder: encoder.name,
)  # fmt: skip
def test_tasks_are_compared_in_encoders_of_text_too(encoder: EncoderSpec) -> None:
    tokens = InputSpec("tokens", (7,), "uint16", vocabulary=40)
    network = GroupingNetwork(NetworkSpec(tokens, VALUES, encoder, groups=1, sampling="fixed"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (16, 7), generator=generator)
    batch = Batch(ids, {task.name: torch.randn(16, generator=generator) for task in VALUES})
    affinities = GradientAffinities(VALUES)
    affinities.update(network, batch, 1e-2)
    for found in (*affinities.means().values(), projected_affinity(network, batch, batch, directions=4)):
        assert torch.isfinite(found).all()


def test_the_projected_derivatives_are_those_of_the_network() -> None:
    spec = mlp_spec(SAMPLEWISE[:4], groups=1, sampling="fixed")
    network, batch = GroupingNetwork(spec).eval(), samples.batch(spec.input, spec.tasks, 8)
    shared = shared_parameters(network)
    basis = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for name, p in shared.items()}
    with torch.no_grad():
        found = _linear(network, shared, batch, [basis])
    for task in spec.tasks:
        output = network(batch.inputs)[task.name]
        for place in ((0,) if output.dim() == 1 else (0, 0), (-1,) if output.dim() == 1 else (-1, -1)):
            gradients = torch.autograd.grad(output[place], list(shared.values()), retain_graph=True)
            expected = sum(float((g * b).sum()) for g, b in zip(gradients, basis.values(), strict=True))
            assert float(found[task.name][1][0][place]) == pytest.approx(expected, rel=0.05, abs=1e-2)


def test_tasks_are_compared_in_one_branch() -> None:
    spec = mlp_spec(SAMPLEWISE[:2], groups=2)
    network, batch = GroupingNetwork(spec), samples.batch(spec.input, spec.tasks)
    with pytest.raises(ValueError, match="one branch, got 2"):
        GradientAffinities(spec.tasks).update(network, batch, 0.1)
    with pytest.raises(ValueError, match="one branch, got 2"):
        projected_affinity(network, batch, batch)
