"""Encoders: the contract of each encoder with any stem."""

import subprocess
import sys

import pytest
import torch

from dmtg_core import ENCODERS, EncoderSpec, InputSpec
from dmtg_core.network.encoders import LIBRARIES, Features, build_encoder, seeded

LENGTH, VOCABULARY = 7, 20
TINY_BERT = {
    "model_type": "bert", "vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": LENGTH, "pad_token_id": 0,
}  # fmt: skip
SHAPES = {
    "features": InputSpec("features", (6,)),
    "image": InputSpec("image", (32, 32, 3), "uint8"),
    "tokens": InputSpec("tokens", (LENGTH,), "int32", vocabulary=VOCABULARY),
}
STAGES = {
    "mlp": 2, "tabm": 4, "convnet": 3, "resnet18": 5, "resnet34": 5, "resnet50": 5, "celeba_resnet": 2,
    "xception_taskonomy": 7, "vit": 4, "timm": 4, "embedding_bag": 3, "text_transformer": 4, "transformers": 3,
}  # fmt: skip
# small versions of encoders whose defaults are large
OPTIONS = {
    "xception_taskonomy": {"widths": [4, 6, 8, 10, 10, 12], "features": 5},
    "vit": {"patch": 8, "width": 12, "layers": 3, "heads": 2},
    "timm": {
        "model": "vit_tiny_patch16_224",
        "arguments": {"embed_dim": 8, "depth": 3, "num_heads": 2, "patch_size": 8},
    },
    "text_transformer": {"width": 8, "layers": 3, "heads": 2},
    "transformers": {"config": TINY_BERT},
}
# encoders of the tests of the network, with any stem
CUTS = [(n, s) for n in ("mlp", "convnet", "resnet18", "resnet34", "resnet50") for s in range(STAGES[n])]


def inputs_for(name: str, rows: int = 3) -> torch.Tensor:
    """Network input for an encoder. Texts end in padding."""
    generator = torch.Generator().manual_seed(0)
    if ENCODERS[name][1] == "tokens":
        ids = torch.randint(1, VOCABULARY, (rows, LENGTH), generator=generator)
        return ids.masked_fill(torch.arange(LENGTH) >= 3 + torch.arange(rows).unsqueeze(1), 0)
    return torch.randn((rows, 3, 32, 32) if ENCODERS[name][1] == "image" else (rows, 6), generator=generator)


def encoder(name: str, stem: int = 0, **options) -> EncoderSpec:
    """A small encoder of this name."""
    if name in LIBRARIES:
        pytest.importorskip(name)
    return EncoderSpec(name, stem, {**OPTIONS.get(name, {}), **options})


def build(name: str, stem: int = 0, groups: int = 1, seed: int = 0, **options):
    """Stem, branches and features."""
    return build_encoder(encoder(name, stem, **options), SHAPES[ENCODERS[name][1]], groups, seed)[:3]


def test_every_encoder_is_tested():
    # vit_b_16 is the tiny one with other sizes; test_encoders_published.py counts its operations
    assert {*STAGES, "vit_b_16"} == ENCODERS.keys()


@pytest.mark.parametrize("name", STAGES)
def test_the_size_of_the_stem_does_not_change_the_encoder(name):
    x = inputs_for(name)
    outputs, parameters = [], []
    cuts = range(STAGES[name]) if not name.startswith("resnet") else (0, 1, 4)
    for cut in cuts:
        stem, (branch,), features = build(name, cut)
        assert len(stem) == cut
        assert len(stem) + len(branch) == STAGES[name]
        with torch.no_grad():
            outputs.append(branch.eval()(stem.eval()(x)))
        parameters.append(sum(p.numel() for part in (stem, branch) for p in part.parameters()))
        assert features.channels == outputs[-1].shape[2 if features.members else 1]
        assert (outputs[-1].dim() == 3) == bool(features.members)
        assert features.stride == (32 // outputs[-1].shape[2] if outputs[-1].dim() == 4 else 0)
    assert outputs[0].std(0).max() > 0
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    assert len(set(parameters)) == 1


@pytest.mark.parametrize("name", [name for name in STAGES if not name.startswith("resnet")])
def test_branches_differ_and_are_reproducible_for_any_stem(name):
    for stem in range(STAGES[name]):
        made, again, other = (build(name, stem, groups=3, seed=seed)[1] for seed in (5, 5, 6))
        first, second, third = made
        for a, b, c in zip(made, again, other, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
            assert not all(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))
        for a, b in ((first, second), (second, third)):
            assert not all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", STAGES)
def test_gradients_reach_every_parameter(name):
    stem, (branch,), _ = build(name, 1)
    out = branch(stem(inputs_for(name, rows=4)))
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    # a softmax does not change when all its keys move together
    moved = [(n, p) for part in (stem, branch) for n, p in part.named_parameters() if "key.bias" not in n]
    assert [n for n, p in moved if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for _, p in moved)


@pytest.mark.parametrize("name", STAGES)
def test_in_evaluation_a_sample_does_not_depend_on_the_rest_of_the_batch(name):
    stem, (branch,), _ = build(name, 1)
    x = inputs_for(name)
    stem(x), branch(stem(x))
    stem.eval(), branch.eval()
    with torch.no_grad():
        together, again = branch(stem(x)), branch(stem(x))
        alone = torch.cat([branch(stem(row.unsqueeze(0))) for row in x])
    assert torch.equal(together, again)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "convnet", "vit", "text_transformer", "transformers"])
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


