"""TabM and the normal scores of its input, against `tabm`, scikit-learn and torch."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.preprocessing import QuantileTransformer
from torch.nn import functional as F

from dmtg_core import (
    ArrayData,
    Arrays,
    EncoderSpec,
    Grouping,
    GroupingNetwork,
    InputSpec,
    NetworkSpec,
    Task,
    TrainSettings,
    fit,
)
from dmtg_core.network.cost import grouping_cost, inference_cost, wide_spec
from dmtg_core.network.encoders import build_encoder, tabular
from dmtg_core.network.inputs import Normalise
from dmtg_core.network.members import average
from dmtg_core.search.feature_overlap import feature_overlap
from dmtg_core.training.context import LocalContext
from dmtg_core.training.diagnostics import gradient_cosines
from dmtg_core.training.losses import PairLosses, sample_loss
from dmtg_core.training.settings import table_schedule
from tests.dmtg_core import samples
from tests.dmtg_core.samples import SAMPLEWISE, assert_same_tensors, assigned

tabm = pytest.importorskip("tabm")
rtdl_num_embeddings = pytest.importorskip("rtdl_num_embeddings")

EDGES = tuple(np.linspace(-2.0, 2.0, 9))
INPUT = InputSpec("features", (6,), quantiles=(EDGES, (), EDGES, EDGES, (), EDGES))
MEMBERS = 4
OPTIONS = {"width": 8, "blocks": 2, "members": MEMBERS, "embedding": 3, "frequencies": 2, "dropout": 0.0}


def spec(tasks=SAMPLEWISE, groups: int = 3, stem: int = 0, **options) -> NetworkSpec:
    """A small network."""
    return NetworkSpec(INPUT, tuple(tasks), EncoderSpec("tabm", stem, {**OPTIONS, **options}), groups)


def tied(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Columns without ties, with some, with many, and with a long tail."""
    x = rng.normal(size=(rows, 4))
    x[:, 1], x[:, 2], x[:, 3] = np.round(x[:, 1], 1), np.round(x[:, 2]), np.exp(3 * x[:, 3])
    return x.astype(np.float32)


@given(
    seed=st.integers(0, 2**32), rows=st.sampled_from([12, 100, 3000]), count=st.sampled_from([2, 10, 256, 1000])
)
def test_normal_scores_are_those_of_scikit_learn(seed, rows, count):
    rng = np.random.default_rng(seed)
    x = tied(rng, rows)
    known = QuantileTransformer(n_quantiles=min(count, rows), output_distribution="normal").fit(x)
    edges = known.quantiles_.astype(np.float32)
    known.quantiles_ = edges.astype(np.float64)
    new = np.concatenate([x, 3 * tied(rng, 50)])
    found = Normalise(InputSpec("features", (4,), quantiles=edges.T.tolist()))(torch.from_numpy(new)).numpy()
    # scikit-learn maps the smallest and the largest value to the limits, however frequent they are
    inside = (new > edges[0]) & (new < edges[-1])
    outside = (new < edges[0]) | (new > edges[-1])
    assert np.abs(found - known.transform(new))[inside].max(initial=0) < 2e-3
    assert np.array_equal(found[outside], known.transform(new)[outside].astype(np.float32))


def test_a_frequent_smallest_value_has_the_mean_of_its_probabilities():
    edges = (0.0, 0.0, 0.0, 0.0, 1.0)  # three quarters are 0
    found = Normalise(InputSpec("features", (1,), quantiles=(edges,)))(torch.tensor([[0.0], [0.5], [1.0]]))
    expected = torch.special.ndtri(torch.tensor([3 / 8, 7 / 8]))
    assert torch.allclose(found[:2, 0], expected)
    assert found[2, 0] > 5


