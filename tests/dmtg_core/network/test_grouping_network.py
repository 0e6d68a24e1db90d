"""`GroupingNetwork`, its pruning, and the models of its groups."""

import copy
import itertools
import json
import math

import pytest
import torch

from dmtg_core import ENCODERS, EncoderSpec, Grouping, GroupingNetwork, InputSpec, NetworkSpec, Task
from dmtg_core.network.grouping_network import PairOutputs, clone
from dmtg_core.network.spec import RESCALINGS
from dmtg_core.training.losses import sample_loss
from tests.dmtg_core import samples
from tests.dmtg_core.network.test_encoders import CUTS
from tests.dmtg_core.samples import (
    MIXED,
    ONE_OF_EACH,
    SAMPLEWISE,
    assert_same_tensors,
    assigned,
    image_spec,
    mlp_spec,
)

BRANCHES = [0, 2, 2, 0, 2]


def built(name: str, stem: int) -> GroupingNetwork:
    """A network on an encoder, with changed running statistics and a converged gate."""
    if ENCODERS[name][1] == "image":
        spec = image_spec(ONE_OF_EACH, encoder=name, stem=stem)
    else:
        spec = mlp_spec(ONE_OF_EACH[:3], stem=stem)
    network = GroupingNetwork(spec)
    samples.learn_statistics(network, samples.batch(spec.input, spec.tasks, 4).inputs)
    return assigned(network, BRANCHES[: len(spec.tasks)])


# the deep ones have the modules of resnet18 or of resnet50
SOAK = [cut for cut in CUTS if cut[0] in ("resnet34", "resnet50") and cut != ("resnet50", 3)]


@pytest.fixture(
    scope="module",
    params=[pytest.param(cut, marks=pytest.mark.soak) if cut in SOAK else cut for cut in CUTS],
    ids=lambda cut: f"{cut[0]}-{cut[1]}",
)
def network(request):
    """One network for each encoder and stem. Tests must not change it."""
    return built(*request.param)


@pytest.fixture(scope="module")
def inputs(network):
    return samples.batch(network.spec.input, network.tasks, 3, seed=7).inputs


def pair_outputs(network: GroupingNetwork, outputs: PairOutputs) -> dict[tuple[int, int], torch.Tensor]:
    """Outputs by (branch, task number), each computed like in the hard network."""
    rows, found = iter(outputs.rows), dict(outputs.dense)
    for k, n in network.pairs:
        if not network.tasks[n].dense:
            channels = network.tasks[n].channels
            value = torch.stack([next(rows) for _ in range(channels)], 1)
            found[k, n] = value.squeeze(1) if channels == 1 else value
    assert next(rows, None) is None
    return found


@torch.no_grad()
def test_every_encoder_and_stem_has_outputs_of_the_layout_of_each_kind(network, inputs):
    outputs = network(inputs)
    shapes = {
        "binary": (3,), "multiclass": (3, 3), "regression": (3, 2),
        "dense_classification": (3, 4, 16, 16), "dense_regression": (3, 3, 16, 16),
    }  # fmt: skip
    assert {task.name: tuple(outputs[task.name].shape) for task in network.tasks} == {
        task.name: shapes[task.kind] for task in network.tasks
    }


@torch.no_grad()
def test_the_hard_network_its_pairs_and_its_group_models_agree_bit_for_bit(network, inputs):
    hard = network(inputs)
    pairs = pair_outputs(network, network.forward_pairs(inputs))
    for n, task in enumerate(network.tasks):
        assert torch.equal(hard[task.name], pairs[BRANCHES[n], n]), task.name
    models = network.specialise()
    assert {name: [t.name for t in model.tasks] for name, model in models.items()} == network.grouping().to_dict()
    for model in models.values():
        assert not model.training
        found = model(inputs)
        assert found.keys() == {t.name for t in model.tasks}
        for name, value in found.items():
            assert torch.equal(value, hard[name]), name


@torch.no_grad()
def test_pruning_does_not_change_the_outputs_of_kept_heads(network, inputs):
    before = pair_outputs(network, network.forward_pairs(inputs))
    hard = network(inputs)
    pruned = clone(network)
    alive = torch.ones_like(pruned.gate.alive)
    alive[0, 1:] = False
    alive[1, 0] = False
    pruned.keep(alive)
    after = pair_outputs(pruned, pruned.forward_pairs(inputs))
    assert set(after) == {(k, n) for k, n in before if alive[n, k]}
    assert all(torch.equal(after[pair], before[pair]) for pair in after)
    pruned.prune(2.0)
    found = pruned(inputs)
    assert all(torch.equal(found[name], hard[name]) for name in hard)
    assert pruned.grouping() == network.grouping()


MIXED_SPECS = {"features": mlp_spec(), "images": image_spec(), "one group": mlp_spec(groups=1)}


