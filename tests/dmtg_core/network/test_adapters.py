"""Branches as low-rank updates of frozen stages, and branches after a frozen stem."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dmtg_core import EncoderSpec, GroupingNetwork, InputSpec, NetworkSpec, Task, training_flops
from dmtg_core.network.adapters import AdapterBranch, AdapterOptions, SharedStages
from dmtg_core.network.cost import naive_flops, plain_attention, wide_spec
from dmtg_core.network.encoders import heads_alone
from dmtg_core.network.grouping_network import clone
from tests.dmtg_core.pretrained import changed

TOKENS = InputSpec("tokens", (12,), "int32", vocabulary=50)
TASKS = tuple(Task(f"task_{n}", "binary") for n in range(5))
OPTIONS = {"width": 32, "layers": 4, "heads": 4}


def spec_for(branch: str, groups: int = 3, **adapter) -> NetworkSpec:
    given = adapter if branch == "lora" else None
    return NetworkSpec(TOKENS, TASKS, EncoderSpec("text_transformer", 3, OPTIONS, branch, given), groups=groups)


def texts(rows: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (rows, 12), generator=generator)
    return ids.masked_fill(torch.arange(12) >= torch.arange(2, 2 + rows).unsqueeze(1), 0).int()


@pytest.mark.parametrize("groups", [1, 4])
def test_untrained_updates_change_nothing(groups):
    network = GroupingNetwork(spec_for("lora", groups, rank=4))
    alone = GroupingNetwork(replace(spec_for("lora"), encoder=heads_alone(network.spec.encoder), groups=1))
    with torch.no_grad(), plain_attention():  # fused layers have other rounding errors
        (expected,) = alone.features(texts()).values()
        for features in network.features(texts()).values():
            if groups == 1:
                assert torch.equal(features, expected)
            torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "adapter", [{"rank": 4}, {"rank": 3, "alpha": 1.0, "norms": True}, {"rank": 2, "targets": "linear1"}]
)
def test_one_pass_has_outputs_and_gradients_of_one_after_the_other(adapter):
    network = changed(GroupingNetwork(spec_for("lora", **adapter))).train()
    found = []
    for one_pass in (True, False):
        network.one_pass = one_pass
        network.zero_grad()
        rows = network.forward_pairs(texts()).rows
        (rows * torch.arange(rows.numel()).view_as(rows)).sum().backward()
        found.append([rows, *(p.grad.clone() for p in network.branches.parameters() if p.grad is not None)])
    assert len(found[0]) == 1 + sum(1 for _ in network.branches.parameters())
    for together, apart in zip(*found, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_only_branches_and_heads_have_gradients(recompute):
    network = changed(GroupingNetwork(spec_for("lora", rank=4))).train()
    network.recompute = recompute
    network.forward_pairs(texts()).rows.square().sum().backward()
    trained = {name.partition(".")[0] for name, p in network.named_parameters() if p.grad is not None}
    assert trained == {"branches", "bank"}


def test_frozen_stages_stay_in_evaluation_mode():
    encoder = EncoderSpec("text_transformer", 2, OPTIONS | {"dropout": 0.5}, "lora", {"rank": 2, "dropout": 0.5})
    network = GroupingNetwork(replace(spec_for("lora"), encoder=encoder)).train()
    dropping = {name for name, m in network.named_modules() if isinstance(m, nn.Dropout) and m.training and m.p}
    assert dropping
    assert all(
        (name.startswith("shared.") and name.endswith("linear1.dropout")) or "linear2.dropout" in name
        for name in dropping
    )
    network.eval()
    assert not any(m.training for m in network.modules())


@pytest.mark.parametrize("branch", ["lora", "last"])
def test_copies_and_models_of_groups_share_the_frozen_weights(branch):
    network = changed(GroupingNetwork(spec_for(branch))).eval()
    copied = clone(network)
    models = network.specialise()
    for other in (copied, *(model.network for model in models.values())):
        assert other.stem is network.stem
        assert other.shared is network.shared
        assert other.branches[0] is not network.branches[0]
    expected = network(texts())
    for model in models.values():
        for name, out in model(texts()).items():
            torch.testing.assert_close(out, expected[name], rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # a change of the copy does not change the network
        for parameter in copied.branches.parameters():
            parameter.zero_()
    torch.testing.assert_close(network(texts()), expected)


def test_a_branch_without_heads_is_not_computed():
    network = changed(GroupingNetwork(spec_for("lora"))).eval()
    before = training_flops(network)
    alive = torch.zeros_like(network.gate.alive)
    alive[:, 1] = True
    network.keep(alive)
    assert list(network.branches) == [1]
    assert 2 * training_flops(network) < before


def test_branches_of_last_start_equal():
    network = GroupingNetwork(spec_for("last"))
    first, *others = [branch.state_dict() for branch in network.branches.values()]
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


def test_the_wide_alternative_has_the_trained_parameters_of_all_branches():
    spec = spec_for("lora", groups=4, rank=3)
    network, wide = GroupingNetwork(spec), GroupingNetwork(wide_spec(spec))

    def trained(one: GroupingNetwork) -> int:
        return sum(p.numel() for p in one.branches.parameters())

    assert trained(wide) == trained(network)
    assert {branch.scale for branch in network.branches.values()} == {16 / 3}
    assert {branch.scale for branch in wide.branches.values()} == {16 / 12}


def test_a_frozen_layer_costs_less_in_training():
    """By hand: a frozen stem has one product of each kind, frozen layers two, and what is trained has three."""
    spec = NetworkSpec(
        InputSpec("features", (10,)), TASKS[:1],
        EncoderSpec("mlp", 1, {"widths": [20, 30]}, "lora", {"rank": 2}), groups=2,
    )  # fmt: skip
    stem, layer, update, head = 2 * 10 * 20, 2 * 20 * 30, 2 * 2 * (20 + 30), 2 * 30
    assert training_flops(GroupingNetwork(spec)) == stem + 2 * (2 * layer + 3 * update + 3 * head)
    assert naive_flops(spec) == stem + 2 * layer + 3 * update + 3 * head
    alone = replace(spec, groups=1, encoder=heads_alone(spec.encoder))
    assert training_flops(GroupingNetwork(alone)) == stem + layer + 3 * head
    whole = replace(spec, encoder=EncoderSpec("mlp", 1, {"widths": [20, 30]}))
    assert training_flops(GroupingNetwork(whole)) == 3 * (stem + 2 * (layer + head))


@pytest.mark.parametrize(
    ("branch", "stem", "adapter", "message"),
    [
        ("lora", 0, {"rank": 2}, "needs a stem"),
        ("last", 0, None, "needs a stem"),
        ("adapter", 1, None, "unknown branch 'adapter', expected one of copy, last, lora"),
        ("copy", 1, {"rank": 2}, "need branch 'lora'"),
        ("lora", 1, {"ranks": 2}, "no option 'ranks', its options are: rank"),
        ("lora", 1, {"rank": -1}, "rank must be a whole number"),
        ("lora", 1, {"alpha": 0}, "alpha must be positive"),
        ("lora", 1, {"dropout": 1.0}, "dropout must be in"),
        ("lora", 1, {"targets": ["query"]}, "no layer is a target .*linear layers are"),
    ],
)
def test_bad_options_are_explained(branch, stem, adapter, message):
    with pytest.raises(ValueError, match=message):
        GroupingNetwork(
            NetworkSpec(TOKENS, TASKS, EncoderSpec("text_transformer", stem, OPTIONS, branch, adapter), groups=2)
        )


def test_layer_norms_that_cannot_be_trained_are_refused():
    encoder = EncoderSpec("mlp", 1, {"widths": [8, 8]}, "lora", {"rank": 2, "norms": True})
    with pytest.raises(ValueError, match="no layer norm with a weight and a bias"):
        GroupingNetwork(NetworkSpec(InputSpec("features", (4,)), TASKS, encoder, groups=2))


def test_options_go_through_json():
    encoder = EncoderSpec("text_transformer", 2, OPTIONS, "lora", {"rank": 4, "targets": ["linear1"]})
    assert GroupingNetwork(NetworkSpec(TOKENS, TASKS, encoder, groups=2)).shared is not None
    again = EncoderSpec(**encoder.to_dict())
    assert AdapterOptions.of(again.adapter) == AdapterOptions(4, targets=("linear1",))
    assert EncoderSpec("mlp", 1).to_dict() == {"name": "mlp", "stem": 1, "options": {}}


class Stages(nn.Module):
    """A linear layer and a 1×1 convolution, for a comparison with PEFT."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 10, 1)
        self.linear = nn.Linear(10, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize(("rank", "alpha"), [(1, 16.0), (5, 3.0)])
def test_outputs_are_those_of_peft(rank, alpha):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours, theirs = Stages(), Stages()
    theirs.load_state_dict(ours.state_dict())
    options = AdapterOptions(rank, alpha)
    x = torch.randn(4, 6, 5, 3)
    shared = SharedStages([ours], options, x)
    branches = [AdapterBranch(shared, options) for _ in range(3)]
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["conv", "linear"], lora_dropout=0.0)
    peft.inject_adapter_in_model(config, theirs)
    for branch in branches:
        nn.init.normal_(branch.updates[0].b), nn.init.normal_(branch.updates[1].b)
    for branch, found in zip(branches, shared(x, branches), strict=True):
        with torch.no_grad():
            for layer, update in zip((theirs.conv, theirs.linear), branch.updates, strict=True):
                layer.lora_A["default"].weight.copy_(update.a.view_as(layer.lora_A["default"].weight))
                layer.lora_B["default"].weight.copy_(update.b.view_as(layer.lora_B["default"].weight))
        torch.testing.assert_close(found, theirs(x), rtol=1e-5, atol=1e-5)