def test_other_features_are_standardised():
    values = InputSpec("features", (2,), mean=(1.0, 2.0), std=(1.0, 4.0), quantiles=((0.0, 1.0), ()))
    assert Normalise(values)(torch.tensor([[0.5, 6.0]])).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("quantiles", "message"),
    [
        (((0.0, 1.0),), "expected 2 lists, got 1"),
        (((0.0, 1.0), (0.0, 1.0, 2.0)), "one length of at least 2, got 2, 3"),
        (((0.0,), ()), "one length of at least 2, got 1"),
        (((1.0, 0.0), ()), "ascending order"),
        (((0.0, float("inf")), ()), "finite"),
    ],
)
def test_quantiles_that_cannot_be_used_are_refused(quantiles, message):
    with pytest.raises(ValueError, match=message):
        InputSpec("features", (2,), quantiles=quantiles)
    with pytest.raises(ValueError, match="image input: expected none, got 1"):
        InputSpec("image", (4, 4, 1), "uint8", quantiles=((0.0, 1.0),))


def test_specs_are_saved_with_quantiles_and_without():
    held = spec().to_dict()
    assert NetworkSpec.from_dict(held) == spec()
    assert "quantiles" not in InputSpec("features", (2,)).to_dict()


def test_a_layer_is_that_of_the_authors():
    (stem, (branch,), features, _) = build_encoder(
        EncoderSpec("tabm", 0, {**OPTIONS, "blocks": 1}), INPUT, 1, seed=3
    )
    theirs = tabm.MLPBackboneBatchEnsemble(
        d_in=4 * 3 + 2, n_blocks=1, d_block=8, dropout=0.0, activation="ReLU", k=MEMBERS, tabm_init=True,
        scaling_init="normal", start_scaling_init_chunks=[3, 3, 3, 3, 1, 1],
    )  # fmt: skip
    mine = branch[1][1].linear
    assert {name: p.shape for name, p in mine.named_parameters()} == {
        name.removeprefix("blocks.0.0."): p.shape for name, p in theirs.named_parameters()
    }
    theirs.load_state_dict({f"blocks.0.0.{name}": value for name, value in mine.state_dict().items()})
    x = torch.randn(5, 6)
    columns = branch[0](stem(x))
    assert torch.equal(branch(x), theirs(columns.unsqueeze(1).expand(-1, MEMBERS, -1)))
    assert (features.channels, features.members, features.stride) == (8, MEMBERS, 0)


@given(seed=st.integers(0, 2**32), rows=st.sampled_from([3, 40, 2_000]), bins=st.sampled_from([1, 2, 48, 300]))
def test_piecewise_linear_embeddings_are_those_of_the_authors(seed, rows, bins):
    rng = np.random.default_rng(seed)
    x = tied(rng, rows)
    x[:2, 2] = 7, 8  # not constant
    edges = np.quantile(x, np.linspace(0, 1, min(rows, 256)), axis=0).astype(np.float32)
    given = InputSpec("features", (4,), quantiles=tuple(map(tuple, edges.T.tolist())))
    normalise = Normalise(given)
    columns, *_ = tabular.tabm(given, **{**OPTIONS, "numbers": "piecewise_linear", "bins": bins})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = edges[np.linspace(0, len(edges) - 1, min(bins, len(edges) - 1) + 1).round().astype(int)]
        theirs = rtdl_num_embeddings.PiecewiseLinearEmbeddings(
            [column.unique() for column in normalise(torch.from_numpy(chosen)).T], 3, activation=False, version="B"
        )
    torch.nn.init.normal_(columns.embed.embed.linear.weight)
    theirs.load_state_dict(columns.embed.embed.state_dict())
    torch.testing.assert_close(
        columns(normalise(torch.from_numpy(x))), theirs(normalise(torch.from_numpy(x))).flatten(1)
    )
    nearest = torch.from_numpy(edges[[0, -1]])
    outside = nearest + torch.tensor([[-3.0], [3.0]])
    torch.testing.assert_close(columns(normalise(outside)), columns(normalise(nearest)))


