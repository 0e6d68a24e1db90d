"""More than ten branches: the order of the branches is the order of their numbers, everywhere."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmtg_core import (
    ArrayData,
    Arrays,
    EncoderSpec,
    GroupingNetwork,
    InputSpec,
    NetworkSpec,
    Task,
    TrainSettings,
    evaluate,
    fit,
)
from dmtg_core.grouping import Grouping
from dmtg_core.network.numbered import Numbered
from dmtg_core.search.baselines import hard_network
from dmtg_core.training.checkpoint import load_model, load_network, save_model, save_network
from dmtg_core.training.losses import PairLosses
from dmtg_core.training.state import TrainState
from tests.dmtg_core import samples
from tests.dmtg_core.samples import FEATURES, IMAGE, assigned, learn_statistics
from tests.dmtg_core.searches import local

KINDS = (*samples.SAMPLEWISE, Task("long", "multiclass", 12))


def tasks_of(count: int, seed: int, dense: bool = False) -> list[Task]:
    """So many tasks of mixed kinds."""
    kinds = (*KINDS, *samples.DENSE) if dense else KINDS
    chosen = [kinds[i] for i in np.random.default_rng(seed).integers(len(kinds), size=count)]
    return [Task.from_dict(task.to_dict() | {"name": f"{task.name}_{n}"}) for n, task in enumerate(chosen)]


def pruned_at_random(network: GroupingNetwork, seed: int) -> GroupingNetwork:
    """The network with some of its heads, at least one for each task."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(network.gate.alive.shape, generator=generator).where(network.gate.alive, -1.0)
    likeliest = drawn.argmax(1)
    alive = drawn > torch.rand(1, generator=generator)
    alive[torch.arange(len(alive)), likeliest] = True
    network.keep(alive)
    return assigned(network, likeliest.tolist())


@st.composite
def networks(draw) -> GroupingNetwork:
    """Networks with K from 1 to 24 and N from 1 to 48 of mixed kinds, pruned at random."""
    seed, groups, tasks = draw(st.integers(0, 2**16)), draw(st.integers(1, 24)), draw(st.integers(1, 48))
    if draw(st.integers(0, 4)) == 0:
        groups, tasks = min(groups, 13), min(tasks, 6)  # few dense heads, which are slow
        spec = samples.image_spec(tasks_of(tasks, seed, dense=True), groups, seed=seed)
    else:
        widths = {"widths": [5, 3]}
        spec = NetworkSpec(
            FEATURES, tasks_of(tasks, seed), EncoderSpec("mlp", seed % 2, widths), groups, seed=seed
        )
    network = learn_statistics(GroupingNetwork(spec), samples.batch(spec.input, spec.tasks).inputs)
    return pruned_at_random(network, seed) if draw(st.booleans()) else assigned(network, [seed % groups] * tasks)


