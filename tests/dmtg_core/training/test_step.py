"""One training step: its loss and gradients, refused steps and noise."""

import math
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from dmtg_core import (
    ArrayData,
    GroupingNetwork,
    LocalContext,
    NetworkSpec,
    Task,
    TrainSettings,
    TrainState,
)
from dmtg_core.training.losses import label_counts, sample_loss
from dmtg_core.training.objective.optimizer import build_optimizer
from dmtg_core.training.step import WeighedLoss, prepare_network, step_noise, train_step
from tests.dmtg_core import samples
from tests.dmtg_core.network.test_grouping_network import pair_outputs
from tests.dmtg_core.samples import MIXED, SAMPLEWISE, assert_same_tensors, assigned, image_spec, mlp_spec
from tests.dmtg_core.training.test_checkpoint import moments
from tests.soak import others_in_soak

OPTIMIZERS = ("adam", "adamw", "sgd")


def local(folder=None, **options) -> LocalContext:
    """A context on the CPU."""
    return LocalContext(folder, device="cpu", **options)


def run_step(state: TrainState, settings: TrainSettings, batch, *, step: int = 0, temperature: float = 1.0):
    """One update of a state, and its figures."""
    module = WeighedLoss(state.network, settings.entropy_weight, settings.precision).train()
    noise = step_noise(state.network, settings, step, 0, len(batch.inputs))
    return train_step(module, state.optimizer, batch, noise, temperature, settings, local())


def fresh(spec: NetworkSpec, settings: TrainSettings) -> TrainState:
    """A state at the beginning of a run."""
    return TrainState.fresh(GroupingNetwork(spec), settings)


# --- the loss of a step


@pytest.mark.parametrize("sampling", ["gumbel", "gumbel_per_sample", "softmax", "straight_through", "fixed"])
def test_the_loss_is_the_gated_sum_of_mean_losses_by_the_formula(sampling):
    spec = image_spec(sampling=sampling, initial="gaussian", initial_scale=1.0)
    network = GroupingNetwork(spec).eval()
    batch = samples.batch(spec.input, spec.tasks, 6, missing=0.3)
    counts = label_counts(spec.tasks, batch.targets).clamp_min(1)
    noise = step_noise(network, TrainSettings(), 3, 0, 6)
    with torch.no_grad():
        loss, by_task, by_pair = WeighedLoss(network, entropy_weight=0.7).eval()(batch, 0.9, noise, counts)
        gate = network.gate(0.9, noise)  # (N, K) or (B, N, K)
        outputs = pair_outputs(network, network.forward_pairs(batch.inputs))
        expected, pairs = torch.zeros(len(spec.tasks)), {}
        for (k, n), output in outputs.items():
            task = spec.tasks[n]
            each = sample_loss(task, output, batch.targets[task.name])  # (B,)
            pairs[k, n] = each.sum() / counts[n]
            expected[n] += (gate[..., n, k] * each).sum() / counts[n]
        entropy = network.gate.entropy().mean()
    torch.testing.assert_close(by_task, expected)
    torch.testing.assert_close(by_pair, torch.stack([pairs[pair] for pair in network.pairs]))
    weights = torch.tensor([task.weight for task in spec.tasks])
    torch.testing.assert_close(loss, (expected * weights).sum() + 0.7 * entropy)


@pytest.mark.parametrize("weights", [(1, 1), (2, 3), (1, 2.5)], ids=str)
def test_task_weights_may_be_whole_numbers(weights):
    tasks = [Task(name, "binary", weight=weight) for name, weight in zip("ab", weights, strict=True)]
    spec, settings = mlp_spec(tasks), TrainSettings()
    refused = run_step(fresh(spec, settings), settings, samples.batch(spec.input, tasks)).refused
    assert not refused


def test_a_pruned_head_is_not_in_the_step():
    spec, settings = mlp_spec(), TrainSettings()
    state = fresh(spec, settings)
    assigned(state.network, [1] * 10)
    state.keep(state.network.gate.survivors(2.0), settings)
    run_step(state, settings, samples.batch(spec.input, spec.tasks))
    assert {name.split(".")[1] for name, _ in state.network.named_parameters() if name.startswith("branches")} == {
        "1"
    }
    assert state.network.gate.logits.grad is None or (state.network.gate.logits.grad == 0).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_on_one_batch_lower_its_loss(optimizer, precision):
    spec = image_spec(MIXED[:6])
    settings = TrainSettings(optimizer=optimizer, learning_rate=1e-2, precision=precision, clip_norm=1.0)
    state = fresh(spec, settings)
    batch = samples.batch(spec.input, spec.tasks, 8)
    losses = [run_step(state, settings, batch, step=0).by_task.sum().item() for _ in range(15)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.dtype == torch.float32 for p in state.network.parameters())


