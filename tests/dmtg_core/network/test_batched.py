"""K branches in one pass: the results, gradients and running statistics of one after the other."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dmtg_core import EncoderSpec, GroupingNetwork, InputSpec, NetworkSpec
from dmtg_core.network.batched.branches import BatchedBranches
from dmtg_core.network.batched.choice import features_of_stem
from dmtg_core.network.batched.layers import NotBatchableError
from tests.dmtg_core import samples
from tests.dmtg_core.samples import FEATURES, IMAGE, SAMPLEWISE

TOKENS = InputSpec("tokens", (7,), "int32", vocabulary=20)
SPECS = {
    "mlp": (FEATURES, EncoderSpec("mlp", 0, {"widths": [8, 4]}), 3),
    "mlp_stem": (FEATURES, EncoderSpec("mlp", 1, {"widths": [8, 8, 4]}), 2),
    "mlp_twelve": (FEATURES, EncoderSpec("mlp", 0, {"widths": [8, 4]}), 12),
    "convnet": (IMAGE, EncoderSpec("convnet", 0, {"widths": [6, 8]}), 3),
    "convnet_stem": (IMAGE, EncoderSpec("convnet", 1, {"widths": [6, 6, 8], "dense_stride": 2}), 3),
    "celeba": (IMAGE, EncoderSpec("celeba_resnet", 0, {"width": 4}), 3),
    "celeba_twelve": (IMAGE, EncoderSpec("celeba_resnet", 1, {"width": 4}), 12),
    "resnet18": (replace(IMAGE, shape=(32, 32, 3)), EncoderSpec("resnet18", 4), 2),
    "xception": (
        replace(IMAGE, shape=(32, 32, 3)),
        EncoderSpec("xception_taskonomy", 4, {"widths": [16, 16, 16, 16, *[32] * 9], "features": 8}),
        3,
    ),
    "vit": (IMAGE, EncoderSpec("vit", 1, {"patch": 4, "width": 12, "layers": 2}), 3),
    "text": (TOKENS, EncoderSpec("text_transformer", 1, {"width": 8, "layers": 2, "heads": 2}), 3),
    "bag": (TOKENS, EncoderSpec("embedding_bag", 1, {"widths": [8, 4]}), 3),
}


def network_of(name: str) -> GroupingNetwork:
    """A network in training whose weights, statistics included, are all different."""
    spec, encoder, groups = SPECS[name]
    network = GroupingNetwork(NetworkSpec(spec, SAMPLEWISE[:3], encoder, groups)).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in [*network.branches.parameters(), *network.branches.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand(tensor.shape, generator=generator))
    return network


def inputs_of(spec: InputSpec, rows: int = 5) -> torch.Tensor:
    """Stored inputs; token ids have padding."""
    if spec.kind == "tokens":
        return torch.randint(0, spec.vocabulary, (rows, *spec.shape), generator=torch.Generator().manual_seed(1))
    return samples.batch(spec, SAMPLEWISE[:1], rows).inputs


def batch(network: GroupingNetwork) -> BatchedBranches:
    """The batched branches of a network."""
    return BatchedBranches(dict(network.branches.items()), features_of_stem(network))


def passed(network: GroupingNetwork, raw: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features, gradients and state after a forward and a backward pass."""
    features = network.features(raw)
    weights = {k: torch.linspace(-1, 1 + k, f.numel()).view(f.shape) for k, f in features.items()}
    sum((f * weights[k]).sum() for k, f in features.items()).backward()
    return (
        {f"features {k}": f.detach() for k, f in features.items()}
        | {f"gradient {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
        | samples.snapshot(network)
    )


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Assert equal names, and tensors that differ by rounding errors of float32."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name].double() - value.double()).norm())
        # the gradient of a bias before a batch norm is 0 apart from rounding errors; those of a gradient through
        # three convolutions were up to 1.3e-5 of its norm on one processor
        assert error <= 2e-5 * max(float(value.double().norm()), 1e-2), (name, error, float(value.double().norm()))


@pytest.mark.parametrize("name", SPECS)
def test_one_pass_has_features_gradients_and_statistics_of_each_branch(name):
    network = network_of(name)
    raw = inputs_of(network.spec.input)
    twin = copy.deepcopy(network)
    network.batched = batch(network)
    found, expected = passed(network, raw), passed(twin, raw)
    assert sum(key.startswith("gradient") for key in expected) >= len(list(network.branches.parameters()))
    assert_close(found, expected)


class Count(TorchDispatchMode):
    """Counts dispatched operators."""

    total = 0

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        self.total += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "share"), [("mlp_twelve", 0.4), ("convnet", 0.7), ("vit", 0.6), ("text", 0.6)])
def test_one_pass_dispatches_fewer_operators(name, share):
    counts = []
    for batched in (False, True):
        network = network_of(name)
        network.batched = batch(network) if batched else None
        raw = inputs_of(network.spec.input)
        with Count() as count:
            sum(f.sum() for f in network.features(raw).values()).backward()
        counts.append(count.total)
    assert counts[1] < share * counts[0]