@pytest.fixture(params=MIXED_SPECS, ids=str)
def mixed(request):
    """A fresh network of many tasks in evaluation mode."""
    spec = MIXED_SPECS[request.param]
    network = samples.learn_statistics(GroupingNetwork(spec), samples.batch(spec.input, spec.tasks, 4).inputs)
    return assigned(network, [n % spec.groups for n in range(len(spec.tasks))], by=6.0)


@torch.no_grad()
def test_mixed_tasks_specialise_bit_for_bit_after_pruning_too(mixed):
    inputs = samples.batch(mixed.spec.input, mixed.tasks, 3).inputs
    hard = mixed(inputs)
    for pruned in (mixed, clone(mixed)):
        if pruned is not mixed:
            pruned.prune(0.5)
        found = {name: value for model in pruned.specialise().values() for name, value in model(inputs).items()}
        assert found.keys() == hard.keys()
        assert all(torch.equal(found[name], hard[name]) for name in hard)


def test_pruning_at_zero_changes_nothing(mixed):
    before = samples.snapshot(mixed)
    parameters = dict(mixed.named_parameters())
    pairs = mixed.pairs
    assert mixed.prune(0.0) == {}
    assert_same_tensors(samples.snapshot(mixed), before)
    assert all(p is parameters[name] for name, p in mixed.named_parameters())
    assert mixed.pairs == pairs


def test_pruning_removes_the_parameters_of_pruned_heads(mixed):
    def count(network):
        return sum(p.numel() for p in network.parameters())

    full = count(mixed)
    groups = mixed.spec.groups
    heads = sum(t.channels for t in mixed.tasks if not t.dense) * (
        next(iter(mixed.bank.weights.values())).shape[1] + 1
    )
    decoders = sum(count(d) for d in mixed.decoders.values()) // groups
    mixed.prune(2.0)
    assert full - count(mixed) == (groups - 1) * (heads + decoders)
    assert len(mixed.pairs) == len(mixed.tasks)


def test_a_branch_without_tasks_is_dropped(mixed):
    assigned(mixed, [0] * len(mixed.tasks), by=20.0)
    mixed.prune(0.5)
    assert list(mixed.branches) == [0]
    assert {k for k, _ in mixed.pairs} == {0}
    assert len(mixed.specialise()) == 1
    assert not any(name.startswith(("branches.1", "decoders.1", "bank.weights.1")) for name in mixed.state_dict())


def test_pairs_name_every_head_once_first_the_bank_then_the_dense(mixed):
    pairs = mixed.pairs
    assert sorted(pairs) == sorted(itertools.product(range(mixed.spec.groups), range(len(mixed.tasks))))
    dense = [mixed.tasks[n].dense for _, n in pairs]
    assert dense == sorted(dense)


def test_more_branches_than_tasks_are_legal():
    network = assigned(GroupingNetwork(mlp_spec(SAMPLEWISE[:2], groups=5)), [4, 2])
    assert network.grouping() == Grouping.of([["smiling"], ["colour"]])
    assert len(network.pairs) == 10
    network.prune(2.0)
    assert set(network.branches) == {2, 4}
    inputs = samples.batch(network.spec.input, network.tasks).inputs
    assert network.eval()(inputs)["colour"].shape == (5, 3)


def test_a_network_of_dense_tasks_alone_works():
    spec = image_spec(samples.DENSE)
    network = assigned(GroupingNetwork(spec), [0, 1, 0, 1]).eval()
    batch = samples.batch(spec.input, spec.tasks)
    hard = network(batch.inputs)
    for model in network.specialise().values():
        assert all(torch.equal(value, hard[name]) for name, value in model(batch.inputs).items())


@pytest.mark.parametrize(
    ("alive", "message"),
    [
        (torch.ones(3, 10, dtype=torch.bool), r"shape \(10, 3\), got \(3, 10\)"),
        (torch.zeros(10, 3, dtype=torch.bool), "none is left for smiling, colour"),
    ],
)
def test_impossible_masks_are_refused_and_change_nothing(alive, message):
    network = GroupingNetwork(mlp_spec())
    before = samples.snapshot(network)
    with pytest.raises(ValueError, match=message):
        network.keep(alive)
    assert_same_tensors(samples.snapshot(network), before)


def test_a_pruned_head_cannot_be_restored():
    network = assigned(GroupingNetwork(mlp_spec()), [0] * 10)
    network.prune(2.0)
    alive = torch.zeros_like(network.gate.alive)
    alive[:, 1] = True
    with pytest.raises(ValueError, match="every task needs a head"):
        network.keep(alive)