def test_a_constant_number_has_a_constant_embedding():
    constant = InputSpec("features", (2,), quantiles=((1.0, 1.0, 1.0), (0.0, 1.0, 2.0)))
    columns, *_ = tabular.tabm(constant, **{**OPTIONS, "numbers": "piecewise_linear"})
    found = columns(Normalise(constant)(torch.tensor([[1.0, 0.0], [1.0, 2.0]])))
    assert torch.equal(found[0, :3], found[1, :3])
    assert not torch.equal(found[0, 3:], found[1, 3:])


def test_an_unknown_embedding_is_refused():
    with pytest.raises(ValueError, match="numbers must be periodic or piecewise_linear, got 'linear'"):
        tabular.tabm(INPUT, numbers="linear")
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        tabular.tabm(INPUT, numbers="piecewise_linear", bins=0)


def test_members_have_common_weights_and_start_different():
    _, (branch,), *_ = build_encoder(EncoderSpec("tabm", 0, OPTIONS), INPUT, 1, seed=3)
    out = branch(torch.randn(5, 6))
    assert out.shape == (5, MEMBERS, 8)
    assert not any(torch.equal(out[:, 0], out[:, m]) for m in range(1, MEMBERS))
    _, (plain,), *_ = build_encoder(EncoderSpec("tabm", 0, {**OPTIONS, "members": 1}), INPUT, 1, seed=3)
    more = sum(p.numel() for p in branch.parameters()) - sum(p.numel() for p in plain.parameters())
    assert more == (MEMBERS - 1) * (14 + 3 * 8 + 2 * 8)  # scales of inputs and outputs, and biases, of both layers


@pytest.mark.parametrize("task", SAMPLEWISE, ids=lambda task: task.name)
def test_the_average_is_the_mean_of_the_predictions(task):
    shape = (7, MEMBERS) if task.channels == 1 else (7, MEMBERS, task.channels)
    output = 5 * torch.randn(shape, dtype=torch.float64)
    found = task.decode(average(task, output))
    expected = torch.stack([task.decode(output[:, m]) for m in range(MEMBERS)]).mean(0)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(task.decode(average(task, output[:, :1])), task.decode(output[:, 0]), atol=1e-6)


def test_probabilities_near_0_and_1_keep_their_digits():
    output = torch.tensor([[200.0, 200.0], [-200.0, -200.0], [-300.0, 300.0]])
    assert torch.allclose(average(Task("t", "binary"), output), torch.tensor([200.0, -200.0, 0.0]), atol=1e-4)


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_the_loss_is_the_mean_of_the_losses_of_the_members(missing):
    network = GroupingNetwork(spec()).train()
    batch = samples.batch(INPUT, SAMPLEWISE, 5, missing=missing)
    outputs = network.forward_pairs(batch.inputs)
    found = PairLosses(network.tasks, network.pairs)(outputs, batch.targets)
    features = network.features(batch.inputs)
    for place, (k, n) in enumerate(network.pairs):
        task, target = network.tasks[n], batch.targets[network.tasks[n].name]
        each = [sample_loss(task, network.bank.head(k, task, features[k][:, m]), target) for m in range(MEMBERS)]
        assert torch.allclose(found[place], torch.stack(each).mean(0), atol=1e-5), (k, task.name)


def test_the_loss_of_soft_targets_is_that_of_torch():
    tasks = (Task("t", "multiclass", 3), Task("u", "binary"))
    network = GroupingNetwork(spec(tasks, groups=1)).train()
    x, soft = torch.randn(4, 6), torch.rand(4, 3).softmax(1)
    outputs = network.forward_pairs(x)
    found = PairLosses(network.tasks, network.pairs)(outputs, {"t": soft, "u": torch.zeros(4)})
    logits = outputs.rows[:3].T.unflatten(0, (4, MEMBERS))  # (B, m, C)
    expected = torch.stack([F.cross_entropy(logits[:, m], soft, reduction="none") for m in range(MEMBERS)]).mean(0)
    assert torch.allclose(found[0], expected, atol=1e-6)