def without_batch_statistics(network: GroupingNetwork) -> None:
    """Training mode for all but normalisation and dropout, whose output depends on the mode."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.Dropout):
            module.eval()


@settings(max_examples=8)
@given(network=networks(), seed=st.integers(0, 99))
def test_heads_in_training_are_the_heads_in_evaluation(network, seed):
    batch = samples.batch(network.spec.input, network.tasks, seed=seed, missing=0.2)
    losses, outputs = PairLosses(network.tasks, network.pairs), {}
    with torch.no_grad():
        for name, mode in (("evaluation", network.eval), ("training", lambda: without_batch_statistics(network))):
            mode()
            outputs[name] = network.forward_pairs(batch.inputs)
        features = network.eval().features(batch.inputs)
        alone = {(k, n): network.head(k, n, features[k], batch.inputs.shape[1:3]) for k, n in network.pairs}
    torch.testing.assert_close(outputs["training"].rows, outputs["evaluation"].rows)
    rows = torch.cat([
        alone[k, n].reshape(len(batch.inputs), -1).T for k, n in network.pairs if not network.tasks[n].dense
    ] or [torch.zeros(0)])  # fmt: skip
    assert torch.equal(outputs["evaluation"].rows.reshape(rows.shape), rows)
    for pair, value in outputs["training"].dense.items():
        torch.testing.assert_close(value, alone[pair])
    assert losses(outputs["training"], batch.targets).shape == (len(network.pairs), len(batch.inputs))


@settings(max_examples=12)
@given(network=networks())
def test_the_hard_network_is_its_groups(network):
    inputs = samples.batch(network.spec.input, network.tasks).inputs
    network.eval()
    with torch.no_grad():
        expected = network(inputs)
        found = {
            name: out for model in network.specialise().values() for name, out in model.eval()(inputs).items()
        }
    samples.assert_same_tensors(found | {}, {name: expected[name] for name in found})
    assert found.keys() == expected.keys()


@settings(max_examples=6)
@given(network=networks())
def test_saving_and_loading_change_nothing(network, tmp_path_factory):
    folder, inputs = tmp_path_factory.mktemp("net"), samples.batch(network.spec.input, network.tasks).inputs
    save_network(folder, network)
    loaded = load_network(folder)
    samples.assert_same_tensors(samples.snapshot(loaded), samples.snapshot(network))
    assert loaded.pairs == network.pairs
    with torch.no_grad():
        for mode in (lambda net: net.eval(), without_batch_statistics):
            for net in (network, loaded):
                mode(net)
            assert torch.equal(loaded.forward_pairs(inputs).rows, network.forward_pairs(inputs).rows)
    for name, model in network.specialise().items():
        save_model(folder / name, model)
        samples.assert_same_tensors(samples.snapshot(load_model(folder / name)), samples.snapshot(model))


@settings(max_examples=12)
@given(network=networks(), pick=st.integers(0, 10**6))
def test_the_loss_of_a_head_reaches_its_own_branch_and_no_other(network, pick):
    batch = samples.batch(network.spec.input, network.tasks, 8)
    without_batch_statistics(network)
    place = pick % len(network.pairs)
    k, n = network.pairs[place]
    network.zero_grad()
    losses = PairLosses(network.tasks, network.pairs)(network.forward_pairs(batch.inputs), batch.targets)
    losses[place].sum().backward()

    def reached(module: nn.Module) -> bool:
        return any(p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters())

    branches = {branch for branch, module in network.branches.items() if reached(module)}
    assert branches <= {k}
    assert {pair for pair, decoder in network.decoders.items() if reached(decoder)} <= {(k, n)}
    for branch, weight in network.bank.weights.items():
        rows = {int(i) for i in (torch.zeros(1) if weight.grad is None else weight.grad.abs().sum(1)).nonzero()}
        own = network.bank.rows(k, network.tasks[n]) if branch == k and not network.tasks[n].dense else slice(0, 0)
        assert rows <= set(range(own.start, own.stop))
    # a dead unit of the branch may stop the gradient, but not that of the head's own bias
    biases = [b.grad.abs().sum() for b in network.bank.biases.values() if b.grad is not None]
    assert network.tasks[n].dense or sum(biases) > 0 or not bool(losses[place].sum())


@settings(max_examples=8)
@given(network=networks(), seed=st.integers(0, 99))
def test_the_state_of_the_optimiser_is_pruned_with_the_heads(network, seed):
    state = TrainState.fresh(network, TrainSettings(optimizer="adam"))
    for number, parameter in enumerate(network.parameters()):
        if parameter.requires_grad:
            value = torch.arange(parameter.numel()).reshape(parameter.shape) + 10_000.0 * number
            state.optimizer.state[parameter]["exp_avg"] = value
            parameter.data.copy_(value)
    alive = copy.deepcopy(pruned_at_random(copy.deepcopy(network), seed).gate.alive)
    state.keep(alive, TrainSettings(optimizer="adam"))
    for name, parameter in state.network.named_parameters():
        if parameter.requires_grad and name != "gate.logits":
            assert torch.equal(state.optimizer.state[parameter]["exp_avg"], parameter.data), name


def linear_problem(tasks: int, rows: int = 600) -> tuple[InputSpec, list[Task], ArrayData]:
    """Values that are linear in the input, each with its own direction."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 8, generator=rng)
    y = x @ torch.randn(8, tasks, generator=rng)
    names = [Task(f"t{n}", "regression") for n in range(tasks)]

    def part(start: int, stop: int) -> Arrays:
        labels = {task.name: y[start:stop, n].numpy() for n, task in enumerate(names)}
        return Arrays(x[start:stop].numpy(), labels, {})

    splits = {"train": part(0, 400), "val": part(400, 500), "test": part(500, rows)}
    return InputSpec("features", (8,)), names, ArrayData(splits, names)


