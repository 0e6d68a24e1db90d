"""Weightings of the tasks by torchjd: as the library in a bare loop, on any number of workers, after a resume."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchjd.scalarization as published

from dmtg_core import GroupingNetwork, TrainSettings, TrainState, fit
from dmtg_core.network.spec import TASK_WEIGHTINGS
from dmtg_core.training.checkpoint import load_network, load_tensors, save_network, save_tensors
from dmtg_core.training.losses import sample_loss
from dmtg_core.training.objective.scalarizers import SCALARIZERS, STCH_MU, TaskWeighting, task_weighting
from dmtg_core.training.settings import resolve
from dmtg_core.training.step import WeighedLoss, step_noise, train_step
from tests.dmtg_core import parallel, samples
from tests.dmtg_core.interrupted import Interrupted, without_times
from tests.dmtg_core.network.test_grouping_network import pair_outputs
from tests.dmtg_core.samples import SAMPLEWISE, assert_same_tensors, image_spec, mlp_spec
from tests.dmtg_core.training.test_loop import SEARCHING
from tests.dmtg_core.training.test_resume import stopping_after
from tests.dmtg_core.training.test_step import fresh, local

NAMES = tuple(SCALARIZERS)
SETTINGS = TrainSettings(optimizer="adam", learning_rate=0.01, seed=5)
EPOCHS, STEPS, RATE = 4, 3, 0.01


def library(name: str, tasks: int) -> published.Scalarizer:
    made = {
        "dwa": published.DWA, "geometric_mean": published.GeometricMean, "random": published.Random,
        "stch": lambda: published.STCH(STCH_MU),
    }  # fmt: skip
    sized = {"famo": published.FAMO, "imtl_l": published.IMTLL, "uw": published.UW}
    return made[name]() if name in made else sized[name](tasks)


def gated_losses(network: GroupingNetwork, batch) -> torch.Tensor:
    """Σ_k g[n, k] · L_n of a batch, times the fixed weight of each task."""
    outputs, gate = pair_outputs(network, network.forward_pairs(batch.inputs)), network.gate(1.0, torch.zeros(()))
    values = [torch.zeros(()) for _ in network.tasks]
    for (k, n), output in outputs.items():
        task = network.tasks[n]
        values[n] = values[n] + gate[n, k] * sample_loss(task, output, batch.targets[task.name]).mean()
    return torch.stack([task.weight * value for task, value in zip(network.tasks, values, strict=True)])


def bare_loop(network: GroupingNetwork, name: str, batches) -> None:
    """Train with the library alone, as its documentation says."""
    scalarizer = library(name, len(network.tasks))
    own = [] if name == "famo" else list(scalarizer.parameters())
    optimizer = torch.optim.Adam([*network.parameters(), *own], lr=RATE)
    for step, batch in enumerate(batches):
        with torch.random.fork_rng():
            torch.manual_seed(SETTINGS.seed * 1_000_003 + step)
            loss = scalarizer(gated_losses(network, batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if name == "famo":
            with torch.no_grad():
                scalarizer.update(gated_losses(network, batch))
        if name == "dwa" and step % STEPS == STEPS - 1:
            scalarizer.step()


def furthest(found: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two networks."""
    return max(float((found[key].float() - other[key].float()).abs().max()) for key in found)


