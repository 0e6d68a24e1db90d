"""Aggregators: the gradients of torchjd for any grouping and number of workers."""

from pathlib import Path

import pytest
import torch
import torchjd.aggregation as published
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchjd.autojac import mtl_backward

from dmtg_core import Batch, Grouping, GroupingNetwork, NetworkSpec, Task
from dmtg_core.network.grouping_network import PairOutputs, pooled
from dmtg_core.training import aggregation
from dmtg_core.training.aggregation import AGGREGATORS, aggregate_gradients, load_aggregator, shared_parameters
from dmtg_core.training.losses import PairLosses, label_counts
from tests.dmtg_core import parallel, samples
from tests.dmtg_core.samples import DENSE, FEATURES, SAMPLEWISE, image_spec, mlp_spec

SEED = 11
NO_GROUPS = (("smiling", "colour", "age", "hat", "shape"),)
TWO_GROUPS = (("smiling", "age", "shape"), ("colour", "hat"))
PUBLISHED = {
    "mean": lambda _n: published.Mean(),
    "upgrad": lambda _n: published.UPGrad(),
    "dualproj": lambda _n: published.DualProj(),
    "pcgrad": lambda _n: published.PCGrad(),
    "cagrad": lambda _n: published.CAGrad(c=0.5),
    "mgda": lambda _n: published.MGDA(),
    "imtl_g": lambda _n: published.IMTLG(),
    "aligned_mtl": lambda _n: published.AlignedMTL(),
    "nash_mtl": published.NashMTL,
}
# torchjd's own NashMTL warns at each first use
quiet = pytest.mark.filterwarnings("ignore:.*not DPP:UserWarning")


def grouped(spec: NetworkSpec, groups) -> GroupingNetwork:
    """A network in training with one head for each task."""
    network = GroupingNetwork(spec).train()
    network.keep_grouping(Grouping.of(groups, [task.name for task in spec.tasks]))
    return network


def pair_losses(network: GroupingNetwork, batch: Batch, counts: Tensor | None = None):
    """The loss of each pair `(P,)`, and the features that the heads read."""
    features = network.features(batch.inputs)
    rows, dense = network.bank({k: pooled(f) for k, f in features.items()}), {}
    for (k, n), decoder in network.decoders.items():
        dense[k, n] = decoder(features[k], batch.inputs.shape[1:3])
    sums = PairLosses(network.tasks, network.pairs)(PairOutputs(rows, dense), batch.targets).sum(1)
    counts = label_counts(network.tasks, batch.targets) if counts is None else counts
    weight = torch.tensor([float(task.weight) for task in network.tasks])
    task_of = [n for _, n in network.pairs]
    return sums * weight[task_of] / counts[task_of], features


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """Contents of `.grad` by name."""
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def aggregated(network: GroupingNetwork, batch: Batch, name: str, **options):
    """Gradients and weights with an aggregator."""
    network.zero_grad()
    losses, _ = pair_losses(network, batch)
    weights = aggregate_gradients(network, losses, load_aggregator(name), **{"seed": SEED, **options})
    return gradients(network), weights


