"""Encoders of `timm`: cut by their structure, equal to the library's own forward, weights from a local file."""

import json
import sys

import pytest
import torch
from torch import nn

from dmtg_core import EncoderSpec, GroupingNetwork, InputSpec, NetworkSpec
from dmtg_core.network.encoders.library import is_linear
from dmtg_core.network.encoders.pretrained_images import preprocessing_of
from dmtg_core.training.checkpoint import load_network, save_network
from tests.dmtg_core.samples import SAMPLEWISE, assert_same_tensors, assigned
from tests.pretrained import pretrained

library = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")

SMALL = {"embed_dim": 8, "depth": 3, "num_heads": 2}
# model, its arguments, side of the images, number of stages
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", SMALL, 32, 4),
    "vit with a mean": ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg"}, 32, 4),
    "deit": ("deit_tiny_distilled_patch16_224", SMALL, 32, 4),
    "dino": ("vit_small_patch14_reg4_dinov2", SMALL, 28, 4),
    "beit": ("beit_base_patch16_224", SMALL | {"embed_dim": 16}, 32, 4),
    "convnext": ("convnext_atto", {"dims": (4, 6, 8, 10), "depths": (1, 1, 2, 1)}, 32, 5),
    "efficientnet": ("tf_efficientnet_lite0", {}, 32, 8),
    "resnet": ("resnet10t", {}, 32, 5),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def image(family: str) -> InputSpec:
    """The input of a family."""
    side = FAMILIES[family][2]
    return InputSpec("image", (side, side, 3), "uint8", std=(255.0,))


def own_model(family: str) -> nn.Module:
    """The library's own model, with changed weights and statistics."""
    name, arguments, side, _ = FAMILIES[family]
    size = {"img_size": side} if "depth" in arguments else {}
    torch.manual_seed(3)
    model = library.create_model(name, num_classes=5, **size, **arguments)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_((torch.rand(tensor.shape) - 0.5) * 0.1)
    return model


def images(family: str) -> torch.Tensor:
    side = FAMILIES[family][2]
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def encoder(family: str, stem: int = 0, path: str = "") -> EncoderSpec:
    name, arguments, _, _ = FAMILIES[family]
    return EncoderSpec("timm", stem, {"model": name, "arguments": arguments} | ({"path": path} if path else {}))


@pytest.fixture
def file(tmp_path):
    """A function that saves the weights of a family's model and returns the file and the model."""

    def saved(family: str, suffix: str = ".safetensors"):
        model, path = own_model(family), str(tmp_path / f"weights{suffix}")
        if suffix == ".safetensors":
            safetensors.save_file(model.state_dict(), path)
        else:
            torch.save({"state_dict": model.state_dict()}, path)
        return path, model

    return saved


@every_family
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_the_stages_of_every_family_equal_the_library(family, training, file):
    path, model = file(family)
    stages = encoder(family, path=path).stages(image(family))
    assert len(stages) == FAMILIES[family][3]
    x = images(family)
    expected = model.train(training).forward_head(model.forward_features(x), pre_logits=True)
    found = nn.Sequential(*stages).train(training)(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert found.std(0).max() > 0


@every_family
def test_every_parameter_is_in_one_stage_and_learns(family):
    stages = encoder(family).stages(image(family))
    parameters = [p for stage in stages for p in stage.parameters()]
    assert len(set(parameters)) == len(parameters)
    nn.Sequential(*stages)(images(family)).square().sum().backward()
    assert [n for s in stages for n, p in s.named_parameters() if p.grad is None] == []
    model = own_model(family)
    model.reset_classifier(0)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in parameters)


@every_family
def test_layers_have_their_names_in_the_library(family, file):
    path, model = file(family)
    stages = encoder(family, path=path).stages(image(family))
    layers = [m for stage in stages for m in stage.modules() if is_linear(m)]
    assert len({m.library_name for m in layers}) == len(layers) > 0
    for layer in layers:
        assert torch.equal(layer.weight, model.get_submodule(layer.library_name).weight)


@pytest.mark.parametrize("family", ["vit", "efficientnet"])
def test_a_saved_network_does_not_need_the_file(family, file, tmp_path):
    path, _ = file(family, ".pth")
    spec = NetworkSpec(image(family), SAMPLEWISE[:4], encoder(family, 2, path), 3)
    assert NetworkSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    network = assigned(GroupingNetwork(spec), [0, 2, 2, 0]).eval()
    save_network(tmp_path / "network", network)
    (tmp_path / "weights.pth").unlink()
    loaded = load_network(tmp_path / "network").eval()
    assert_same_tensors(loaded.state_dict(), network.state_dict())
    raw = (images(family).permute(0, 2, 3, 1) * 255).to(torch.uint8)
    with torch.no_grad():
        hard = network(raw)
        assert all(torch.equal(value, hard[task]) for task, value in loaded(raw).items())
        found = {task: v for model in network.specialise().values() for task, v in model(raw).items()}
    assert all(torch.equal(found[task], hard[task]) for task in hard)