def test_keep_grouping_assigns_groups_to_branches():
    network = GroupingNetwork(mlp_spec())
    names = [t.name for t in network.tasks]
    grouping = Grouping.from_assignment(names, [0, 1, 1, 0, 0, 1, 0, 1, 0, 1])
    network.keep_grouping(grouping)
    assert network.grouping() == grouping
    assert set(network.branches) == {0, 1}
    assert len(network.pairs) == 10


@pytest.mark.parametrize(
    ("grouping", "message"),
    [
        (Grouping.of([[t.name] for t in SAMPLEWISE]), "10 groups do not fit 3 branches"),
        (Grouping.of([["smiling"], ["colour"]]), "does not fit the tasks.*smiling"),
    ],
)
def test_a_grouping_that_does_not_fit_is_refused(grouping, message):
    with pytest.raises(ValueError, match=message):
        GroupingNetwork(mlp_spec()).keep_grouping(grouping)


@pytest.mark.parametrize(("rescaling", "heads"), [("tasks", 1 / math.sqrt(10)), ("published", 1 / math.sqrt(3))])
@pytest.mark.parametrize("kept", [None, [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]])
def test_rescaling_scales_gradients_of_branches_and_stem_and_no_others(kept, rescaling, heads):
    spec = mlp_spec(stem=1)
    plain, scaled = (
        GroupingNetwork(NetworkSpec(spec.input, spec.tasks, spec.encoder, 3, rescale_gradients=rescale))
        for rescale in ("off", rescaling)
    )
    inputs = samples.batch(spec.input, spec.tasks).inputs
    for network in (plain, scaled):
        if kept:
            assigned(network, kept).prune(2.0)
        network.train().forward_pairs(inputs).rows.square().sum().backward()
    assert torch.equal(plain.forward_pairs(inputs).rows, scaled.forward_pairs(inputs).rows)
    groups = 1 / math.sqrt(3)
    for (name, one), (_, other) in zip(plain.named_parameters(), scaled.named_parameters(), strict=True):
        if one.grad is None:
            continue
        factor = {"stem": heads * groups, "branches": heads}.get(name.split(".")[0], 1.0)
        assert one.grad.abs().sum() > 0, name
        torch.testing.assert_close(other.grad, one.grad * factor, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("rescaling", "branch", "stem"),
    [("off", 4.0, 8.0), ("tasks", 4 / 2, 8 / (2 * 2**0.5)), ("published", 4 / 2**0.5, 8 / 2)],
)
def test_rescaled_gradients_of_a_network_of_ones_are_those_computed_by_hand(rescaling, branch, stem):
    tasks = [Task(f"task_{n}", "regression") for n in range(4)]
    encoder = EncoderSpec("mlp", 1, {"widths": [1, 1]})
    spec = NetworkSpec(InputSpec("features", (1,)), tasks, encoder, 2, rescale_gradients=rescaling)
    network = GroupingNetwork(spec).train()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.fill_(0.0 if "bias" in name else 1.0)
    network.forward_pairs(torch.ones(1, 1)).rows.sum().backward()  # each of 2 · 4 heads has a gradient of 1
    assert [float(network.branches[k][0][0].weight.grad) for k in (0, 1)] == pytest.approx([branch, branch])
    assert float(network.stem[0][0].weight.grad) == pytest.approx(stem)


def test_a_stored_spec_of_an_earlier_version_has_a_boolean_for_rescaled_gradients():
    stored = {rescaling: mlp_spec(rescale_gradients=rescaling).to_dict() for rescaling in RESCALINGS}
    assert [values["rescale_gradients"] for values in stored.values()] == [False, True, "published"]
    assert [NetworkSpec.from_dict(values).rescale_gradients for values in stored.values()] == list(RESCALINGS)
    with pytest.raises(ValueError, match="rescale_gradients 'groups', expected one of off, tasks, published"):
        mlp_spec(rescale_gradients="groups")


@pytest.mark.parametrize(
    "spec", [mlp_spec(initial="gaussian"), image_spec(initial="gaussian")], ids=["mlp", "convnet"]
)
def test_weights_depend_only_on_the_seed(spec):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = GroupingNetwork(spec)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert_same_tensors(GroupingNetwork(spec).state_dict(), first.state_dict())
    other = GroupingNetwork(NetworkSpec.from_dict({**spec.to_dict(), "seed": 23})).state_dict()
    weights = [name for name in other if name.endswith("weight") and other[name].dim() > 1]
    assert weights
    assert not any(torch.equal(other[name], first.state_dict()[name]) for name in [*weights, "gate.logits"])


def test_input_is_normalised_with_the_constants_of_its_channels():
    network = GroupingNetwork(image_spec())
    raw = torch.full((1, 16, 16, 3), 180, dtype=torch.uint8)
    found = network.normalise(raw)
    assert found.shape == (1, 3, 16, 16)
    expected = [(180 - 127.5) / 60, (180 - 120) / 61, (180 - 130) / 62]
    torch.testing.assert_close(found[0, :, 3, 5], torch.tensor(expected))