def plain(network: GroupingNetwork, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients of the sum of the losses, or of their weighted sum."""
    network.zero_grad()
    losses, _ = pair_losses(network, batch)
    (losses if weights is None else losses * weights).sum().backward()
    found = gradients(network)
    network.zero_grad()
    return {key: value for key, value in found.items() if key != "gate.logits"}


def jacobian(network: GroupingNetwork, batch: Batch, parameters) -> Tensor:
    """The gradients of all losses, float64 `(P, D)`."""
    losses, _ = pair_losses(network, batch)
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    return torch.stack(
        [
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(row, parameters, strict=True)]
            )
            for row in rows
        ]
    ).double()


def branch_of(network: GroupingNetwork) -> list[int]:
    return [k for k, _ in network.pairs]


def is_head(name: str) -> bool:
    return name.startswith(("bank.", "decoders."))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        size = float(expected[name].abs().max())
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4 * size + 1e-8, msg=name)


SPECS = {
    "mlp": mlp_spec(SAMPLEWISE[:5], 1, stem=1),
    "rescaled": mlp_spec(SAMPLEWISE[:5], 2, stem=1, rescale_gradients="tasks"),
    "convnet": image_spec((*SAMPLEWISE[:3], DENSE[0], DENSE[2]), 1, stem=1),
    "two groups": mlp_spec(SAMPLEWISE[:5], 2, stem=1),
    "two groups of a convnet": image_spec((*SAMPLEWISE[:3], DENSE[0], DENSE[2]), 2, stem=1),
}


# --- against torchjd


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("kind", ["mlp", "convnet", "rescaled"])
@quiet
def test_one_group_gets_the_gradients_of_torchjd(kind, name):
    spec = SPECS[kind]
    batch = samples.batch(spec.input, spec.tasks, 12)
    network = grouped(spec, [[task.name for task in spec.tasks]])
    twin = grouped(spec, [[task.name for task in spec.tasks]])
    found, _ = aggregated(network, batch, name)

    losses, features = pair_losses(twin, batch)
    shared = [*twin.stem.parameters(), *twin.branches.parameters()]
    heads = [[*twin.bank.parameters(), *twin.decoders.parameters()]] * len(losses)
    mtl_backward(
        list(losses), list(features.values()), tasks_params=heads, shared_params=shared, retain_graph=True
    )
    whole = torch.cat([p.jac.flatten(1) for p in shared], dim=1).double()
    torch.manual_seed(SEED * spec.groups)
    combined = PUBLISHED[name](len(whole))(whole).float()
    for p, part in zip(shared, combined.split([p.numel() for p in shared]), strict=True):
        p.grad = part.reshape(p.shape)
    assert_close(found, gradients(twin))


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("kind", ["two groups", "two groups of a convnet"])
@quiet
def test_groups_are_weighted_separately_and_summed_in_the_stem(kind, name):
    spec = SPECS[kind]
    names = [task.name for task in spec.tasks]
    batch = samples.batch(spec.input, spec.tasks, 12)
    network = grouped(spec, [[names[0], names[2], names[3]], [names[1], names[4]]])
    found, weights = aggregated(network, batch, name)
    expected = torch.empty(len(names))
    for k, branch in network.branches.items():
        members = [p for p, b in enumerate(branch_of(network)) if b == k]
        assert len(members) > 1
        matrix = jacobian(network, batch, list(branch.parameters()))[members]
        torch.manual_seed(SEED * spec.groups + k)
        expected[members] = PUBLISHED[name](len(members)).weighting(matrix).float()
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)
    shared = {k: v for k, v in plain(network, batch, weights).items() if not is_head(k)}
    heads = {k: v for k, v in plain(network, batch).items() if is_head(k)}
    assert_close(found, shared | heads)


def test_a_task_alone_on_its_branch_has_weight_1():
    spec = SPECS["two groups"]
    batch = samples.batch(spec.input, spec.tasks, 12)
    network = grouped(spec, [["smiling", "age", "shape", "hat"], ["colour"]])
    found, weights = aggregated(network, batch, "mean")
    of = dict(zip([spec.tasks[n].name for _, n in network.pairs], weights.tolist(), strict=True))
    assert of == {"smiling": 0.25, "age": 0.25, "shape": 0.25, "hat": 0.25, "colour": 1.0}
    assert_close(
        {k: v for k, v in found.items() if k.startswith(("branches.1", "bank"))},
        {k: v for k, v in plain(network, batch).items() if k.startswith(("branches.1", "bank"))},
    )


@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_the_mean_is_the_plain_gradient_divided_by_the_tasks_and_heads_are_not_weighed(kind):
    spec = SPECS[kind]
    batch = samples.batch(spec.input, spec.tasks, 12, missing=0.3)
    network = grouped(spec, [[task.name for task in spec.tasks]])
    found, weights = aggregated(network, batch, "mean")
    assert weights.tolist() == pytest.approx([1 / 5] * 5)
    scaled = {k: v if is_head(k) else v * 5 for k, v in found.items()}
    assert_close(scaled, plain(network, batch))


def test_losses_may_be_separate_tensors():
    spec = SPECS["convnet"]
    batch = samples.batch(spec.input, spec.tasks, 12)
    network = grouped(spec, [[task.name for task in spec.tasks]])
    expected, weights = aggregated(network, batch, "upgrad")
    network.zero_grad()
    losses, _ = pair_losses(network, batch)
    apart = aggregate_gradients(network, list(losses.unbind()), load_aggregator("upgrad"), seed=SEED)
    assert torch.equal(apart, weights)
    samples.assert_same_tensors(gradients(network), expected)


def test_gradients_are_added_to_existing_ones():
    spec = SPECS["mlp"]
    batch = samples.batch(spec.input, spec.tasks, 12)
    network = grouped(spec, NO_GROUPS)
    once, _ = aggregated(network, batch, "upgrad")
    losses, _ = pair_losses(network, batch)
    aggregate_gradients(network, losses, load_aggregator("upgrad"), seed=SEED)
    assert_close(gradients(network), {k: 2 * v for k, v in once.items()})


def test_the_jacobian_is_reduced_in_blocks(monkeypatch):
    spec = SPECS["mlp"]
    batch = samples.batch(spec.input, spec.tasks, 12)
    network = grouped(spec, NO_GROUPS)
    expected, _ = aggregated(network, batch, "upgrad")
    monkeypatch.setattr(aggregation, "BLOCK", 100)
    shapes = []

    def reduce(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    found, _ = aggregated(network, batch, "upgrad", reduce=reduce)
    size = sum(p.numel() for p in shared_parameters(network)[0])
    assert len(shapes) > 1
    assert {rows for rows, _ in shapes} == {5}
    assert sum(columns for _, columns in shapes) == size
    assert max(columns for _, columns in shapes) == 20
    assert_close(found, expected)


# --- what a group shares


def test_a_group_shares_its_branch_and_alone_also_the_stem():
    network = grouped(SPECS["two groups"], TWO_GROUPS)
    assert shared_parameters(network) == {k: list(network.branches[k].parameters()) for k in (0, 1)}
    network = grouped(SPECS["two groups"], NO_GROUPS)
    assert shared_parameters(network) == {0: [*network.stem.parameters(), *network.branches[0].parameters()]}


def test_a_branch_without_trainable_parameters_is_weighted_over_the_stem():
    spec = SPECS["two groups"]
    batch = samples.batch(spec.input, spec.tasks, 12)
    network = grouped(spec, TWO_GROUPS)
    network.branches.requires_grad_(requires_grad=False)
    stem = list(network.stem.parameters())
    assert shared_parameters(network) == {0: stem, 1: stem}
    found, weights = aggregated(network, batch, "mgda")
    assert set(found) == {name for name, _ in network.named_parameters() if name.startswith(("stem", "bank"))}
    matrix = jacobian(network, batch, stem)
    for k in (0, 1):
        members = [p for p, b in enumerate(branch_of(network)) if b == k]
        expected = published.MGDA().weighting(matrix[members]).float()
        torch.testing.assert_close(weights[members], expected, rtol=1e-3, atol=1e-4)


def test_if_only_heads_are_trained_their_gradients_do_not_change():
    spec = SPECS["mlp"]
    batch = samples.batch(spec.input, spec.tasks, 12)
    network = grouped(spec, NO_GROUPS)
    network.branches.requires_grad_(requires_grad=False)
    network.stem.requires_grad_(requires_grad=False)
    found, weights = aggregated(network, batch, "upgrad")
    assert weights.tolist() == [1.0] * 5
    assert_close(found, plain(network, batch))


def test_the_gradient_of_the_gate_is_zero():
    spec = SPECS["two groups"]
    batch = samples.batch(spec.input, spec.tasks, 12)
    network = grouped(spec, TWO_GROUPS)
    losses, _ = pair_losses(network, batch)
    gate = network.gate(0.7, network.gate.noise(torch.Generator().manual_seed(0)))
    gated = losses * torch.stack([gate[n, k] for k, n in network.pairs])
    assert torch.autograd.grad(gated.sum(), network.gate.logits, retain_graph=True)[0].abs().max() == 0
    aggregate_gradients(network, gated, load_aggregator("upgrad"), seed=SEED)
    assert network.gate.logits.grad is None
    found = gradients(network)
    samples.assert_same_tensors(found, aggregated(network, batch, "upgrad")[0])


# --- conflict


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_a_step_hurts_no_task_in_a_conflict(name):
    """Labels and their inverse: a step on the heavy task alone hurts the light one."""
    tasks = (Task("heavy", "binary", weight=2.0), Task("light", "binary"), Task("third", "binary"))
    network = grouped(NetworkSpec(FEATURES, tasks, mlp_spec().encoder, 1), [["heavy", "light", "third"]])
    with torch.no_grad():  # equal heads for opposite labels
        network.bank.weights[0][1] = network.bank.weights[0][0]
    batch = samples.batch(FEATURES, tasks, 64)
    batch.targets["light"].copy_(1 - batch.targets["heavy"])
    shared = shared_parameters(network)[0]
    matrix = jacobian(network, batch, shared)
    aggregated(network, batch, name)
    step = torch.cat([p.grad.flatten() for p in shared]).double()
    assert falls(matrix, matrix.sum(0)).min() < -0.5
    assert falls(matrix, step).min() > -0.01
    assert falls(matrix, step).max() > 0.1


def falls(jacobian: Tensor, step: Tensor) -> Tensor:
    """How fast each loss falls along a step, as the cosine between its gradient and the step."""
    return jacobian @ step / (jacobian.norm(dim=1) * step.norm())


def test_each_branch_and_step_draws_its_own_order():
    seeds = []

    def remember(gramian: Tensor, seed: int) -> Tensor:
        seeds.append(seed)
        return gramian.new_ones(len(gramian))

    spec = SPECS["two groups"]
    batch = samples.batch(spec.input, spec.tasks, 12)
    network = grouped(spec, TWO_GROUPS)
    for step in range(3):
        aggregate_gradients(network, pair_losses(network, batch)[0], remember, seed=step)
    assert len(seeds) == len(set(seeds)) == 6


# --- steps without labels or finite losses


def test_a_batch_without_labels_of_one_task_trains_the_others():
    spec = SPECS["mlp"]
    batch = samples.batch(spec.input, spec.tasks, 12)
    batch.targets["age"].fill_(torch.nan)
    network = grouped(spec, NO_GROUPS)
    counts = label_counts(spec.tasks, batch.targets).clamp_min(1)
    losses, _ = pair_losses(network, batch, counts)
    weights = aggregate_gradients(network, losses, load_aggregator("mgda"), seed=SEED)
    assert weights[[n for _, n in network.pairs].index(2)] == 0
    assert all(p.grad.abs().max() > 0 for p in network.branches.parameters())


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_loss_that_is_not_finite_has_gradients_that_a_step_refuses(name):
    spec = SPECS["mlp"]
    batch = samples.batch(spec.input, spec.tasks, 12)
    batch.targets["age"][0] = torch.inf
    network = grouped(spec, NO_GROUPS)
    found, weights = aggregated(network, batch, name)
    assert weights.isnan().all()
    assert not torch.nn.utils.get_total_norm(found.values()).isfinite()


# --- bad input


def test_several_heads_of_a_task_are_refused():
    spec = SPECS["two groups"]
    network = GroupingNetwork(spec).train()
    batch = samples.batch(spec.input, spec.tasks, 12)
    with pytest.raises(ValueError, match="one head and one loss for each task, got 5 tasks, 10 heads and 10"):
        aggregated(network, batch, "mean")


def test_losses_that_are_not_those_of_the_pairs_are_refused():
    spec = SPECS["mlp"]
    network = grouped(spec, NO_GROUPS)
    losses, _ = pair_losses(network, samples.batch(spec.input, spec.tasks, 12))
    with pytest.raises(ValueError, match="5 tasks, 5 heads and 4 losses"):
        aggregate_gradients(network, losses[:4], load_aggregator("mean"), seed=0)


# --- two workers

RANKED = ("upgrad", "pcgrad", "mgda")


def global_batch(spec: NetworkSpec) -> Batch:
    return samples.batch(spec.input, spec.tasks, 16, missing=0.3)


def work(rank: int, workers: int, folder: Path) -> None:
    """A data-parallel step, then a step with each aggregator, on this worker's part of the batch."""
    total = parallel.ProcessContext().sum
    spec = SPECS["two groups"]
    network = grouped(spec, TWO_GROUPS)
    whole = global_batch(spec)
    mine = slice(rank, None, workers)
    batch = Batch(whole.inputs[mine], {key: value[mine] for key, value in whole.targets.items()})
    counts = label_counts(spec.tasks, whole.targets)
    module = DistributedDataParallel(Losses(network))
    module(batch, counts).sum().backward()  # its hooks ran here and must not run later
    for name in RANKED:
        network.zero_grad()
        losses, _ = pair_losses(network, batch, counts)
        weights = aggregate_gradients(network, losses, load_aggregator(name), seed=SEED, reduce=total)
        local = gradients(network)
        found = {key: total(value) for key, value in local.items()}
        shares = {f"local.{key}": value for key, value in local.items()}
        save_file({"weights": weights, **found, **shares}, folder / f"{name}_{rank}.safetensors")


class Losses(nn.Module):
    """The module that data-parallel training wraps."""

    def __init__(self, network: GroupingNetwork) -> None:
        super().__init__()
        self.network = network
        network.gate.logits.requires_grad_(requires_grad=False)  # unused here, and all parameters have to be used

    def forward(self, batch: Batch, counts: Tensor) -> Tensor:
        return pair_losses(self.network, batch, counts)[0]


def test_two_workers_have_the_gradients_of_one(two_processes, tmp_path):
    two_processes(work, tmp_path)
    spec = SPECS["two groups"]
    for name in RANKED:
        first, second = (load_file(tmp_path / f"{name}_{rank}.safetensors") for rank in range(2))
        assert torch.equal(first["weights"], second["weights"])
        expected, weights = aggregated(grouped(spec, TWO_GROUPS), global_batch(spec), name)
        torch.testing.assert_close(first["weights"], weights, rtol=1e-4, atol=1e-5)
        assert_close({key: first[key] for key in expected}, expected)
        for key in expected:  # a worker has its own share before the sum
            assert not torch.equal(first[f"local.{key}"], second[f"local.{key}"]), key
