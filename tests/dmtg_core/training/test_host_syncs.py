"""A training step without synchronisation: the host does not wait for the device."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dmtg_core import (
    GroupingNetwork,
    LocalContext,
    NetworkSpec,
    Task,
    TrainSettings,
    TrainState,
)
from dmtg_core.training.step import WeighedLoss, step_noise, train_step
from tests.dmtg_core import samples
from tests.dmtg_core.host_syncs import HostSyncs
from tests.dmtg_core.samples import SAMPLEWISE, image_spec, mlp_spec
from tests.dmtg_core.training.test_step import fresh, local


@pytest.fixture
def syncs(monkeypatch):
    """The counter, which also sees what reads a CPU tensor past the dispatcher."""
    counter = HostSyncs()
    for name in ("tolist", "numpy", "cpu"):
        plain = getattr(torch.Tensor, name)

        def counted(tensor, *args, _plain=plain, _name=name, **kwargs):
            counter.found[_name] += 1
            return _plain(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return counter


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(), lambda t: float(t[0]), lambda t: bool(t[0] > 0), lambda t: t.tolist(),
        lambda t: t[t > 0], lambda t: t.nonzero(), lambda t: t.masked_select(t > 0), lambda t: torch.equal(t, t),
        lambda t: torch.where(t > 0), lambda t: t.unique(), lambda t: t.numpy(), lambda t: [0, 1][int(t[0])],
        lambda t: t.index_put_((t > 0,), torch.tensor(1.0)), lambda t: t.clone().__setitem__(t > 0, t[:0]),
    ],
)  # fmt: skip
def test_the_counter_finds_operations_that_wait(syncs, read):
    value = torch.tensor([0.0, 0.0])
    with syncs:
        read(value)
    assert sum(syncs.found.values()) >= 1


def wide_spec() -> NetworkSpec:
    """4·40 heads of every kind, three of the tasks dense."""
    small = [
        replace(SAMPLEWISE[n % len(SAMPLEWISE)], name=f"{SAMPLEWISE[n % len(SAMPLEWISE)].name}_{n}")
        for n in range(37)
    ]
    return image_spec([*small, *samples.DENSE[:3]], groups=4)


@pytest.mark.parametrize("sampling", ["gumbel", "gumbel_per_sample", "straight_through"])
def test_a_step_of_160_heads_reads_nothing_back(syncs, sampling):
    spec = replace(wide_spec(), sampling=sampling)
    settings = TrainSettings(clip_norm=1.0, entropy_weight=0.1)
    state = fresh(spec, settings)
    batch = samples.batch(spec.input, spec.tasks, missing=0.2)
    module, context = WeighedLoss(state.network, 0.1).train(), local()
    noise = step_noise(state.network, settings, 0, 0, len(batch.inputs))
    assert len(state.network.pairs) == 160
    syncs.found.clear()  # operations of the creation of the batch
    with syncs:
        train_step(module, state.optimizer, batch, noise, 1.0, settings, context)
    assert not syncs.found
    assert syncs.seen["convolution_backward"] > 0
    assert syncs.seen["_fused_adam_"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_of_160_heads_never_waits_for_the_gpu():
    spec, settings = wide_spec(), TrainSettings(clip_norm=1.0, entropy_weight=0.1)
    device = torch.device("cuda")
    state = TrainState.fresh(GroupingNetwork(spec).to(device), settings)
    module, context = WeighedLoss(state.network, 0.1).to(device).train(), LocalContext(device=device)
    arrays = samples.arrays(spec.input, spec.tasks, 5, missing=0.2)
    batch = arrays.batch(spec.tasks, np.arange(5), device)
    noise = step_noise(state.network, settings, 0, 0, 5).to(device)
    train_step(module, state.optimizer, batch, noise, 1.0, settings, context)  # allocates what it needs once
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(module, state.optimizer, batch, noise, 1.0, settings, context)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_work_of_a_step_hardly_grows_with_the_number_of_small_tasks():
    counts = []
    for tasks in (10, 40):
        spec, settings = mlp_spec([Task(f"t{n}", "binary") for n in range(tasks)]), TrainSettings()
        state, batch = fresh(spec, settings), samples.batch(spec.input, spec.tasks)
        module = WeighedLoss(state.network).train()
        noise = step_noise(state.network, settings, 0, 0, 5)
        with HostSyncs() as counter:
            train_step(module, state.optimizer, batch, noise, 1.0, settings, local())
        counts.append(sum(counter.seen.values()))
    assert counts[1] - counts[0] <= 30 * 12  # a target's mask, its count and its place in the stack
