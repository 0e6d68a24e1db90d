"""Decoders: each returns a map of the input's size."""

import pytest
import torch
from torch import nn

from dmtg_core import EncoderSpec, GroupingNetwork, NetworkSpec
from dmtg_core.network.decoders import DECODERS, DenseDecoder, Doubling, XceptionDecoder
from tests.dmtg_core import samples
from tests.dmtg_core.samples import assigned, image_spec

every_decoder = pytest.mark.parametrize("name", DECODERS)


@every_decoder
@pytest.mark.parametrize("stride", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(16, 16), (24, 8), (13, 10)])
def test_a_decoder_returns_a_map_of_the_size_of_the_input(name, stride, size):
    decoder = DECODERS[name](6, 3, stride, 8)
    coarse = torch.randn(2, 6, -(-size[0] // stride), -(-size[1] // stride))
    assert decoder(coarse, size).shape == (2, 3, *size)


@every_decoder
@pytest.mark.parametrize("stride", [1, 2, 4, 32])
def test_a_decoder_upsamples_by_the_stride(name, stride):
    decoder = DECODERS[name](4, 1, stride, 8).eval()
    assert decoder.body(torch.zeros(1, 4, 2, 3)).shape == (1, 1, 2 * stride, 3 * stride)


@every_decoder
@pytest.mark.parametrize("stride", [1, 16])
def test_gradients_reach_every_parameter(name, stride):
    torch.manual_seed(0)
    decoder = DECODERS[name](4, 2, stride, 16)
    decoder(torch.randn(3, 4, 2, 2), (2 * stride, 2 * stride)).square().sum().backward()
    assert [n for n, p in decoder.named_parameters() if not p.grad.any()] == []


@every_decoder
def test_a_decoder_keeps_positions(name):
    torch.manual_seed(0)
    decoder = DECODERS[name](1, 1, 4, 8).eval()
    blank, spot = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    spot[0, 0, 1, 6] = 5.0
    with torch.no_grad():
        change = (decoder(spot, (32, 32)) - decoder(blank, (32, 32))).abs()[0, 0]
    y, x = divmod(int(change.argmax()), 32)
    assert abs(y - 5.5) < 8
    assert abs(x - 25.5) < 8
    assert change[24:, :8].max() == 0


def test_the_published_decoder_has_the_widths_of_its_description():
    def conv(inputs, outputs):
        return 9 * inputs * outputs

    ups = [(512, 128), (128, 64), (64, 48), (48, 32)]
    expected = sum(4 * a * b + 2 * b for a, b in ups)  # transposed 2×2 convolutions with batch norm
    expected += sum(conv(b, b) + 2 * b for _, b in ups[:-1]) + conv(32, 3) + 3
    assert sum(p.numel() for p in XceptionDecoder(512, 3, 16).parameters()) == expected
    double = [m.weight.shape[1] for m in XceptionDecoder(512, 3, 32, 256).body if type(m).__name__ == "Doubling"]
    assert double == [256, 128, 96, 64, 64]


def test_a_network_has_the_decoder_of_its_spec():
    chosen = {name: GroupingNetwork(image_spec(samples.DENSE, decoder=name)) for name in DECODERS}
    assert {type(d) for d in chosen["subpixel"].decoders.values()} == {DenseDecoder}
    assert {type(d) for d in chosen["xception"].decoders.values()} == {XceptionDecoder}
    network = assigned(chosen["xception"], [0, 1, 0, 1]).eval()
    batch = samples.batch(network.spec.input, network.tasks)
    hard = network(batch.inputs)
    for model in network.specialise().values():
        assert model.spec.decoder == "xception"
        assert all(torch.equal(value, hard[name]) for name, value in model(batch.inputs).items())


def test_a_spec_stores_its_decoder_and_specs_without_one_can_be_loaded():
    spec = image_spec(samples.DENSE, decoder="xception")
    stored = spec.to_dict()
    assert NetworkSpec.from_dict(stored) == spec
    del stored["decoder"]
    assert NetworkSpec.from_dict(stored) == image_spec(samples.DENSE)
    assert GroupingNetwork(NetworkSpec.from_dict(stored)).state_dict().keys() == (
        GroupingNetwork(image_spec(samples.DENSE)).state_dict().keys()
    )


def test_an_unknown_decoder_is_refused():
    with pytest.raises(ValueError, match="unknown decoder 'unet', expected one of subpixel, xception"):
        NetworkSpec(samples.IMAGE, samples.DENSE, EncoderSpec("convnet"), 2, decoder="unet")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_doubling_is_the_transposed_convolution(memory_format):
    ours, plain = Doubling(5, 3), nn.ConvTranspose2d(5, 3, 2, stride=2, bias=False)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 4, 6).to(memory_format=memory_format)
    found = ours(x)
    torch.testing.assert_close(found, plain(x))
    assert found.is_contiguous(memory_format=torch.channels_last)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((m(x) * weight).sum(), m.weight)[0] for m in (ours, plain)]
    torch.testing.assert_close(*gradients)
    torch.manual_seed(0)
    first = Doubling(5, 3)
    torch.manual_seed(0)
    assert torch.equal(first.weight, nn.ConvTranspose2d(5, 3, 2, stride=2, bias=False).weight)
