"""Encoders: every one, at every cut, gives what the network builds on."""

import pytest
import torch

from dmtg_core import ENCODERS, EncoderSpec, InputSpec
from dmtg_core.encoders import Features, build_encoder, convnet, seeded

SHAPES = {"features": InputSpec("features", (6,)), "image": InputSpec("image", (32, 32, 3), "uint8")}
STAGES = {"mlp": 2, "convnet": 3, "resnet18": 5, "resnet34": 5, "resnet50": 5}
CUTS = [(name, stem) for name, stages in STAGES.items() for stem in range(stages)]


def inputs_for(name: str, rows: int = 2) -> torch.Tensor:
    """Network input for an encoder."""
    shape = (rows, 3, 32, 32) if ENCODERS[name][1] == "image" else (rows, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def build(name: str, stem: int = 0, groups: int = 1, seed: int = 0, **options):
    """Stem, branches and features."""
    return build_encoder(EncoderSpec(name, stem, options), SHAPES[ENCODERS[name][1]], groups, seed)


def test_every_encoder_is_tested():
    assert STAGES.keys() == ENCODERS.keys()


@pytest.mark.parametrize("name", ENCODERS)
def test_a_cut_moves_stages_between_stem_and_branch_and_changes_nothing_else(name):
    x = inputs_for(name)
    outputs, parameters = [], []
    for cut in sorted({0, 1, STAGES[name] - 1}):
        stem, (branch,), features = build(name, cut)
        assert len(stem) == cut
        assert len(stem) + len(branch) == STAGES[name]
        with torch.no_grad():
            outputs.append(branch.eval()(stem.eval()(x)))
        parameters.append(sum(p.numel() for part in (stem, branch) for p in part.parameters()))
        assert features.channels == outputs[-1].shape[1]
        assert features.stride == (32 // outputs[-1].shape[2] if outputs[-1].dim() == 4 else 0)
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    assert len(set(parameters)) == 1


@pytest.mark.parametrize(("name", "stem"), [(n, s) for n, s in CUTS if not n.startswith("resnet")])
def test_branches_start_different_and_are_repeated_by_the_seed(name, stem):
    _, branches, _ = build(name, stem, groups=3, seed=5)
    _, again, _ = build(name, stem, groups=3, seed=5)
    _, other, _ = build(name, stem, groups=3, seed=6)
    weights = [[next(b.parameters()) for b in made] for made in (branches, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))
    first, second, third = weights[0]
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_building_leaves_the_random_state_of_the_caller(name):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build(name, groups=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_building_leaves_the_random_state_of_the_gpu():
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    build("mlp")
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_the_seed_holds_inside_and_the_outer_state_goes_on_after():
    torch.manual_seed(1)
    undisturbed = torch.rand(2)
    torch.manual_seed(1)
    with seeded(7):
        inside = torch.rand(1)
    assert torch.equal(torch.rand(2), undisturbed)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), inside)


@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_finding_the_shape_teaches_the_normalisation_nothing(name):
    stem, (branch,), _ = build(name, 1)
    for part in (stem, branch):
        for module in part.modules():
            assert module.training
            if isinstance(module, torch.nn.BatchNorm2d):
                assert module.num_batches_tracked == 0
                assert (module.running_mean == 0).all()
                assert (module.running_var == 1).all()


@pytest.mark.parametrize(("dense_stride", "stride"), [(0, 8), (1, 1), (2, 2), (4, 4), (8, 8), (16, 8)])
def test_dense_stride_limits_the_loss_of_resolution(dense_stride, stride):
    _, _, features = build("convnet", widths=[4, 5, 6], dense_stride=dense_stride)
    assert features == Features(6, stride)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_images_may_have_any_number_of_channels(name, channels):
    spec = InputSpec("image", (32, 32, channels))
    stem, (branch,), _ = build_encoder(EncoderSpec(name), spec, 1, 0)
    assert branch.eval()(stem(torch.zeros(1, channels, 32, 32))).shape[0] == 1


def test_a_residual_block_without_change_of_shape_adds_its_input():
    (stage,) = convnet(InputSpec("image", (8, 8, 4)), widths=[4], dense_stride=1)
    block = stage[0].eval()
    with torch.no_grad():
        block.body[-1].weight.zero_()
        x = torch.randn(2, 4, 8, 8)
        assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (EncoderSpec("vgg"), "unknown encoder 'vgg'.*mlp.*resnet50"),
        (EncoderSpec("convnet"), "convnet reads image input, got features"),
        (EncoderSpec("mlp", 2), "mlp.*0 to 1.*got 2"),
        (EncoderSpec("mlp", -1), "mlp.*0 to 1.*got -1"),
        (EncoderSpec("mlp", 0, {"depth": 3}), "mlp.*depth"),
    ],
)
def test_impossible_encoders_are_refused_with_what_was_found(spec, message):
    with pytest.raises(ValueError, match=message):
        spec.stages(SHAPES["features"])