def test_input_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(B, 16, 16, 3\), got \(2, 3, 16, 16\)"):
        GroupingNetwork(image_spec())(torch.zeros(2, 3, 16, 16))


def test_input_of_any_size_has_complete_maps():
    spec = NetworkSpec(
        InputSpec("image", (13, 11, 3)), samples.DENSE[:1], EncoderSpec("convnet", 0, {"widths": [4, 4]}), 2
    )
    assert GroupingNetwork(spec).eval()(torch.zeros(2, 13, 11, 3))["segments"].shape == (2, 4, 13, 11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ()}, "at least one task"),
        ({"tasks": (SAMPLEWISE[0], SAMPLEWISE[0])}, "unique, got smiling"),
        ({"tasks": samples.DENSE[:1]}, "'segments' is dense, but encoder mlp has no feature map"),
        ({"groups": 0}, "groups must be a whole number of at least 1, got 0"),
        ({"sampling": "hard"}, "unknown sampling 'hard'"),
        ({"initial": "zeros"}, "unknown initial logits 'zeros'"),
        ({"encoder": EncoderSpec("transformer")}, "unknown encoder 'transformer'"),
        ({"encoder": EncoderSpec("convnet")}, "convnet reads image input, got features"),
    ],
)
def test_parts_that_do_not_fit_are_refused(options, message):
    parts = {"input": samples.FEATURES, "tasks": SAMPLEWISE, "encoder": EncoderSpec("mlp"), "groups": 3} | options
    with pytest.raises(ValueError, match=message):
        GroupingNetwork(NetworkSpec(**parts))


@pytest.mark.parametrize("spec", [mlp_spec(stem=1), image_spec()], ids=["mlp", "convnet"])
def test_json_round_trip_gives_an_equal_spec(spec):
    assert NetworkSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_group_model_is_independent_of_its_network():
    network = assigned(GroupingNetwork(mlp_spec()), [n % 2 for n in range(10)]).eval()
    inputs = samples.batch(network.spec.input, network.tasks).inputs
    models = network.specialise()
    before = {name: model(inputs) for name, model in models.items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    for name, model in models.items():
        assert all(torch.equal(value, before[name][task]) for task, value in model(inputs).items())
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in network.parameters())


def test_a_group_model_predicts_in_raw_units():
    network = assigned(GroupingNetwork(image_spec()), [0] * len(MIXED)).eval()
    batch = samples.batch(network.spec.input, network.tasks)
    (model,) = network.specialise().values()
    outputs, predictions = model(batch.inputs), model.predict(batch.inputs)
    assert predictions["age"].tolist() == pytest.approx((outputs["age"] * 15 + 40).tolist())
    assert predictions["segments"].shape == (5, 16, 16)
    assert predictions["normals"].shape == (5, 16, 16, 3)
    torch.testing.assert_close(predictions["colour"].sum(1), torch.ones(5))
    assert not any(value.requires_grad for value in predictions.values())


def test_a_clone_shares_nothing():
    network = assigned(GroupingNetwork(mlp_spec()), [0] * 10)
    network.prune(2.0)
    copied = clone(network)
    assert_same_tensors(samples.snapshot(copied), samples.snapshot(network))
    assert copied.pairs == network.pairs
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1.0)
    assert not any(torch.equal(a, b) for a, b in zip(copied.parameters(), network.parameters(), strict=True))


def test_each_pair_learns_from_its_own_task_only():
    spec = mlp_spec(SAMPLEWISE[:3])
    network = GroupingNetwork(spec)
    batch = samples.batch(spec.input, spec.tasks)
    outputs = pair_outputs(network, network.forward_pairs(batch.inputs))
    sample_loss(spec.tasks[1], outputs[2, 1], batch.targets["colour"]).sum().backward()
    touched = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name.split(".")[1] for name in touched if name.startswith("branches")} == {"2"}
    rows = network.bank.weights[2].grad.abs().sum(1) > 0
    assert rows.tolist() == [False, True, True, True, False]


def test_two_tasks_with_equal_options_keep_their_own_heads():
    tasks = tuple(Task(name, "binary") for name in "abc")
    network = assigned(GroupingNetwork(mlp_spec(tasks, groups=2)), [1, 0, 1]).eval()
    inputs = samples.batch(network.spec.input, tasks).inputs
    hard = network(inputs)
    assert len({tuple(value.tolist()) for value in hard.values()}) == 3
    found = {name: v for model in network.specialise().values() for name, v in model(inputs).items()}
    assert all(torch.equal(found[name], hard[name]) for name in "abc")
    assert copy.deepcopy(network).pairs == network.pairs