def test_the_positions_of_weights_are_interpolated_to_the_size_of_the_input(file):
    path, _ = file("vit")
    (first, *_) = encoder("vit", path=path).stages(InputSpec("image", (64, 48, 3), "uint8"))
    assert first(torch.zeros(1, 3, 64, 48)).shape == (1, 1 + 4 * 3, 8)


# --- files of weights


def test_weights_in_other_names_are_read_in_their_order(file, tmp_path):
    path, model = file("efficientnet")
    renamed = {f"_{i}._x.{name.rpartition('.')[2]}": t for i, (name, t) in enumerate(model.state_dict().items())}
    torch.save(renamed, tmp_path / "other.pth")
    mine, theirs = (
        encoder("efficientnet", path=p).stages(image("efficientnet")) for p in (path, str(tmp_path / "other.pth"))
    )
    assert_same_tensors(nn.Sequential(*theirs).state_dict(), nn.Sequential(*mine).state_dict())
    swapped = dict(sorted(renamed.items(), key=lambda item: item[1].numel()))
    torch.save(swapped, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"missing conv_stem.weight and \d+ more; unexpected _"):
        encoder("efficientnet", path=str(tmp_path / "other.pth")).stages(image("efficientnet"))


def test_weights_that_do_not_fit_are_refused_by_their_first_names(tmp_path):
    state = own_model("vit").state_dict()
    state["other.weight"] = state.pop("blocks.1.attn.qkv.weight")
    safetensors.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError, match=r"do not fit the model: missing blocks.1.attn.qkv.weight; unexpected other"
    ):
        encoder("vit", path=str(tmp_path / "w.safetensors")).stages(image("vit"))
    state["blocks.1.attn.qkv.weight"] = torch.zeros(2, 2)
    del state["other.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"blocks.1.attn.qkv.weight has shape \(2, 2\), expected \(24, 8\)"):
        encoder("vit", path=str(tmp_path / "w.pth")).stages(image("vit"))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(
        ValueError, match="no file of weights '.*none.pth'; the option path is the .safetensors or"
    ):
        encoder("vit", path=str(tmp_path / "none.pth")).stages(image("vit"))
    torch.save(nn.Linear(2, 2), tmp_path / "code.pth")  # an object, which runs code when it is read
    with pytest.raises(ValueError, match="code.pth' is not a file of weights"):
        encoder("vit", path=str(tmp_path / "code.pth")).stages(image("vit"))


# --- models that are refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vit_of_nobody"}, "the library has no model 'vit_of_nobody'"),
        ({"model": "vgg11"}, "no blocks, stages, layers or layer1, .* among its parts features"),
        ({"model": "eva02_tiny_patch14_224", "arguments": {"img_size": 28, "depth": 2}}, "cannot cut .*eva02"),
        ({"model": "resnet10t", "arguments": {"depths": 3}}, "cannot build 'resnet10t'"),
        ({}, "encoder timm: .*missing 1 required keyword-only argument: 'model'"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EncoderSpec("timm", 0, options).stages(InputSpec("image", (32, 32, 3), "uint8"))


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"encoder timm needs the library timm: pip install 'dmtg\[vision\]'"):
        encoder("vit").stages(image("vit"))


def test_the_preprocessing_is_the_data_configuration_of_the_library():
    found = preprocessing_of("tf_efficientnet_lite0")
    config = library.data.resolve_data_config({}, model=library.create_model("tf_efficientnet_lite0"))
    assert found == {
        "size": config["input_size"][1], "interpolation": config["interpolation"],
        "crop_share": config["crop_pct"],
        "mean": tuple(255 * m for m in config["mean"]), "std": tuple(255 * s for s in config["std"]),
    }  # fmt: skip


# --- real weights


@pytest.mark.soak
@torch.no_grad()
def test_published_weights_in_other_names_are_in_their_places():
    path = str(pretrained("efficientnet_lite0.pth"))
    spec = EncoderSpec("timm", 0, {"model": "tf_efficientnet_lite0", "path": path})
    net = nn.Sequential(*spec.stages(InputSpec("image", (224, 224, 3), "uint8"))).eval()
    own = torch.load(path, weights_only=True)
    held = net.state_dict()
    assert torch.equal(held["0.model.conv_stem.weight"], own["_conv_stem.weight"])
    assert torch.equal(held["1.0.conv_dw.weight"], own["_blocks.0._depthwise_conv.weight"])
    assert torch.equal(held["7.1.after.0.weight"], own["_conv_head.weight"])
