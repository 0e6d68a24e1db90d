"""Updates of all branches in one pass equal one branch after the other, for each family of pretrained encoders."""

import pytest
import torch
from torch import nn

from dmtg_core import EncoderSpec, GroupingNetwork, NetworkSpec
from dmtg_core.network.adapters import AdapterOptions, SharedStages
from dmtg_core.network.composite import Composite
from tests.dmtg_core.network import test_pretrained_images, test_pretrained_text
from tests.dmtg_core.network.test_encoders import SHAPES, encoder
from tests.dmtg_core.pretrained import changed
from tests.dmtg_core.samples import SAMPLEWISE, assigned

TEXTS, IMAGES = test_pretrained_text.FAMILIES, test_pretrained_images.FAMILIES
SHARED_BY_SAMPLES = ("deberta", "deberta-v2")  # their embeddings of relative positions are those of all samples


def network(family: str, groups: int, **adapter) -> tuple[GroupingNetwork, torch.Tensor]:
    """A network whose branches are updates that differ, and its input."""
    if family in TEXTS:
        spec, ids = test_pretrained_text.tokens_of(family), test_pretrained_text.ids_of(family)
        made, given = EncoderSpec("transformers", 1, {"config": TEXTS[family]}, "lora", adapter), ids.int()
    else:
        spec, made = test_pretrained_images.image(family), test_pretrained_images.encoder(family, 1)
        made = EncoderSpec("timm", 1, made.options, "lora", adapter)
        given = (test_pretrained_images.images(family) * 255).permute(0, 2, 3, 1).byte()
    return changed(GroupingNetwork(NetworkSpec(spec, SAMPLEWISE[:4], made, groups))), given


@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("family", [*TEXTS, *IMAGES])
@torch.no_grad()
def test_one_pass_equals_one_branch_after_the_other(family, groups):
    net, given = network(family, groups)
    net.eval()
    together = net.features(given)
    net.one_pass = False
    apart = net.features(given)
    for k, features in apart.items():
        torch.testing.assert_close(together[k], features, rtol=1e-4, atol=1e-4)
    if family != "convnext":  # it multiplies its branches by 1e-6 before it is trained
        assert not torch.allclose(apart[0], apart[1], rtol=1e-2, atol=1e-2)
    assert net.shared.one_pass == (family not in SHARED_BY_SAMPLES)


@pytest.mark.parametrize("family", SHARED_BY_SAMPLES)
@torch.no_grad()
def test_a_composite_of_encoders_that_take_several_passes_equals_its_models(family):
    net, given = network(family, 3)
    models = assigned(net, [0, 2, 2, 0]).eval().specialise()
    found = Composite(models.values())(given)
    for model in models.values():
        for task, expected in model(given).items():
            torch.testing.assert_close(found[task], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", [{"dropout": 0.5}, {"norms": True}, {"rank": 1, "alpha": 200.0}])
def test_the_trial_is_not_disturbed_by_options(adapter):
    assert network("bert", 2, **adapter)[0].shared.one_pass
    assert not network("deberta-v2", 2, **adapter)[0].shared.one_pass


def test_a_network_is_built_with_the_same_random_numbers():
    net, _ = network("bert", 2)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    again, _ = network("bert", 2)
    assert torch.equal(torch.rand(3), expected)
    assert all(map(torch.equal, net.parameters(), again.parameters()))


class Table(nn.Module):
    """Adds a product of a table of as many rows as the samples have features to each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, 4)` to `(B, 4)`."""
        return x + self.table(torch.eye(4)).sum(0)


def test_a_table_whose_rows_the_number_of_branches_divides_is_found():
    sample, options = torch.randn(1, 4), AdapterOptions(rank=2)
    assert not SharedStages([nn.Linear(4, 4), Table()], options, sample).one_pass
    assert SharedStages([nn.Linear(4, 4), nn.Linear(4, 4)], options, sample).one_pass


def test_a_layer_whose_weights_are_read_by_other_code_is_no_target():
    net, _ = network("beit", 2)
    assert {layer.name.rpartition(".")[2] for layer in net.shared.adapted} == {"proj", "fc1", "fc2"}
    with pytest.raises(ValueError, match="no layer is a target 'qkv'; the linear layers are .*attn.proj"):
        network("beit", 2, targets="qkv")


@pytest.mark.parametrize(("name", "kind"), [("mlp", "features"), ("vit", "image"), ("text_transformer", "tokens")])
def test_encoders_of_our_own_take_one_pass(name, kind):
    made = EncoderSpec(name, 1, encoder(name).options, "lora")
    assert GroupingNetwork(NetworkSpec(SHAPES[kind], SAMPLEWISE[:4], made, 2)).shared.one_pass