def test_the_gradient_is_clipped_to_its_norm():
    spec = mlp_spec()
    batch = samples.batch(spec.input, spec.tasks)
    norms = {}
    for clip in (0.0, 0.5):
        settings = TrainSettings(clip_norm=clip)
        state = fresh(spec, settings)
        run_step(state, settings, batch)
        grads = [p.grad for p in state.network.parameters() if p.grad is not None]
        norms[clip] = torch.nn.utils.get_total_norm(grads).item()
    assert norms[0.0] > 1.0
    assert norms[0.5] == pytest.approx(0.5, rel=1e-4)


def test_weight_decay_does_not_change_the_gate():
    spec = mlp_spec(initial="gaussian")
    settings = TrainSettings(optimizer="sgd", weight_decay=0.5, learning_rate=0.1)
    state = fresh(spec, settings)
    batch = samples.batch(spec.input, spec.tasks, missing=1.0)  # no labels: only the weight decay changes weights
    before = samples.snapshot(state.network)
    run_step(state, settings, batch)
    after = samples.snapshot(state.network)
    assert torch.equal(after["gate.logits"], before["gate.logits"])
    torch.testing.assert_close(after["bank.weights.0"], before["bank.weights.0"] * (1 - 0.1 * 0.5))


@pytest.mark.parametrize(("rate", "expected"), [(None, 0.25), (0.5, 0.5), (0.0, 0.0)])
def test_the_gate_has_its_own_learning_rate(rate, expected):
    settings = TrainSettings(learning_rate=0.25, gate_learning_rate=rate)
    network = GroupingNetwork(mlp_spec())
    weights, gate = build_optimizer(network, settings).param_groups
    assert gate["params"] == [network.gate.logits]
    assert (weights["lr"], gate["lr"]) == (0.25, expected)
    assert len(weights["params"]) == len(list(network.parameters())) - 1


# --- the same step, computed in other ways