def test_the_seed_applies_inside_and_the_outer_state_is_restored():
    torch.manual_seed(1)
    undisturbed = torch.rand(2)
    torch.manual_seed(1)
    with seeded(7):
        inside = torch.rand(1)
    assert torch.equal(torch.rand(2), undisturbed)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), inside)


@pytest.mark.parametrize("name", ["convnet", "resnet18", "celeba_resnet", "xception_taskonomy"])
def test_the_probe_of_the_shape_does_not_change_running_statistics(name):
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
@pytest.mark.parametrize("name", ["convnet", "resnet18", "celeba_resnet", "xception_taskonomy", "vit"])
def test_images_may_have_any_number_of_channels(name, channels):
    spec = InputSpec("image", (32, 32, channels))
    stem, (branch,), *_ = build_encoder(encoder(name), spec, 1, 0)
    assert branch.eval()(stem(torch.zeros(1, channels, 32, 32))).shape[0] == 1


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("celeba_resnet", (64, 64), Features(14400, 0)),
        ("celeba_resnet", (5, 9), Features(128, 0)),
        ("xception_taskonomy", (48, 32), Features(5, 16)),
        ("xception_taskonomy", (33, 37), Features(5, 11)),
        ("xception_taskonomy", (1, 1), Features(5, 1)),
        ("vit", (24, 40), Features(12, 8)),
    ],
)
def test_images_may_have_any_size_that_the_encoder_can_read(name, size, features):
    _, (branch,), found, _ = build_encoder(encoder(name), InputSpec("image", (*size, 3)), 1, 0)
    assert found == features
    assert branch(torch.zeros(2, 3, *size)).shape[:2] == (2, features.channels)


@pytest.mark.parametrize(("name", "stage"), [("convnet", 0), ("celeba_resnet", 1), ("xception_taskonomy", 4)])
def test_a_residual_block_without_change_of_shape_adds_its_input(name, stage):
    options = {"widths": [4], "dense_stride": 1} if name == "convnet" else OPTIONS.get(name, {})
    block = EncoderSpec(name, 0, options).stages(InputSpec("image", (8, 8, 4)))[stage]
    block = (block if name == "xception_taskonomy" else block[0]).eval()
    norm = [m for m in block.body if isinstance(m, torch.nn.BatchNorm2d)][-1]
    with torch.no_grad():
        norm.weight.zero_()
        x = torch.rand(2, norm.num_features, 8, 8)
        assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("features", EncoderSpec("vgg"), "unknown encoder 'vgg'.*mlp.*resnet50"),
        ("features", EncoderSpec("convnet"), "convnet reads image input, got features"),
        ("features", EncoderSpec("embedding_bag"), "embedding_bag reads tokens input, got features"),
        ("features", EncoderSpec("mlp", 2), "mlp.*0 to 1.*got 2"),
        ("features", EncoderSpec("mlp", -1), "mlp.*0 to 1.*got -1"),
        ("features", EncoderSpec("mlp", 0, {"depth": 3}), "mlp.*depth"),
        ("image", EncoderSpec("vit", 0, {"patch": 5}), "5×5 pixels do not fill an image of 32×32"),
        ("image", EncoderSpec("vit", 0, {"heads": 5}), "width 192 is no multiple of its 5 heads"),
        ("image", EncoderSpec("xception_taskonomy", 14), "xception_taskonomy.*0 to 13.*got 14"),
        ("tokens", EncoderSpec("text_transformer", 0, {"heads": 3}), "4 layers, width 128, 3 heads"),
        ("tokens", EncoderSpec("text_transformer", 0, {"layers": 0}), "option layers of encoder text_transformer"),
    ],
)
def test_impossible_encoders_are_refused(kind, spec, message):
    with pytest.raises(ValueError, match=message):
        spec.stages(SHAPES[kind])


def test_an_image_that_is_too_small_for_pooling_is_refused():
    with pytest.raises(ValueError, match=r"5×5 pixels or more, got \(4, 64, 3\)"):
        EncoderSpec("celeba_resnet").stages(InputSpec("image", (4, 64, 3)))


def test_importing_the_core_imports_no_library_of_models():
    script = (
        "import sys, dmtg_core; print([n for n in ('torchvision', 'transformers', 'timm') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