@pytest.mark.parametrize("name", NAMES)
def test_training_equals_the_library_in_a_bare_loop(name):
    spec = mlp_spec(SAMPLEWISE[:4], 2, sampling="softmax", task_weighting=name)
    batches = [samples.batch(spec.input, spec.tasks, 12, seed=step) for step in range(EPOCHS * STEPS)]
    state = fresh(spec, SETTINGS)
    bare = copy.deepcopy(state.network)
    bare_loop(bare, name, batches)
    plain = fresh(replace(spec, task_weighting="fixed"), SETTINGS)
    for trained in (state, plain):
        module = WeighedLoss(trained.network, weighting=trained.weighting).train()
        for step, batch in enumerate(batches):
            noise = torch.zeros(len(spec.tasks), 2)
            train_step(module, trained.optimizer, batch, noise, 1.0, SETTINGS, local(), step=step)
            if trained.weighting is not None and step % STEPS == STEPS - 1:
                trained.weighting.end_epoch()
    found, expected = samples.snapshot(state.network), samples.snapshot(bare)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=key)
    without = samples.snapshot(plain.network)
    assert furthest(found, without) > 20 * furthest(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_without_labels_keeps_its_value_and_has_no_weight(name):
    weighting, scalarizer = TaskWeighting(name, [1.0, 2.0, 1.0], SETTINGS), library(name, 3)
    every, some = torch.tensor([True] * 3), torch.tensor([True, False, True])
    # the second task has the value 2 · 0.5 in the first step, and keeps it in the second
    steps = [([0.3, 0.5, 0.9], every, [0.3, 1.0, 0.9]), ([0.2, 0.0, 1.1], some, [0.2, 1.0, 1.1])]
    for step, (losses, present, values) in enumerate(steps):
        found = weighting.weigh(torch.tensor(losses), present, step)
        held = torch.tensor(values, requires_grad=True)
        with torch.random.fork_rng():
            torch.manual_seed(step)
            (expected,) = torch.autograd.grad(scalarizer(held), held)
        torch.testing.assert_close(found, expected * present)
        assert found.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_finite_for_a_loss_of_0_and_before_a_task_had_labels(name):
    weighting = TaskWeighting(name, [1.0, 1.0], SETTINGS)
    assert weighting.weigh(torch.tensor([0.0, 0.4]), torch.tensor([False, True]), 0).isfinite().all()
    assert weighting.weigh(torch.tensor([0.0, 0.4]), torch.tensor([True, True]), 1).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_run_interrupted_within_or_after_an_epoch_has_the_same_result(tmp_path, name):
    spec = mlp_spec(SAMPLEWISE[:5], 2, task_weighting=name)
    data = samples.data(spec.input, spec.tasks, 32, missing=0.4)
    settings = replace(SEARCHING, epochs=4, checkpoint_every=1)
    expected = fit(GroupingNetwork(spec), data, settings, local())
    assert len({record["heads"] for record in expected.history}) >= 2
    steps = data.steps(settings.batch_size)
    assert steps > 1
    for writes in (1, 3 * steps, 3 * steps + 1):  # within the first epoch, after the third, within the fourth
        folder = tmp_path / str(writes)
        with pytest.raises(Interrupted):
            fit(GroupingNetwork(spec), data, settings, stopping_after(local(folder), writes))
        resumed = fit(GroupingNetwork(spec), data, settings, local(folder))
        assert_same_tensors(samples.snapshot(resumed.network), samples.snapshot(expected.network))
        assert without_times(resumed.history) == without_times(expected.history)
        assert_same_tensors(resumed.weighting.state(), expected.weighting.state())


OF_TWO = replace(parallel.SETTINGS, aggregator="sum", learning_rate=0.01, epochs=3)
OTHERS = tuple(name for name in NAMES if name not in ("dwa", "famo", "imtl_l"))


def work(rank: int, workers: int, folder: Path, names: tuple[str, ...]) -> None:
    """The function of one process: train with each scalarizer."""
    for name in names:
        spec = replace(parallel.spec_for("gumbel"), task_weighting=name)
        data = samples.data(spec.input, spec.tasks, parallel.ROWS, missing=0.4, rank=rank, world_size=workers)
        state = fit(GroupingNetwork(spec), data, OF_TWO, parallel.ProcessContext())
        save_network(folder / f"{name}_{rank}", state.network)
        save_tensors(folder / f"{name}_{rank}.safetensors", state.weighting.state())


@pytest.mark.parametrize(
    "names", [("dwa", "famo", "imtl_l"), pytest.param(OTHERS, marks=pytest.mark.soak)], ids=["some", "others"]
)
def test_two_workers_have_the_result_of_one(two_processes, tmp_path, names):
    two_processes(work, tmp_path, names)
    for name in names:
        spec = replace(parallel.spec_for("gumbel"), task_weighting=name)
        data = samples.data(spec.input, spec.tasks, parallel.ROWS, missing=0.4)
        expected = fit(GroupingNetwork(spec), data, OF_TWO, local())
        both = [load_tensors(tmp_path / f"{name}_{rank}.safetensors") for rank in range(2)]
        assert_same_tensors(*both)
        for key, value in expected.weighting.state().items():
            torch.testing.assert_close(both[0][key], value, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
        for rank in range(2):
            for key, value in samples.snapshot(load_network(tmp_path / f"{name}_{rank}")).items():
                held = expected.network.state_dict()[key]
                torch.testing.assert_close(value, held, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")


def test_the_second_pass_of_famo_does_not_change_running_statistics():
    spec = image_spec(SAMPLEWISE[:3], 2)
    batch, found = samples.batch(spec.input, spec.tasks, 6), {}
    for name in ("fixed", "famo"):
        state = fresh(replace(spec, task_weighting=name), SETTINGS)
        module = WeighedLoss(state.network, weighting=state.weighting).train()
        train_step(
            module, state.optimizer, batch, step_noise(state.network, SETTINGS, 0, 0, 6), 1.0, SETTINGS, local()
        )
        found[name] = dict(state.network.named_buffers())
    assert any("running_mean" in key for key in found["famo"])
    assert_same_tensors(found["famo"], found["fixed"])


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd.scalarization", None)
    with pytest.raises(ValueError, match=r"'dwa' needs a library .*pip install 'dmtg\[aggregators\]'"):
        fresh(mlp_spec(task_weighting="dwa"), SETTINGS)


def test_the_names_are_those_of_the_network():
    assert ("fixed", "uncertainty", *SCALARIZERS) == TASK_WEIGHTINGS
    for name in ("fixed", "uncertainty"):
        assert task_weighting(GroupingNetwork(mlp_spec(task_weighting=name)), SETTINGS) is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stch", {"accumulate": 2}, "needs the losses of a whole batch: set accumulate to 1"),
        ("imtl_l", {"aggregator": "upgrad"}, "both weight the tasks: choose one"),
        ("famo", {"cuda_graphs": True}, "computes each batch twice: set cuda_graphs to false"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ValueError, match=f"task_weighting '{name}' .*{message}"):
        fresh(mlp_spec(task_weighting=name), replace(SETTINGS, **options))


def test_cuda_graphs_are_not_chosen_for_famo():
    device = torch.device("cuda")
    chosen = {
        name: resolve(replace(SETTINGS, precision="fp32"), GroupingNetwork(mlp_spec(task_weighting=name)), device)
        for name in ("fixed", "dwa", "famo")
    }
    assert {name: found.cuda_graphs for name, found in chosen.items()} == {
        "fixed": True,
        "dwa": True,
        "famo": False,
    }


def test_a_group_model_and_its_network_need_no_library(tmp_path, monkeypatch):
    spec = mlp_spec(task_weighting="imtl_l")
    save_network(tmp_path, GroupingNetwork(spec))
    monkeypatch.setitem(sys.modules, "torchjd.scalarization", None)
    network = load_network(tmp_path)
    assert network.spec.task_weighting == "imtl_l"
    assert {model.network.spec.task_weighting for model in network.specialise().values()} == {"fixed"}
    assert TrainState.fresh(next(iter(network.specialise().values())).network, SETTINGS).weighting is None
