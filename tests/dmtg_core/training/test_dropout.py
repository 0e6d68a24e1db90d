"""Dropout of the small encoders: that of torch, with seeds that a resumed run repeats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dmtg_core import EncoderSpec, GroupingNetwork, InputSpec, NetworkSpec, Task, TrainSettings, fit
from dmtg_core.network.encoders import build_encoder
from tests.dmtg_core import samples
from tests.dmtg_core.interrupted import Interrupted, interrupt_at, without_times
from tests.dmtg_core.samples import assert_same_tensors, snapshot
from tests.dmtg_core.training.test_step import local

INPUTS = {
    "mlp": InputSpec("features", (6,)),
    "convnet": InputSpec("image", (16, 16, 3), "uint8", std=(255.0,)),
    "embedding_bag": InputSpec("tokens", (7,), "int32", vocabulary=20),
}
OPTIONS = {"mlp": {"widths": [8, 4]}, "convnet": {"widths": [4, 8]}, "embedding_bag": {"widths": [8, 4]}}
TASKS = (Task("a", "binary"), Task("b", "regression"))
SETTINGS = TrainSettings(epochs=3, batch_size=8, learning_rate=1e-2)


def branch(name: str, **options: float) -> nn.Module:
    """A branch in training mode; its weights do not depend on the options."""
    _, (found,), *_ = build_encoder(EncoderSpec(name, 0, {**OPTIONS[name], **options}), INPUTS[name], 1, 0)
    return found.train()


def rows(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if name == "embedding_bag":
        return torch.randint(1, 20, (64, 7), generator=generator)
    return torch.randn((64, 3, 16, 16) if name == "convnet" else (64, 6), generator=generator)


@pytest.mark.parametrize("name", OPTIONS)
def test_without_dropout_nothing_changes(name: str) -> None:
    assert repr(branch(name)) == repr(branch(name, dropout=0.0))
    assert "Dropout" not in repr(branch(name))
    with_it = branch(name, dropout=0.5)
    assert with_it.state_dict().keys() == branch(name).state_dict().keys()
    x = rows(name)
    torch.testing.assert_close(with_it.eval()(x), branch(name).eval()(x), rtol=0, atol=0)


def test_the_layers_are_torch_s() -> None:
    """The same weights and random state in a network of torch give the same values."""
    x = rows("mlp")
    ours = branch("mlp", dropout=0.5)
    linear = [layer for layer in ours.modules() if isinstance(layer, nn.Linear)]
    torch.manual_seed(3)
    found = ours(x)
    torch.manual_seed(3)
    expected = x
    for layer in linear:
        expected = nn.functional.dropout(layer(expected).relu(), 0.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_convnet_drops_channels_of_its_last_stage() -> None:
    out = branch("convnet", dropout=0.5)(rows("convnet"))  # (64, 8, 4, 4), after ReLU
    gone = (out == 0).flatten(2).all(2)
    assert 0.4 < float(gone.float().mean()) < 0.6
    kept = branch("convnet")(rows("convnet"))
    torch.testing.assert_close(out[~gone], 2 * kept[~gone])


def spec_of(name: str) -> NetworkSpec:
    return NetworkSpec(INPUTS[name], TASKS, EncoderSpec(name, 0, {**OPTIONS[name], "dropout": 0.3}), groups=2)


@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_a_resumed_run_draws_the_same_values(tmp_path: Path, name: str) -> None:
    spec = spec_of(name)
    data = samples.data(spec.input, spec.tasks, 32)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    expected = fit(GroupingNetwork(spec), data, SETTINGS, local())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    with pytest.raises(Interrupted):
        fit(GroupingNetwork(spec), data, SETTINGS, local(tmp_path, on_record=interrupt_at(2)))
    resumed = fit(GroupingNetwork(spec), data, SETTINGS, local(tmp_path))
    assert without_times(resumed.history) == without_times(expected.history)
    assert_same_tensors(snapshot(resumed.network), snapshot(expected.network))
    plain = replace(spec, encoder=replace(spec.encoder, options=OPTIONS[name]))
    other = fit(GroupingNetwork(plain), data, SETTINGS, local())
    assert other.history[-1]["train_loss"] != expected.history[-1]["train_loss"]