@pytest.mark.parametrize("numbers", ["periodic", "piecewise_linear"])
@pytest.mark.parametrize("stem", [0, 1, 2])
def test_models_of_groups_predict_as_the_network(stem, numbers):
    network = assigned(GroupingNetwork(spec(stem=stem, numbers=numbers)), [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]).eval()
    batch = samples.batch(INPUT, SAMPLEWISE, 5)
    whole, found = network(batch.inputs), {}
    for model in network.specialise().values():
        found |= model(batch.inputs)
    assert_same_tensors(dict(sorted(found.items())), dict(sorted(whole.items())))
    network.prune(2.0)
    assert_same_tensors(dict(sorted(network(batch.inputs).items())), dict(sorted(whole.items())))


def test_affinities_and_gradient_cosines_read_it():
    network = GroupingNetwork(spec(groups=1))
    data = samples.data(INPUT, SAMPLEWISE, rows=20)
    overlap = feature_overlap(network, data)
    assert torch.allclose(overlap.diagonal(), torch.ones(len(SAMPLEWISE)).to(overlap))
    cosines = gradient_cosines(network, samples.batch(INPUT, SAMPLEWISE, 5), LocalContext())
    assert all(abs(row[n] - 1) < 1e-5 for n, row in enumerate(cosines))


def test_it_is_widened_to_the_cost_of_all_groups():
    held = spec(width=32)
    wide = wide_spec(held)
    names = [task.name for task in SAMPLEWISE]
    most = grouping_cost(held, Grouping.from_assignment(names, [n % 3 for n in range(len(names))])).flops
    assert wide.encoder.options["width"] > 32
    assert 0.9 * most < inference_cost(GroupingNetwork(wide)).flops <= most


def test_it_trains_and_its_loss_is_that_of_the_averaged_prediction():
    tasks = (Task("a", "binary"), Task("b", "regression"))
    data = samples.data(INPUT, tasks, rows=32)
    state = fit(GroupingNetwork(spec(tasks, groups=2)), data, TrainSettings(epochs=3, batch_size=16))
    totals = [sum(record["train_loss"].values()) for record in state.history]
    assert totals[-1] < totals[0]


@pytest.mark.parametrize("name", ["tabm", "rtdl_num_embeddings"])
def test_a_missing_package_is_named(monkeypatch, name):
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ValueError, match=rf"needs the package {name}: pip install 'dmtg\[tables\]'"):
        GroupingNetwork(spec())


@pytest.mark.parametrize(
    ("rows", "numbers", "embedding", "width"),
    [(300, 10, 8, 128), (999, 10, 8, 128), (1_000, 10, 16, 128), (3_000, 64, 8, 128), (300, 0, 8, 128),
     (20_000, 3, 16, 256), (300_000, 1_000, 2, 256)],
)  # fmt: skip
def test_options_follow_from_rows_and_numbers(rows, numbers, embedding, width):
    options = tabular.tabm_options(rows, numbers)
    assert options["embedding"] == embedding
    assert options["numbers"] == ("periodic" if rows < 1_000 else "piecewise_linear")
    assert options.get("shared_input", False) == (rows >= 3_000)
    stages = tabular.tabm(INPUT, **options)
    assert len(stages) == 4
    assert stages[3](torch.zeros(1, options.get("members", 16), width)).shape[2] == width


@pytest.mark.parametrize(
    ("rows", "epochs", "batch_size", "rate"),
    [(300, 60, 32, 3e-3), (2_999, 40, 64, 3e-3), (3_000, 40, 256, 6e-3), (10_000, 20, 256, 6e-3),
     (20_000, 40, 256, 6e-3)],
)  # fmt: skip
def test_the_schedule_of_a_table_follows_from_its_rows(rows, epochs, batch_size, rate):
    found = TrainSettings(**table_schedule(rows))
    assert (found.epochs, found.batch_size, found.learning_rate) == (epochs, batch_size, rate)
    assert 0 < found.patience < epochs


