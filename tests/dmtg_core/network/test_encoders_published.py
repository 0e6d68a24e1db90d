"""Published encoders: operations and parameters are those of the publications."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from dmtg_core import EncoderSpec, GroupGate, GroupingNetwork, InputSpec, NetworkSpec, Task
from dmtg_core.network.decoders import XceptionDecoder
from dmtg_core.network.encoders import Features, build_encoder
from dmtg_core.network.grouping_network import clone
from tests.dmtg_core.samples import assigned

PIXELS = 256
# GFLOP (two for each multiply-add) of stem and branch at 256×256 by the number of shared layers
XCEPTION_COST = {2: (0.63, 12.36), 3: (2.10, 10.89), 6: (7.03, 5.96), 9: (9.50, 3.49)}
DECODER_COST = 2.47  # of 18 classes, the most expensive task
WIDTHS = [32, 64, 128, 256, *[728] * 9]


def gflop(run, *inputs) -> float:
    """Operations of `run` on `inputs`, counted by torch, in 10⁹."""
    with FlopCounterMode(display=False) as counter:
        run(*inputs)
    return counter.get_total_flops() / 1e9


def meta(name: str, stem: int, size: int = PIXELS, **options):
    """Stem, branch and features of an encoder on the meta device, and an image for it."""
    spec = InputSpec("image", (size, size, 3))
    with torch.device("meta"):
        stem, (branch,), features, _ = build_encoder(EncoderSpec(name, stem, options), spec, 1, 0)
        return stem, branch, features, torch.zeros(1, 3, size, size)


def parameters(*parts: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for part in parts for p in part.parameters())


@pytest.mark.parametrize("layers", XCEPTION_COST)
def test_the_cost_of_xception_is_that_of_the_reference_table(layers):
    stem, branch, features, image = meta("xception_taskonomy", layers)
    assert features == Features(512, 16)
    found = gflop(stem, image), gflop(branch, stem(image))
    assert found == pytest.approx(XCEPTION_COST[layers], abs=0.005)


def test_the_cost_of_the_published_decoder_is_that_of_the_reference_table():
    with torch.device("meta"):
        decoder, features = XceptionDecoder(512, 18, 16), torch.zeros(1, 512, 16, 16)
    assert gflop(decoder, features, (PIXELS, PIXELS)) == pytest.approx(DECODER_COST, abs=0.005)
    encoder = sum(XCEPTION_COST[6])
    assert encoder + 5 * DECODER_COST == pytest.approx(25.3, abs=0.05)


def test_the_cost_of_a_network_is_that_of_the_reference_table_before_and_after_pruning():
    tasks = tuple(Task(name, "dense_classification", 18) for name in "abcde")
    spec = InputSpec("image", (PIXELS, PIXELS, 3), "uint8")
    encoder = EncoderSpec("xception_taskonomy", 6)
    with torch.device("meta"):
        network = GroupingNetwork(NetworkSpec(spec, tasks, encoder, 3, decoder="xception", decoder_width=128))
        image = torch.zeros(1, *spec.shape)
    network.gate = GroupGate(len(tasks), 3)  # pruning reads it
    pruned = clone(assigned(network, [0, 1, 2, 0, 1]))
    pruned.prune(2.0)
    costs = [gflop(net.forward_pairs, image) for net in (network, pruned)]
    assert costs == pytest.approx([61.9, 37.2], abs=0.05)


def separable(inputs: int, outputs: int) -> int:
    """Parameters of a 3×3 convolution of each channel, a 1×1 convolution, and a batch norm."""
    return 9 * inputs + inputs * outputs + 2 * outputs


def block(inputs: int, outputs: int) -> int:
    """Parameters of a block by its description."""
    if inputs == outputs:
        return 3 * separable(outputs, outputs)
    halving, shortcut = 4 * outputs * outputs + outputs, inputs * outputs + 2 * outputs
    return separable(inputs, outputs) + separable(outputs, outputs) + halving + shortcut


@pytest.mark.parametrize("layers", [0, 2, 3, 6, 9, 13])
def test_xception_has_the_parameters_of_its_description(layers):
    counts = [27 * 32 + 2 * 32, 9 * 32 * 64 + 2 * 64]
    counts += [block(a, b) for a, b in pairwise(WIDTHS[1:])]
    stem, branch, _, _ = meta("xception_taskonomy", layers)
    assert parameters(stem) == sum(counts[:layers])
    assert parameters(branch) == sum(counts[layers:]) + separable(728, 512)


def test_the_half_size_networks_are_a_choice_of_widths():
    _, branch, features, image = meta("xception_taskonomy", 0, widths=[24, 48, 96, 192, *[512] * 9])
    whole = gflop(meta("xception_taskonomy", 0)[1], image)
    assert features == Features(512, 16)
    assert 0.4 < gflop(branch, image) / whole < 0.6


def test_the_initialisation_of_xception_keeps_the_variance_of_activations():
    stages = EncoderSpec("xception_taskonomy").stages(InputSpec("image", (16, 16, 3)))
    depthwise, pointwise = stages[8].body[1], stages[8].body[2]
    assert depthwise.weight.std().item() == pytest.approx((2 / (9 * 728)) ** 0.5, rel=0.05)
    assert pointwise.weight.std().item() == pytest.approx((2 / 728) ** 0.5, rel=0.05)


def test_the_network_for_celeba_is_one_residual_block_of_64_channels():
    stem, branch, features, image = meta("celeba_resnet", 1, 64)
    assert features == Features(14400, 0)
    assert stem(image).shape == (1, 64, 31, 31)
    assert parameters(stem) == 27 * 64 + 2 * 64
    assert parameters(branch) == 2 * (9 * 64 * 64 + 2 * 64)
    assert gflop(stem, image) == pytest.approx(2 * 27 * 64 * 64**2 / 1e9)
    assert gflop(branch, stem(image)) == pytest.approx(2 * 2 * 9 * 64 * 64 * 31**2 / 1e9)


@pytest.mark.parametrize("blocks", [0, 6])
def test_vit_b_16_has_the_operations_and_parameters_of_its_description(blocks):
    stem, branch, features, image = meta("vit_b_16", blocks + 1)
    tokens, width = 1 + (PIXELS // 16) ** 2, 768
    assert len(stem) + len(branch) == 13
    assert features == Features(width, 16)
    assert branch(stem(image)).shape == (1, width, 16, 16)
    embedding = 3 * 16 * 16 * width
    linear = 12 * width * width  # query, key, value and output, and a hidden layer of four times the width
    attention = 2 * tokens * width
    assert gflop(stem, image) == pytest.approx(
        2 * ((tokens - 1) * embedding + blocks * tokens * (linear + attention)) / 1e9
    )
    assert gflop(branch, stem(image)) == pytest.approx(2 * (12 - blocks) * tokens * (linear + attention) / 1e9)
    with torch.device("meta"):
        whole = models.vit_b_16()
    positions = (tokens - whole.seq_length) * width
    assert parameters(stem, branch) == parameters(whole) - parameters(whole.heads) + positions


def small_vit(size: int) -> models.VisionTransformer:
    """A small transformer of torchvision with random weights instead of trained ones."""
    torch.manual_seed(0)
    net = models.VisionTransformer(
        image_size=size, patch_size=16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=32, num_classes=3
    )
    nn.init.normal_(net.class_token)
    return net.eval()


def with_weights(monkeypatch, size: int, wanted: tuple[int, int]):
    """A pretrained small transformer, and its stages for images of another size."""
    net = small_vit(size)
    monkeypatch.setattr(models, "vit_b_16", lambda weights: small_vit(size) if weights == "LOCAL" else None)
    stages = EncoderSpec("vit_b_16", 0, {"weights": "LOCAL"}).stages(InputSpec("image", (*wanted, 3)))
    return net, nn.Sequential(*stages).eval()


@torch.no_grad()
def test_pretrained_vit_returns_the_tokens_of_torchvision_without_the_class_token(monkeypatch):
    net, stages = with_weights(monkeypatch, 48, (48, 48))
    x = torch.randn(2, 3, 48, 48)
    tokens = {}
    net.encoder.register_forward_hook(lambda module, inputs, out: tokens.update(all=out))
    net(x)
    expected = tokens["all"][:, 1:].transpose(1, 2).reshape(2, 8, 3, 3)
    torch.testing.assert_close(stages(x), expected)


@torch.no_grad()
def test_pretrained_positions_are_interpolated_to_the_size_of_the_input(monkeypatch):
    net, stages = with_weights(monkeypatch, 64, (128, 96))
    positions, trained = stages[0].positions, net.encoder.pos_embedding
    assert positions.shape == (1, 1 + 8 * 6, 8)
    assert torch.equal(positions[:, 0], trained[:, 0])
    fine, coarse = positions[0, 1:].reshape(8, 6, 8), trained[0, 1:].reshape(4, 4, 8)
    halves = nn.functional.avg_pool2d(fine.permute(2, 0, 1), (4, 3)).flatten()
    wanted = nn.functional.avg_pool2d(coarse.permute(2, 0, 1), 2).flatten()
    assert torch.corrcoef(torch.stack([halves, wanted]))[0, 1] > 0.95
    assert stages(torch.randn(1, 3, 128, 96)).shape == (1, 8, 8, 6)
