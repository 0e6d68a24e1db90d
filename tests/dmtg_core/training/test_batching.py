"""Training with all branches in one pass: equal results, and when it is chosen."""

import logging
from dataclasses import replace

import pytest
import torch

from dmtg_core import EncoderSpec, GroupingNetwork, LocalContext, NetworkSpec, TrainSettings, fit
from dmtg_core.network.batched import choice
from dmtg_core.network.batched.choice import small
from dmtg_core.training import checkpoint
from dmtg_core.training import step as step_module
from dmtg_core.training.state import TrainState
from dmtg_core.training.step import WeighedLoss, batch_branches, prepare_network, step_noise, train_step
from tests.dmtg_core import parallel, samples
from tests.dmtg_core.samples import DENSE, FEATURES, IMAGE, MIXED, SAMPLEWISE, image_spec, mlp_spec
from tests.soak import others_in_soak

TASKS = SAMPLEWISE[:4]
VIT = NetworkSpec(IMAGE, TASKS, EncoderSpec("vit", 1, {"patch": 4, "width": 12, "layers": 2}), 3)
# losses that are smooth: the best of nine shifts or the sign of an error changes with a rounding error
SMOOTH = (SAMPLEWISE[0], DENSE[0], SAMPLEWISE[1], DENSE[3])
SPECS = {
    "mlp": mlp_spec(TASKS, 4),
    "mlp_twelve": mlp_spec(TASKS, 12),
    "convnet": image_spec(SMOOTH, 3),
    "vit": VIT,
}


def settings_for(batched: str, **options) -> TrainSettings:
    """Stochastic gradient descent: Adam makes a large step of a gradient that is a rounding error."""
    return TrainSettings(**{"optimizer": "sgd", "learning_rate": 0.02, "batch_branches": batched} | options)


def local(folder=None) -> LocalContext:
    return LocalContext(folder, device="cpu")


def steps(spec: NetworkSpec, settings: TrainSettings, count: int = 3, *, pruned: bool = False) -> dict:
    """State of a network after some steps."""
    state = TrainState.fresh(GroupingNetwork(spec), settings)
    if pruned:
        alive = torch.zeros_like(state.network.gate.alive)
        alive[torch.arange(len(spec.tasks)), torch.arange(len(spec.tasks)) % 2] = True
        state.keep(alive, settings)
    context = local()
    prepare_network(state.network, settings, context)
    assert (state.network.batched is not None) == (settings.batch_branches == "on")
    module = WeighedLoss(state.network, precision=settings.precision).train()
    for step in range(count):
        batch = samples.batch(spec.input, spec.tasks, 6, seed=step, missing=0.2)
        noise = step_noise(state.network, settings, step, 0, 6)
        train_step(module, state.optimizer, batch, noise, 1.0, settings, context, step=step)
    return samples.snapshot(state.network)


def assert_close(found: dict, expected: dict, rtol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-6, msg=name)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_steps_have_equal_results(name, pruned):
    # batch normalisation of a few pixels amplifies rounding errors from step to step
    options = {"precision": "fp32", "learning_rate": 1e-3}
    found, expected = (steps(SPECS[name], settings_for(b, **options), pruned=pruned) for b in ("on", "off"))
    assert_close(found, expected)


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"clip_norm": 0.1}, {"optimizer": "adamw"}])
def test_steps_with_options_have_equal_results(options):
    found, expected = (steps(SPECS["mlp"], settings_for(b, precision="fp32", **options)) for b in ("on", "off"))
    assert_close(found, expected)


