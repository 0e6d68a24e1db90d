"""Texts in parts of similar length: the same outputs and gradients, and fewer columns computed."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dmtg_core import EncoderSpec, GroupingNetwork, InputSpec, LocalContext, NetworkSpec, TrainSettings
from dmtg_core.network.batched.choice import built
from dmtg_core.network.composite import Composite
from dmtg_core.network.encoders.lengths import PARTS, in_parts, lengths
from dmtg_core.network.encoders.text import read
from dmtg_core.network.trunk import stored_ids
from dmtg_core.training.step import prepare_network
from tests.dmtg_core.network.test_encoders import VOCABULARY, encoder
from tests.dmtg_core.network.test_pretrained_text import FAMILIES, every_family
from tests.dmtg_core.samples import SAMPLEWISE, assigned

COLUMNS = 12
LONGER = {"max_position_embeddings": COLUMNS + 2}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def texts(rows: int, padding: int = 0, seed: int = 0) -> Tensor:
    """Ids `(rows, COLUMNS)` of texts of all lengths, some of them empty."""
    rng = np.random.default_rng(seed)
    ids = rng.choice([i for i in range(VOCABULARY) if i != padding], (rows, COLUMNS))
    long = rng.integers(0, COLUMNS + 1, rows)
    return torch.from_numpy(np.where(np.arange(COLUMNS) < long[:, None], ids, padding))


def network(name: str, padding: int = 0, *, branch: str = "copy", **options) -> GroupingNetwork:
    """Three branches with the tasks assigned to two of them."""
    spec = InputSpec("tokens", (COLUMNS,), "int32", vocabulary=VOCABULARY, padding=padding)
    made = EncoderSpec(name, 1, encoder(name, **options).options, branch)
    return assigned(GroupingNetwork(NetworkSpec(spec, SAMPLEWISE[:4], made, 3)), [0, 2, 2, 0])


def of_family(family: str, branch: str = "lora") -> tuple[GroupingNetwork, int]:
    """A network with an encoder of the library, and its padding."""
    padding = FAMILIES[family]["pad_token_id"]
    return network("transformers", padding, branch=branch, config=FAMILIES[family] | LONGER), padding


def outputs_and_gradients(net: GroupingNetwork, ids: Tensor, *, by_length: bool) -> list[Tensor]:
    """All features, and the gradients of a function that differs from sample to sample."""
    net.by_length = by_length
    net.zero_grad()
    features = torch.stack([f for _, f in sorted(net.features(ids).items())])
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    (features * weights).sum().backward()
    return [features.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def assert_same(net: GroupingNetwork, ids: Tensor) -> None:
    """Outputs and gradients with parts are those without."""
    found, expected = (outputs_and_gradients(net, ids, by_length=by_length) for by_length in (True, False))
    assert len(found) == len(expected) > 1
    size = max(float(tensor.abs().max()) for tensor in expected)  # biases of keys have gradients that are rounding
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * size)


@pytest.mark.parametrize("branch", ["lora", "copy"])
@every_family
def test_pretrained_encoders_compute_the_same(family, branch):
    net, padding = of_family(family, branch)
    assert_same(net.train(), texts(70, padding))


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 130, 300])
def test_an_encoder_from_scratch_computes_the_same(rows):
    assert_same(network("text_transformer").train(), texts(rows))


def test_branches_in_one_pass_compute_the_same():
    net = network("text_transformer").train()
    net.batched = built(net)
    assert_same(net, texts(40))


@torch.no_grad()
def test_stored_outputs_of_the_stem_are_read_in_parts():
    net, _ = of_family("bert")
    ids = texts(40)
    net.by_length = False
    stored, expected = net.stored_output(ids), net.features(ids)
    net.by_length = True
    again, tokens = net.stored_output(ids), read(ids)
    assert torch.equal(stored_ids(again), ids.int())
    torch.testing.assert_close(again[tokens].float()[:, :-2], stored[tokens].float()[:, :-2], rtol=1e-2, atol=1e-2)
    for k, features in net.features(stored).items():
        torch.testing.assert_close(features, expected[k], rtol=0.05, atol=0.05)


@torch.no_grad()
def test_a_composite_computes_what_its_models_compute():
    net, _ = of_family("bert")
    models, ids = net.eval().specialise(), texts(40)
    together = Composite(models.values())
    found = together(ids)
    for model in models.values():
        for name, expected in model(ids).items():
            torch.testing.assert_close(found[name], expected, **CLOSE)


class Columns(nn.Module):
    """A stage that records the shape of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int]] = []

    def forward(self, state):
        """Return the state."""
        self.shapes.append(tuple(state[0].shape[:2]))
        return state


@pytest.mark.parametrize("rows", [16, 64, 257])
@torch.no_grad()
def test_a_part_has_the_columns_of_its_longest_text(rows):
    net, ids = network("text_transformer"), texts(rows)
    seen = Columns()
    net.stem.append(seen)
    net.features(ids)
    long = np.sort((ids.numpy() != 0).sum(1))
    parts = np.array_split(long, min(rows // 8, PARTS))
    assert seen.shapes == [(len(part), max(part.max(), 1)) for part in parts]
    assert sum(b * c for b, c in seen.shapes) < rows * long.max()


def test_padding_inside_a_text_counts():
    ids = torch.tensor([[5, 0, 0, 4, 0], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5], [0, 7, 0, 0, 0]])
    assert lengths(ids, 0).tolist() == [4, 0, 5, 2]
    assert lengths(ids, 5).tolist() == [5, 5, 4, 5]


def test_several_tensors_come_back_in_the_order_of_the_samples():
    ids = texts(300)
    number = torch.arange(300.0)
    batch = torch.cat([number.unsqueeze(1), ids], 1)
    found = in_parts(lambda part: [part[:, 0], part[:, :2] * 2], batch, ids, 0)
    assert torch.equal(found[0], number)
    assert torch.equal(found[1], batch[:, :2] * 2)


def test_a_compiled_network_computes_a_batch_as_it_is():
    net = network("text_transformer")
    assert net.by_length
    prepare_network(net, TrainSettings(compile=True), LocalContext(device="cpu"))
    assert not net.by_length


def test_lengths_are_not_read_on_another_device():
    net, given = network("text_transformer"), texts(40).to("meta")
    found = net.in_parts(lambda part: [part], given)
    assert found[0] is given


@pytest.mark.parametrize("branch", ["lora", "copy"])
@torch.no_grad()
def test_an_exported_model_has_any_number_of_samples(branch):
    net, _ = of_family("bert", branch)
    model = Composite(net.eval().specialise().values())
    rows = torch.export.Dim("rows", min=2, max=512)
    program = torch.export.export(model, (texts(40),), dynamic_shapes=({0: rows},))
    for count in (3, 40, 90):
        found = program.module()(texts(count))
        for name, expected in model(texts(count)).items():
            torch.testing.assert_close(found[name], expected, **CLOSE)


@pytest.mark.parametrize("shape", [(40,), (40, COLUMNS + 1), (3, 40, COLUMNS)])
def test_an_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=rf"expected input of shape \(B, {COLUMNS}\), got"):
        network("text_transformer")(torch.zeros(shape, dtype=torch.int32))


def test_other_encoders_compute_a_batch_as_it_is():
    assert not network("embedding_bag").by_length
