"""Text encoders: padding has no effect, an empty text is legal."""

import numpy as np
import pytest
import torch
from torch import nn

from dmtg_core import (
    ArrayData,
    Arrays,
    EncoderSpec,
    GroupingNetwork,
    InputSpec,
    LocalContext,
    NetworkSpec,
    Task,
    TrainSettings,
    evaluate,
    fit,
)
from dmtg_core.network.encoders.text import read, without_padding
from tests.dmtg_core.network.test_encoders import LENGTH, SHAPES, STAGES, VOCABULARY, encoder, inputs_for
from tests.dmtg_core.samples import SAMPLEWISE, assigned

TOKENS = SHAPES["tokens"]
TEXT = ("embedding_bag", "text_transformer", "transformers")
every_text = pytest.mark.parametrize("name", TEXT)


def whole(name: str, **options) -> nn.Sequential:
    """All stages of an encoder."""
    torch.manual_seed(0)
    return nn.Sequential(*encoder(name, **options).stages(TOKENS)).eval()


def text_network(name: str, stem: int = 1, **options) -> GroupingNetwork:
    """Three branches with a converged gate, in evaluation mode."""
    spec = NetworkSpec(TOKENS, SAMPLEWISE[:4], encoder(name, stem), 3, **options)
    return assigned(GroupingNetwork(spec), [0, 2, 2, 0]).eval()


# --- padding


@every_text
@torch.no_grad()
def test_adding_padding_changes_nothing(name):
    net, ids = whole(name), inputs_for(name)
    for row in ids:
        words = row[row != 0].unsqueeze(0)
        assert words.shape[1] < LENGTH
        torch.testing.assert_close(net(words), net(row.unsqueeze(0)), rtol=1e-5, atol=1e-6)


@every_text
@torch.no_grad()
def test_the_embedding_of_padding_changes_nothing(name):
    net, ids = whole(name), inputs_for(name)
    before = net(ids)
    (table,) = [m.weight for m in net.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)][:1]
    table[0] = 5.0
    assert torch.equal(net(ids), before)


@every_text
def test_the_embedding_of_padding_is_not_trained(name):
    net, ids = whole(name), inputs_for(name)
    net.train()(ids).square().sum().backward()
    (table,) = [m.weight for m in net.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)][:1]
    seen = torch.isin(torch.arange(VOCABULARY), ids[ids != 0])
    assert torch.equal(table.grad.any(1), seen)


@every_text
def test_an_empty_text_has_finite_features_and_gradients(name):
    net = whole(name)
    ids = inputs_for(name)
    ids[1] = 0
    for training in (True, False):
        out = net.train(training)(ids)
        assert out.isfinite().all()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    with torch.no_grad():
        torch.testing.assert_close(net(ids)[0], net(ids[:1])[0])


@pytest.mark.parametrize("name", ["text_transformer", "transformers"])
@torch.no_grad()
def test_the_order_of_words_matters_to_a_transformer(name):
    net, ids = whole(name), torch.tensor([[3, 4, 5, 0, 0, 0, 0], [5, 4, 3, 0, 0, 0, 0]])
    first, second = net(ids)
    assert (first - second).abs().max() > 1e-3


def test_a_mean_of_embeddings_is_the_mean_over_the_words():
    bag = whole("embedding_bag")[0]
    found = bag(torch.tensor([[3, 3, 9, 0, 0], [0, 0, 0, 0, 0]]))
    torch.testing.assert_close(found[0], (2 * bag.weight[3] + bag.weight[9]) / 3)
    assert not found[1].any()


def test_all_but_padding_is_read_and_one_token_of_an_empty_text():
    ids = torch.tensor([[4, 5, 0, 0], [0, 0, 0, 0], [0, 7, 0, 8]])
    assert read(ids).int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize(
    ("ids", "width"),
    [([[4, 5, 0, 0], [7, 0, 0, 0]], 2), ([[0, 0, 8, 0], [1, 0, 0, 0]], 3), ([[0, 0], [0, 0]], 1), ([[4, 5]], 2)],
)
def test_columns_that_are_padding_in_all_texts_are_not_computed(ids, width):
    ids = torch.tensor(ids)
    assert torch.equal(without_padding(ids), ids[:, :width])
    other = torch.where(ids == 0, 3, ids + 3)
    assert torch.equal(without_padding(other, 3), other[:, :width])