def gradients(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in state.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("sampling", ["gumbel", "gumbel_per_sample"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(sampling, parts):
    spec = mlp_spec(sampling=sampling, initial="gaussian", initial_scale=1.0, task_weighting="uncertainty")
    batch = samples.batch(spec.input, spec.tasks, 7, missing=0.3)
    found = []
    for accumulate in (1, parts):
        settings = TrainSettings(accumulate=accumulate, entropy_weight=0.5)
        state = fresh(spec, settings)
        figures = run_step(state, settings, batch)
        found.append((gradients(state), figures))
    (whole, figures), (in_parts, figures_of_parts) = found
    assert whole.keys() == in_parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(in_parts[name], value, atol=1e-6, rtol=1e-4, msg=name)
    for name, value in vars(figures).items():
        torch.testing.assert_close(getattr(figures_of_parts, name), value, msg=name)


def bytes_kept(state: TrainState, settings: TrainSettings, batch) -> int:
    """Size of the tensors that a step stores for its backward pass, each counted once."""
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    counts = torch.ones(len(state.network.tasks))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        WeighedLoss(state.network)(batch, 1.0, step_noise(state.network, settings, 0, 0, 5), counts)
    return sum(kept.values())


@pytest.mark.parametrize("decoder", ["subpixel", "xception"])
def test_activations_computed_again_change_nothing_but_the_memory(decoder):
    spec = image_spec(decoder=decoder)
    batch = samples.batch(spec.input, spec.tasks, missing=0.2)
    found, kept = [], []
    for recompute in (False, True):
        settings = TrainSettings(recompute=recompute, learning_rate=1e-2)
        state = fresh(spec, settings)
        prepare_network(state.network, settings, local())
        for step in range(2):
            run_step(state, settings, batch, step=step)
        found.append(samples.snapshot(state.network))
        kept.append(bytes_kept(state, settings, batch))
    assert_same_tensors(found[1], found[0])  # running statistics, which a second pass would move twice, included
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler hides it, unless it is an error
@pytest.mark.parametrize("backend", others_in_soak(["aot_eager", "inductor"], "aot_eager"))
def test_a_compiled_network_has_the_same_steps_and_pruning_causes_no_compilation(monkeypatch, backend):
    compiled_with = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled_with(module, backend=backend))
    spec = mlp_spec(SAMPLEWISE[:3], groups=2)
    batch = samples.batch(spec.input, spec.tasks)
    found = []
    for compiled in (False, True):
        counters.clear()  # of compilations in other tests
        settings = TrainSettings(compile=compiled, optimizer="sgd")
        state = fresh(spec, settings)
        prepare_network(state.network, settings, local())
        with inductor.patch(compile_threads=1):  # in this process; starting others takes longer
            run_step(state, settings, batch)
        count = counters["stats"]["unique_graphs"]
        assert (count > 0) == compiled
        state.keep(assigned(state.network, [0, 1, 0]).gate.survivors(0.5), settings)
        prepare_network(state.network, settings, local())
        run_step(state, settings, batch, step=1)
        assert counters["stats"]["unique_graphs"] == count
        found.append(samples.snapshot(state.network))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_have_the_same_steps():
    spec, found = image_spec(), []
    for graphs in (False, True):
        settings = TrainSettings(cuda_graphs=graphs, optimizer="sgd")
        context = LocalContext(device="cuda")
        state = TrainState.fresh(GroupingNetwork(spec).to("cuda"), settings)
        prepare_network(state.network, settings, context)
        module = WeighedLoss(state.network).to("cuda").train()
        data = ArrayData({"train": samples.arrays(spec.input, spec.tasks, 16)}, spec.tasks, device="cuda")
        for step in range(4):  # the first ones are recorded
            batch = next(data.train(step, 8))
            noise = step_noise(state.network, settings, step, 0, 8).to("cuda")
            train_step(module, state.optimizer, batch, noise, 1.0, settings, context, step=step)
        found.append(samples.snapshot(state.network))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("beside", [{"accumulate": 2}, {"recompute": True}, {"compile": False}])
def test_cuda_graphs_name_the_options_that_they_exclude(beside):
    with pytest.raises(ValueError, match="cuda_graphs needs compile, and excludes"):
        TrainSettings(cuda_graphs=True, **beside)


# --- learned weights of the tasks


def test_uncertainty_weights_each_task_by_the_formula():
    spec = mlp_spec(task_weighting="uncertainty")
    network = GroupingNetwork(spec)
    with torch.no_grad():
        network.log_variance.copy_(torch.linspace(-2, 2, len(spec.tasks)))
    batch = samples.batch(spec.input, spec.tasks)
    counts = label_counts(spec.tasks, batch.targets)
    loss, by_task, _ = WeighedLoss(network)(batch, 1.0, step_noise(network, TrainSettings(), 0, 0, 5), counts)
    expected = sum(
        task.weight * (math.exp(-s) * part + s / 2)
        for task, part, s in zip(spec.tasks, by_task.tolist(), network.log_variance.tolist(), strict=True)
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_learned_variance_converges_to_twice_the_loss(optimizer):
    """Where exp(-s) · L + s / 2 is least, exp(s) = 2 L; weight decay would pull s to 0."""
    tasks = [Task("noise", "regression")]
    spec = mlp_spec(tasks, 1, task_weighting="uncertainty")
    settings = TrainSettings(optimizer=optimizer, learning_rate=0.1, weight_decay=0.5)
    state = fresh(spec, settings)
    batch = samples.batch(spec.input, tasks, 50)
    batch = replace(batch, inputs=torch.zeros_like(batch.inputs), targets={"noise": torch.randn(50) * 3})
    for step in range(200):
        figures = run_step(state, settings, batch, step=step)
    assert math.exp(state.network.log_variance.item()) == pytest.approx(2 * figures.by_task.item(), rel=0.1)


def test_a_group_model_has_no_weights_of_tasks():
    network = GroupingNetwork(mlp_spec(task_weighting="uncertainty"))
    for model in network.specialise().values():
        assert "network.log_variance" not in model.state_dict()


# --- refused steps


def poisoned(batch, where: str):
    """The batch with a value that is not finite."""
    inputs, targets = batch.inputs.clone(), {name: t.clone() for name, t in batch.targets.items()}
    if where == "input":
        inputs[1, 0] = math.nan
    else:
        targets[where][1] = math.inf
    return replace(batch, inputs=inputs, targets=targets)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("where", ["input", "age"])
def test_a_refused_step_changes_neither_weights_nor_moments_nor_gate(optimizer, clip_norm, where):
    spec = mlp_spec()
    settings = TrainSettings(optimizer=optimizer, clip_norm=clip_norm, learning_rate=1e-2, weight_decay=0.1)
    state = fresh(spec, settings)
    batch = samples.batch(spec.input, spec.tasks)
    refused = run_step(state, settings, batch).refused
    assert refused == 0
    weights, held = samples.snapshot(state.network), moments(state)
    assert held
    refused = run_step(state, settings, poisoned(batch, where), step=1).refused
    assert refused == 1
    assert_same_tensors(samples.snapshot(state.network), weights)
    assert_same_tensors(moments(state), held)
    refused = run_step(state, settings, batch, step=2).refused
    assert refused == 0
    assert not torch.equal(state.network.gate.logits, weights["gate.logits"])
    assert all(p.isfinite().all() for p in state.network.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_first_step_that_is_refused_leaves_no_trace_in_the_next(optimizer):
    spec, settings = mlp_spec(), TrainSettings(optimizer=optimizer, learning_rate=1e-2)
    batch = samples.batch(spec.input, spec.tasks)
    refused, undisturbed = fresh(spec, settings), fresh(spec, settings)
    run_step(refused, settings, poisoned(batch, "input"))
    run_step(refused, settings, batch)
    run_step(undisturbed, settings, batch)
    assert_same_tensors(samples.snapshot(refused.network), samples.snapshot(undisturbed.network))


def test_a_refused_step_leaves_running_statistics_finite():
    spec, settings = image_spec(MIXED[:4]), TrainSettings()
    spec = replace(spec, input=replace(spec.input, dtype="float32"))
    state = fresh(spec, settings)
    batch = samples.batch(spec.input, spec.tasks)
    batch = replace(batch, inputs=batch.inputs.float())
    run_step(state, settings, batch)
    before = samples.snapshot(state.network)
    broken = replace(batch, inputs=batch.inputs.clone())
    broken.inputs[0, 0, 0, 0] = math.nan
    assert run_step(state, settings, broken, step=1).refused == 1
    assert_same_tensors(samples.snapshot(state.network), before)


# --- noise


def test_gate_noise_is_a_function_of_seed_and_step_equal_on_all_workers():
    network = GroupingNetwork(mlp_spec())

    def noise(seed: int, step: int, rank: int = 0) -> torch.Tensor:
        return step_noise(network, TrainSettings(seed=seed), step, rank, 5)

    before = torch.get_rng_state()
    assert torch.equal(noise(1, 2, rank=0), noise(1, 2, rank=3))
    drawn = [noise(seed, step) for seed in (1, 2) for step in (0, 1, 2)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert drawn[0].shape == (10, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_gate_noise_of_each_sample_differs_between_workers_too():
    network = GroupingNetwork(mlp_spec(sampling="gumbel_per_sample"))
    settings = TrainSettings()
    first, same, other = (step_noise(network, settings, 2, rank, 5) for rank in (0, 0, 1))
    assert first.shape == (5, 10, 3)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


# --- aggregators


def test_an_aggregator_is_used_when_every_task_has_one_head():
    spec, settings = mlp_spec(groups=2), TrainSettings(aggregator="mgda")
    soft = GroupingNetwork(spec)
    assert WeighedLoss(soft, aggregator="mgda").weigh is None
    hard = assigned(soft, [0, 1] * 5)
    hard.prune(2.0)
    assert WeighedLoss(hard, aggregator="mgda").weigh is not None
    batch = samples.batch(spec.input, spec.tasks)
    state = TrainState.fresh(hard, settings)
    noise = step_noise(hard, settings, 0, 0, 5)
    for group in state.optimizer.param_groups:
        group["lr"] = 0.0
    figures = []
    for name in ("sum", "mgda"):
        module = WeighedLoss(hard, aggregator=name).train()
        figures.append(train_step(module, state.optimizer, batch, noise, 1.0, settings, local()))
    torch.testing.assert_close(figures[0].by_task, figures[1].by_task)
    torch.testing.assert_close(figures[0].by_pair, figures[1].by_pair)


def test_an_aggregator_with_learned_weights_or_parts_is_refused():
    with pytest.raises(ValueError, match="choose one"):
        WeighedLoss(GroupingNetwork(mlp_spec(task_weighting="uncertainty")), aggregator="upgrad")
    with pytest.raises(ValueError, match="set accumulate to 1"):
        TrainSettings(aggregator="upgrad", accumulate=2)
