"""Updates in the format of the PEFT library: the library computes the same features on the same encoder."""

import json

import pytest
import torch
from torch import nn

from dmtg_core import EncoderSpec, GroupingNetwork, InputSpec, NetworkSpec
from dmtg_core.network.peft_format import CONFIG, WEIGHTS
from dmtg_core.training.checkpoint import load_model, load_tensors, save_model, save_network, save_tensors
from tests.dmtg_core.pretrained import changed, save_bert
from tests.dmtg_core.samples import SAMPLEWISE

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TASKS = SAMPLEWISE[:2]
ADAPTER = {"rank": 3, "alpha": 5.0, "norms": True}


def standardised(features: torch.Tensor) -> torch.Tensor:
    """What heads read."""
    return nn.functional.layer_norm(features, features.shape[-1:])


def loaded_by_peft(base: nn.Module, folder) -> nn.Module:
    return peft.PeftModel.from_pretrained(base.eval(), folder).eval()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


def library_model(bert) -> nn.Module:
    return transformers.BertModel.from_pretrained(bert, add_pooling_layer=False).eval()


def texts(bert, **adapter) -> NetworkSpec:
    encoder = EncoderSpec("transformers", 2, {"path": str(bert)}, "lora", ADAPTER | adapter)
    tokens = InputSpec("tokens", (10,), "int32", vocabulary=40)
    return NetworkSpec(tokens, TASKS, encoder, groups=2, initial="diagonal", initial_scale=1.0)


def test_a_text_encoder_has_the_hidden_states_of_the_library(bert, tmp_path):
    network = changed(GroupingNetwork(texts(bert)).eval())
    ids = torch.arange(1, 31).reshape(3, 10) % 40
    mask = torch.arange(10) < torch.tensor([[10], [7], [4]])
    ids = ids.masked_fill(~mask, 0)
    for name, model in network.specialise().items():
        save_model(tmp_path / name, model.eval())
        described = json.loads((tmp_path / name / CONFIG).read_text())
        assert described["base_model_name_or_path"] == str(bert)
        assert "encoder.layer.2.attention.self.query" in described["target_modules"]
        assert not [key for key in load_tensors(tmp_path / name / "network.safetensors") if "branches" in key]
        with torch.no_grad():
            unadapted = library_model(bert)(input_ids=ids, attention_mask=mask).last_hidden_state
            theirs = loaded_by_peft(library_model(bert), tmp_path / name)
            hidden = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
            expected = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
            features = model.network.features(ids.int())[0]
        torch.testing.assert_close(features, standardised(expected), rtol=0, atol=1e-5)
        assert (hidden - unadapted).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 8, "depth": 3, "num_heads": 2}),
        ("tf_efficientnet_lite0", {}),  # with 1×1 convolutions and no layer norms
    ],
)
def test_an_image_encoder_has_the_features_of_the_library(model, arguments, tmp_path):
    size = {"img_size": 32} if arguments else {}
    torch.manual_seed(0)
    library = timm.create_model(model, num_classes=0, **size, **arguments).eval()
    save_tensors(tmp_path / "weights.safetensors", library.state_dict())
    encoder = EncoderSpec(
        "timm", 2, {"model": model, "arguments": arguments, "path": str(tmp_path / "weights.safetensors")}, "lora",
        ADAPTER | {"norms": bool(arguments)},
    )  # fmt: skip
    spec = NetworkSpec(InputSpec("image", (32, 32, 3), "uint8", std=(255.0,)), TASKS, encoder, groups=1)
    (one,) = changed(GroupingNetwork(spec).eval()).specialise().values()
    save_model(tmp_path / "group_0", one.eval())
    theirs = loaded_by_peft(library, tmp_path / "group_0")
    pictures = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(pictures.movedim(-1, 1).float() / 255)
        features = one.network.features(pictures)[0]
    torch.testing.assert_close(features, standardised(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", [{}, {"norms": False, "targets": ["query", "value"]}, {"rank": 0}])
def test_a_model_is_loaded_from_either_form(bert, tmp_path, adapter):
    (one, _) = changed(GroupingNetwork(texts(bert, **adapter)).eval()).specialise().values()
    save_model(tmp_path / "group_0", one.eval())
    assert (tmp_path / "group_0" / WEIGHTS).exists() == (adapter.get("rank") != 0)
    ids = torch.arange(1, 31).reshape(3, 10).int()
    expected = one(ids)
    for form in ("apart", "whole"):
        if form == "whole":  # all weights of the branch in one file
            save_network(tmp_path / form, one.network)
        found = load_model(tmp_path / ("group_0" if form == "apart" else form))(ids)
        for task, values in expected.items():
            torch.testing.assert_close(found[task], values, rtol=0, atol=0)


def test_a_missing_update_is_named(bert, tmp_path):
    (one, _) = changed(GroupingNetwork(texts(bert)).eval()).specialise().values()
    save_model(tmp_path / "group_0", one)
    tensors = load_tensors(tmp_path / "group_0" / WEIGHTS)
    missing = tensors.popitem()[0]
    save_tensors(tmp_path / "group_0" / WEIGHTS, tensors)
    with pytest.raises(ValueError, match=missing.replace(".", r"\.")):
        load_model(tmp_path / "group_0")