@pytest.mark.parametrize("name", ["text_transformer", "transformers"])
@torch.no_grad()
def test_a_layer_computes_as_many_tokens_as_the_longest_text_has(name):
    first, *_ = whole(name)
    ids = torch.randint(3, VOCABULARY, (4, LENGTH))
    ids[:, 3:] = 0
    tokens, mask, *_ = first(ids)
    assert tokens.shape[1] == mask.shape[1] == 3


@pytest.mark.parametrize("name", ["text_transformer", "transformers"])
def test_dropout_acts_in_training_only_and_on_demand_only(name):
    ids = inputs_for(name)
    net = whole(name)
    assert torch.equal(net.train()(ids), net(ids))
    net = whole(name, dropout=0.5)
    assert not torch.equal(net.train()(ids), net(ids))
    assert torch.equal(net.eval()(ids), net(ids))


# --- in a network


@pytest.mark.parametrize(("name", "stem"), [(n, s) for n in TEXT for s in range(STAGES[n])])
def test_group_models_equal_the_network_bit_for_bit(name, stem):
    network, ids = text_network(name, stem), inputs_for(name).int()
    with torch.no_grad():
        hard = network(ids)
        models = network.specialise()
        found = {task: value for model in models.values() for task, value in model(ids).items()}
    assert len(models) == 2
    assert found.keys() == hard.keys()
    assert all(torch.equal(found[task], hard[task]) for task in hard)
    assert hard["colour"].shape == (3, 3)


@pytest.mark.parametrize("stem", [0, 2])
def test_rescaling_scales_the_gradients_of_stages_that_pass_a_mask_on(stem):
    gradients = []
    for rescale in ("off", "tasks"):
        network = text_network("text_transformer", stem, rescale_gradients=rescale).train()
        network.forward_pairs(inputs_for("text_transformer")).rows.square().sum().backward()
        gradients.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    tasks, groups = 1 / 4**0.5, 1 / 3**0.5
    for name, gradient in gradients[0].items():
        factor = {"stem": tasks * groups, "branches": tasks}.get(name.split(".")[0], 1.0)
        torch.testing.assert_close(gradients[1][name], gradient * factor, rtol=1e-5, atol=1e-7)


def test_a_dense_task_on_text_is_refused():
    with pytest.raises(ValueError, match="'depth' is dense, but encoder embedding_bag has no feature map"):
        GroupingNetwork(NetworkSpec(TOKENS, [Task("depth", "dense_regression")], EncoderSpec("embedding_bag"), 2))


@pytest.mark.parametrize(
    ("name", "options", "precision"),
    [
        ("embedding_bag", {}, "fp32"),
        ("text_transformer", {"width": 16, "layers": 1, "heads": 2, "dropout": 0.1}, "bf16"),
    ],
)
def test_a_network_learns_which_words_a_text_contains(name, options, precision):
    spec = InputSpec("tokens", (6,), "uint16", vocabulary=9)
    tasks = (Task("three", "binary"), Task("seven", "binary"))
    rng, splits = np.random.default_rng(0), {}
    for split, rows in (("train", 480), ("val", 32), ("test", 256)):
        ids = rng.integers(1, 9, (rows, 6)).astype(np.uint16)
        ids[np.arange(6) >= rng.integers(0, 7, (rows, 1))] = 0
        labels = {task: (ids == word).any(1).astype(np.uint8) for task, word in (("three", 3), ("seven", 7))}
        splits[split] = Arrays(ids, labels, {})
    data = ArrayData(splits, tasks)
    network = GroupingNetwork(NetworkSpec(spec, tasks, EncoderSpec(name, 1, options), 2))
    settings = TrainSettings(epochs=8, batch_size=32, learning_rate=1e-2, precision=precision)
    state = fit(network, data, settings, LocalContext(device="cpu"))
    found = evaluate(state.network, data, "test", context=LocalContext(device="cpu"))
    assert min(found[task.name]["balanced_accuracy"] for task in tasks) > 0.95