def test_members_share_the_mask_of_dropout():
    torch.manual_seed(0)
    *_, block = tabular.tabm(INPUT, **{**OPTIONS, "dropout": 0.5})
    x = torch.randn(64, MEMBERS, 8)
    change = block(x) - x  # ReLU has zeros of its own
    kept = (change != 0).any(1, keepdim=True)
    held = block.eval()(x) - x
    torch.testing.assert_close(change, torch.where(kept, 2 * held, 0.0))
    assert 0.3 < kept.float().mean() < 0.7


CODED = InputSpec("features", (3,), quantiles=(EDGES, (), EDGES), codes=((-1.5, 0.0, 0.3), (), (1.0, 2.0)))
SHARED = {**OPTIONS, "shared_input": True}


def test_the_first_layer_with_one_product_is_that_of_the_authors():
    columns, first, *_ = tabular.tabm(INPUT, **SHARED)
    theirs = tabm.LinearBatchEnsemble(4 * 3 + 2, 8, k=MEMBERS, scaling_init="ones")
    mine = first.linear
    assert set(mine.scales.unique().tolist()) == {-1.0, 1.0}
    theirs.load_state_dict({"weight": mine.linear.weight, "r": theirs.r, "s": mine.scales, "bias": mine.bias})
    x = columns(torch.randn(5, 6))
    torch.testing.assert_close(first(x), theirs(x.unsqueeze(1).expand(-1, MEMBERS, -1)).relu())


def test_a_repeated_value_has_a_vector_like_a_category():
    columns, first, *_ = tabular.tabm(CODED, **SHARED)
    x = torch.tensor([[-1.5, 5.0, 1.0], [0.3, 5.0, 0.9], [0.1, 5.0, 2.0], [0.31, 5.0, -2.0]])
    assert not columns.codes.vectors.any()
    before = first(columns(Normalise(CODED)(x)))
    plain = replace(CODED, codes=())
    without = tabular.tabm(plain, **SHARED)
    without[0].load_state_dict(columns.state_dict(), strict=False)
    without[1].load_state_dict(first.state_dict())
    torch.testing.assert_close(before, without[1](without[0](Normalise(plain)(x))))
    torch.nn.init.normal_(columns.codes.vectors)
    flags = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).float()
    torch.testing.assert_close(columns.codes(Normalise(CODED)(x)), flags @ columns.codes.vectors)
    after = first(columns(Normalise(CODED)(x)))
    assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [False, False, False, True]


def test_a_network_learns_a_function_of_single_values():
    values = np.linspace(-2, 2, 40).astype(np.float32)
    answers = np.random.default_rng(0).normal(size=40).astype(np.float32)
    place = np.random.default_rng(1).integers(40, size=600)
    given = InputSpec("features", (1,), quantiles=(tuple(np.quantile(values, np.linspace(0, 1, 30))),))
    task = Task("t", "regression")
    parts = {"train": Arrays(values[place, None], {"t": answers[place]}, {})}
    data = ArrayData({**parts, "val": parts["train"]}, [task])
    errors = []
    for codes in ((), (tuple(values),)):
        net = NetworkSpec(
            replace(given, codes=codes), (task,), EncoderSpec("tabm", options=SHARED), 1, sampling="fixed"
        )
        state = fit(GroupingNetwork(net), data, TrainSettings(epochs=20, batch_size=32, learning_rate=0.01))
        errors.append(state.history[-1]["val"]["t"]["rmse"])
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (((1.0, 2.0), (1.0,)), "feature 1 has codes without quantiles"),
        (((1.0,),), "feature 0 has codes without quantiles"),
        (((2.0, 1.0), ()), "ascending order"),
    ],
)
def test_codes_that_cannot_be_used_are_refused(codes, message):
    with pytest.raises(ValueError, match=message):
        InputSpec("features", (2,), quantiles=((0.0, 1.0), ()), codes=codes)


def test_specs_are_saved_with_codes_and_without():
    assert InputSpec(**CODED.to_dict()) == CODED
    assert "codes" not in INPUT.to_dict()