def test_two_passes_before_a_backward_pass_and_a_change_in_between():
    network, raw = network_of("mlp"), inputs_of(FEATURES)
    network.batched = batch(network)
    twice = [sum(f.sum() for f in network.features(raw).values()) for _ in range(2)]
    (twice[0] + twice[1]).backward()
    both = [p.grad.clone() for p in network.branches.parameters()]
    network.zero_grad()
    loss = sum(f.sum() for f in network.features(raw).values())
    loss.backward(retain_graph=True)
    for found, p in zip(both, network.branches.parameters(), strict=True):
        torch.testing.assert_close(found, 2 * p.grad)
    with torch.no_grad():
        next(iter(network.branches.parameters())).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_evaluation_and_single_branches_do_not_use_the_pass():
    network, raw = network_of("convnet"), inputs_of(IMAGE)
    network.batched = lambda _shared: pytest.fail("the pass was used")
    network.features(raw, [0])
    network.eval().features(raw)


def test_a_copy_has_no_pass_and_removing_a_branch_ends_it():
    network = network_of("mlp")
    network.batched = batch(network)
    assert copy.deepcopy(network).batched is None
    alive = torch.ones(3, 3, dtype=torch.bool)
    alive[0, 1] = False
    network.keep(alive)
    assert network.batched is not None
    alive[:, 1] = False
    network.keep(alive)
    assert network.batched is None


def test_frozen_parameters_have_no_gradient():
    network, raw = network_of("convnet"), inputs_of(IMAGE)
    for branch in network.branches.values():
        branch[0].requires_grad_(False)
    twin = copy.deepcopy(network)
    network.batched = batch(network)
    assert_close(passed(network, raw), passed(twin, raw))


# --- other layers, and those that are refused


class Mixing(nn.Module):
    """A module that mixes channels."""

    def forward(self, x):
        return x + x.mean(1, keepdim=True)


def branches_of(*layers: nn.Module, count: int = 3) -> dict[int, nn.Module]:
    """Branches of the same layers with other weights."""
    torch.manual_seed(5)
    first = nn.Sequential(*layers)
    found = {k: copy.deepcopy(first) for k in range(count)}
    for branch in found.values():
        for parameter in branch.parameters():
            nn.init.uniform_(parameter, -1, 1)
    return found


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Linear(6, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 2, bias=False)), (5, 6)),
        ((nn.BatchNorm1d(6), nn.Linear(6, 4)), (5, 6)),
        ((nn.LayerNorm(6), nn.Linear(6, 4), nn.LayerNorm(4, bias=False)), (5, 6)),
        ((nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2)),
         (5, 3, 8, 8)),
        ((nn.Conv2d(4, 8, 3, groups=2), nn.PixelShuffle(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (5, 4, 8, 8)),
        ((nn.Linear(6, 4), nn.Dropout(0.0), nn.LayerNorm(4)), (5, 3, 6)),
    ],
)  # fmt: skip
def test_further_layers(layers, shape):
    branches = branches_of(*layers)
    expected = copy.deepcopy(branches)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    found = BatchedBranches(branches, x[:3])(x)
    for k, branch in expected.items():
        out = branch(x)
        torch.testing.assert_close(found[k], out, rtol=1e-5, atol=1e-5)
        out.square().sum().backward()
    sum(value.square().sum() for value in found.values()).backward()
    for k, branch in expected.items():
        for mine, theirs in zip(branches[k].parameters(), branch.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(branches[k].buffers(), branch.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((nn.Linear(6, 4), nn.Dropout(0.1)), r"Dropout \(1\) draws random numbers"),
        ((nn.Linear(6, 4), nn.RReLU()), "the outputs of its code differ"),
        ((nn.Linear(6, 4), nn.Bilinear(4, 4, 2)), r"Bilinear \(1\) has no form"),
        ((nn.Linear(6, 4), nn.PReLU()), r"PReLU \(1\) has no form"),
        ((nn.BatchNorm1d(6, momentum=None),), "BatchNorm1d .*without a momentum"),
    ],
)
def test_layers_that_do_not_fit_one_pass_are_named(layers, reason):
    with pytest.raises(NotBatchableError, match=reason):
        BatchedBranches(branches_of(*layers), torch.randn(3, 6))


def test_code_that_mixes_channels_is_found_by_the_trial():
    with pytest.raises(NotBatchableError, match="differ"):
        BatchedBranches(branches_of(nn.Conv2d(3, 4, 1), Mixing()), torch.randn(3, 3, 4, 4))


def test_branches_of_other_shapes_and_a_single_branch_are_refused():
    sample = torch.randn(3, 6)
    with pytest.raises(NotBatchableError, match="differ in shape"):
        BatchedBranches({0: nn.Sequential(nn.Linear(6, 4)), 1: nn.Sequential(nn.Linear(6, 5))}, sample)
    with pytest.raises(NotBatchableError, match="differ in shape"):
        BatchedBranches({0: nn.Sequential(nn.GELU()), 1: nn.Sequential(nn.ReLU())}, sample)
    with pytest.raises(NotBatchableError, match="one branch"):
        BatchedBranches({0: nn.Linear(6, 4)}, sample)


def test_a_trial_changes_neither_branches_nor_random_state():
    network = network_of("convnet")
    before, state = samples.snapshot(network), torch.get_rng_state()
    batch(network)
    samples.assert_same_tensors(samples.snapshot(network), before)
    assert torch.equal(torch.get_rng_state(), state)