def test_twelve_single_task_networks_are_no_worse_than_one_for_all():
    spec_input, tasks, data = linear_problem(12)
    settings_ = TrainSettings(epochs=10, search_share=1.0, batch_size=50, learning_rate=0.04, lr_schedule="cosine")
    names = [task.name for task in tasks]
    base = NetworkSpec(spec_input, tasks, EncoderSpec("mlp", options={"widths": [24]}), 12)
    found = {}
    for name, groups in (("single", [[n] for n in names]), ("shared", [names])):
        network = hard_network(base, Grouping.of(groups, names))
        found[name] = evaluate(fit(network, data, settings_, local()).network, data, "test", context=local())
    for name in names:
        assert found["single"][name]["rmse"] <= found["shared"][name]["rmse"] + 0.02, name


def test_a_gate_over_twelve_branches_is_trained_on_the_evaluated_heads():
    spec_input, tasks, data = linear_problem(12)
    spec = NetworkSpec(spec_input, tasks, EncoderSpec("mlp", options={"widths": [24]}), 12, initial="diagonal")
    state = fit(GroupingNetwork(spec), data, TrainSettings(epochs=15, batch_size=50, learning_rate=0.02), local())
    metrics = evaluate(state.network, data, "test", context=local())
    assert max(found["rmse"] for found in metrics.values()) < 0.5  # the values have a deviation of about 2.8
    train, val = state.history[-1]["train_loss"], state.history[-1]["val"]
    for name, loss in train.items():
        assert val[name]["loss"] < 3 * loss + 0.1, name


@given(st.permutations(range(40)), st.integers(1, 40))
def test_numbered_items_come_in_the_order_of_their_numbers(order, count):
    held = Numbered({k: nn.Parameter(torch.tensor([float(k)])) for k in order[:count]})
    expected = sorted(order[:count])
    assert list(held) == expected
    assert [int(p) for p in held.values()] == expected
    assert [(k, int(p)) for k, p in held.items()] == [(k, k) for k in expected]
    assert list(held.state_dict()) == [str(k) for k in expected]
    gone = expected[count // 2]
    del held[gone]
    assert list(held) == [k for k in expected if k != gone]
    for k in list(held):
        held[k] = nn.Parameter(torch.tensor([-float(k)]))
    assert [-int(p) for p in held.values()] == list(held)


@pytest.mark.parametrize("call", [lambda n: n[10], lambda n: n.__delitem__(10), lambda n: n.__setitem__(10, n[2])])
def test_a_missing_number_is_a_key_error(call):
    with pytest.raises(KeyError, match="10"):
        call(Numbered({2: nn.Linear(1, 1), 3: nn.Linear(1, 1)}))


def test_pairs_are_named_and_ordered_by_both_numbers():
    held = Numbered({(k, n): nn.Linear(1, 1) for n in (11, 2) for k in (10, 9)})
    assert list(held) == [(9, 2), (9, 11), (10, 2), (10, 11)]
    assert next(iter(held.state_dict())) == "9_2.weight"


def test_image_networks_of_more_than_ten_branches():
    """Dense and sample-wise heads together, in a whole training."""
    spec = samples.image_spec(samples.ONE_OF_EACH, 12)
    data = samples.data(IMAGE, spec.tasks, 24)
    state = fit(GroupingNetwork(spec), data, TrainSettings(epochs=2, batch_size=12), local())
    assert evaluate(state.network, data, "val", context=local()).keys() == {task.name for task in spec.tasks}