def test_steps_in_bf16_differ_by_rounding_errors_only():
    found, expected = (steps(VIT, settings_for(b, precision="bf16")) for b in ("on", "off"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-2, atol=2e-2, msg=name)


def test_a_refused_step_leaves_the_statistics_of_the_branches():
    spec, settings = SPECS["convnet"], settings_for("on")
    state = TrainState.fresh(GroupingNetwork(spec), settings)
    prepare_network(state.network, settings, local())
    before = samples.snapshot(state.network)
    batch = samples.batch(spec.input, spec.tasks, 6)
    noise = torch.full_like(step_noise(state.network, settings, 0, 0, 6), float("nan"))
    train_step(WeighedLoss(state.network).train(), state.optimizer, batch, noise, 1.0, settings, local())
    after = samples.snapshot(state.network)
    samples.assert_same_tensors(after, before)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler hides it, unless it is an error
@pytest.mark.parametrize("name", others_in_soak(["mlp", "convnet"], "mlp"))
def test_a_compiled_pass_has_equal_steps(monkeypatch, name):
    compiled = torch.nn.Module.compile
    used = []

    def eager(module, **_options):  # the compiler's graphs without its code, which takes a minute
        used.append(module)
        compiled(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    found = steps(SPECS[name], settings_for("on", compile=True, learning_rate=1e-3))
    assert any("weight" in vars(layer) for module in used for layer in module.modules())  # joined
    assert_close(found, steps(SPECS[name], settings_for("off", compile=False, learning_rate=1e-3)))


# --- whole trainings


class Interrupted(LocalContext):
    """A process that ends after an epoch."""

    def __init__(self, folder, last: int) -> None:
        super().__init__(folder, device="cpu")
        self.last = last

    def report(self, record, save):
        super().report(record, save)
        if record is not None and record["epoch"] == self.last:
            raise KeyboardInterrupt


def trained(folder, batched: tuple[str, ...], spec: NetworkSpec = SPECS["mlp"]) -> TrainState:
    """The state of a training that is resumed after each epoch, with a setting for each epoch."""
    data = samples.data(spec.input, spec.tasks, 32)
    for epoch, chosen in enumerate(batched[:-1], 1):
        settings = settings_for(chosen, epochs=len(batched), prune_threshold=0.1, batch_size=8)
        with pytest.raises(KeyboardInterrupt):
            fit(GroupingNetwork(spec), data, settings, Interrupted(folder, epoch))
    return fit(GroupingNetwork(spec), data, replace(settings, batch_branches=batched[-1]), local(folder))


def test_checkpoints_are_the_same_with_and_without(tmp_path):
    found = {
        order: trained(tmp_path / "-".join(order), order)
        for order in (("off",) * 4, ("on",) * 4, ("on", "off", "on", "off"), ("off", "on", "off", "on"))
    }
    expected = found[("off",) * 4]
    names = sorted(checkpoint.load_tensors(_newest(tmp_path / "off-off-off-off") / "optimizer.safetensors"))
    for order, state in found.items():
        assert_close(samples.snapshot(state.network), samples.snapshot(expected.network))
        used = [record["batch_branches"] for record in state.history]
        assert used == [
            chosen == "on" and len({k for row in r["probabilities"] for k, p in enumerate(row) if p}) > 1
            for chosen, r in zip(order, state.history, strict=True)
        ]
        assert [r["val_score"] for r in state.history] == pytest.approx([r["val_score"] for r in expected.history])
        written = _newest(tmp_path / "-".join(order)) / "optimizer.safetensors"
        assert sorted(checkpoint.load_tensors(written)) == names


def _newest(folder):
    return max(folder.glob("checkpoint_*"))


def train_in_group(rank: int, workers: int, folder) -> None:
    """The function of one process."""
    spec = mlp_spec(TASKS, 3, stem=1)
    data = samples.data(spec.input, spec.tasks, 30, missing=0.2, rank=rank, world_size=workers)
    for batched in ("on", "off"):
        settings = settings_for(batched, epochs=3, batch_size=8, prune_threshold=0.1)
        state = fit(GroupingNetwork(spec), data, settings, parallel.ProcessContext())
        assert state.history[0]["batch_branches"] is (batched == "on")
        checkpoint.save_network(folder / f"{batched}_{rank}", state.network)


def test_two_workers_have_equal_results(two_processes, tmp_path):
    two_processes(train_in_group, tmp_path)
    names = [f"{batched}_{rank}" for batched in ("on", "off") for rank in (0, 1)]
    first, *others = [samples.snapshot(checkpoint.load_network(tmp_path / name)) for name in names]
    for network in others:
        assert_close(network, first)


# --- the choice


@pytest.mark.parametrize(
    ("spec", "rows", "chosen"),
    [
        (mlp_spec(TASKS, 3), 64, False),  # it saves too few layers
        (mlp_spec(TASKS, 12), 64, True),
        (replace(mlp_spec(TASKS, 12), encoder=EncoderSpec("mlp", 0, {"widths": [512, 256]})), 64, False),
        (image_spec(MIXED, 3), 4, True),
        (image_spec(MIXED, 3), 4096, False),
    ],
)
def test_on_a_cpu_small_layers_are_batched(spec, rows, chosen):
    settings = TrainSettings(batch_size=rows)
    network = GroupingNetwork(spec)
    assert small(network, rows) is chosen
    prepare_network(network, settings, local())
    assert (network.batched is not None) is chosen


@pytest.mark.parametrize("options", [{"aggregator": "mgda"}, {"recompute": True}, {"compile": True}])
def test_auto_leaves_branches_apart_with_options_that_need_them(options):
    network = GroupingNetwork(mlp_spec(TASKS, 12))
    batch_branches(network, TrainSettings(**options), local())
    assert network.batched is None


@pytest.mark.parametrize("options", [{"aggregator": "mgda"}, {"recompute": True}])
def test_on_names_the_options_that_it_excludes(options):
    with pytest.raises(ValueError, match="batch_branches excludes"):
        TrainSettings(batch_branches="on", **options)


def test_on_names_the_layer_that_does_not_fit_and_auto_leaves_it(monkeypatch):
    encoder = EncoderSpec("text_transformer", 1, {"width": 8, "layers": 3, "heads": 2, "dropout": 0.1})
    tokens = replace(FEATURES, kind="tokens", dtype="int32", vocabulary=20, mean=(0.0,), std=(1.0,))
    spec = NetworkSpec(tokens, TASKS, encoder, 6)
    network = GroupingNetwork(spec)
    with pytest.raises(ValueError, match=r"do not fit one pass: .*self_attn\): its dropout draws random"):
        batch_branches(network, TrainSettings(batch_branches="on"), local())
    monkeypatch.setattr(step_module, "small", lambda _network, _rows: True)
    batch_branches(network, TrainSettings(), local())
    assert network.batched is None


def test_one_branch_is_no_error_and_off_ends_the_pass():
    network = GroupingNetwork(mlp_spec(TASKS, 1))
    batch_branches(network, TrainSettings(batch_branches="on"), local())
    assert network.batched is None
    network = GroupingNetwork(mlp_spec(TASKS, 2))
    batch_branches(network, TrainSettings(batch_branches="on"), local())
    assert network.batched is not None
    batch_branches(network, TrainSettings(batch_branches="off"), local())
    assert network.batched is None


@pytest.mark.parametrize(("seconds", "chosen"), [((1.0, 0.5), True), ((1.0, 1.0), False), ((1.0, 1.5), False)])
def test_another_device_is_measured_and_the_faster_way_is_logged(monkeypatch, caplog, seconds, chosen):
    """The device is the CPU, without its rule: a measurement must change neither network nor gradients."""
    network = GroupingNetwork(SPECS["convnet"])
    context = local()
    context.device = torch.device("meta")  # where the ratio is a tensor without a value
    before = samples.snapshot(network)
    monkeypatch.setattr(choice, "_seconds", lambda work: (work(), seconds[network.batched is not None])[1])
    monkeypatch.setattr(context, "sum", lambda _tensor: seconds[1] / seconds[0], raising=False)
    choice.log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        batch_branches(network, TrainSettings(batch_size=8), context)
    assert (network.batched is not None) is chosen
    assert f"one pass takes {seconds[1]:.2f} of the time" in caplog.text
    samples.assert_same_tensors(samples.snapshot(network), before)
    assert all(p.grad is None for p in network.parameters())
