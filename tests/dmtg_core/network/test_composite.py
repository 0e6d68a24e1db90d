"""The models of groups as one network."""

import threading
from dataclasses import replace

import pytest
import torch

from dmtg_core import EncoderSpec, GroupingNetwork, InputSpec, NetworkSpec
from dmtg_core.network.composite import Composite
from dmtg_core.network.grouping_network import GroupModel
from tests.dmtg_core.samples import FEATURES, SAMPLEWISE

TASKS = SAMPLEWISE[:4]
ENCODERS = {
    "lora": EncoderSpec("text_transformer", 2, {"width": 16, "layers": 3, "heads": 2}, "lora", {"rank": 2}),
    "last": EncoderSpec("text_transformer", 2, {"width": 16, "layers": 3, "heads": 2}, "last"),
    "copy": EncoderSpec("text_transformer", 1, {"width": 16, "layers": 2, "heads": 2}),
    "tabm": EncoderSpec("tabm", 0, {"width": 8, "blocks": 1}),
}


def models(name: str, groups: int = 3) -> list[GroupModel]:
    """Models of groups with changed branches."""
    tokens = InputSpec("tokens", (10,), "int32", vocabulary=40)
    spec = NetworkSpec(
        FEATURES if name == "tabm" else tokens,
        TASKS,
        ENCODERS[name],
        groups,
        initial="diagonal",
        initial_scale=1.0,
    )
    network = GroupingNetwork(spec).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.branches.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return list(network.specialise().values())


def inputs(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "tabm":
        return torch.randn((5, *FEATURES.shape), generator=generator)
    return torch.randint(1, 40, (5, 10), generator=generator).int()


@pytest.mark.parametrize("name", ENCODERS)
def test_outputs_are_those_of_the_groups(name):
    groups, raw = models(name), inputs(name)
    composite = Composite(groups)
    assert len(composite.models) == 3
    assert (composite.one_stem, composite.one_pass) == (name in ("lora", "last"), name == "lora")
    expected = {task: out for model in groups for task, out in model(raw).items()}
    found = composite(raw)
    assert list(found) == [task.name for task in composite.tasks]
    for task, values in expected.items():
        torch.testing.assert_close(found[task], values, rtol=0, atol=0 if name in ("copy", "tabm") else 1e-5)
    decoded = {task: out for model in groups for task, out in model.predict(raw).items()}
    for task, values in composite.predict(raw).items():
        torch.testing.assert_close(values, decoded[task], rtol=1e-5, atol=1e-5)


def test_a_frozen_stem_runs_once():
    groups, calls = models("lora"), []
    groups[0].network.stem.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        Composite(groups)(inputs("lora"))
    assert len(calls) == 1


def test_updates_of_other_ranks_are_computed_one_after_the_other():
    first, second, _ = models("lora")
    wider = replace(second.spec, encoder=replace(second.spec.encoder, adapter={"rank": 3}))
    other = GroupModel(wider).eval()
    other.network.use_frozen(first.network)
    composite = Composite([first, other])
    assert (composite.one_stem, composite.one_pass) == (True, False)
    expected = first(inputs("lora")) | other(inputs("lora"))
    for task, values in composite(inputs("lora")).items():
        torch.testing.assert_close(values, expected[task], rtol=0, atol=1e-5)


def test_models_of_the_same_stages_are_computed_at_the_same_time():
    """Two requests of a server: the updates of a pass are those of its models only."""
    groups, raw = models("lora", 2), inputs("lora")
    with torch.no_grad():
        expected = [model(raw) for model in groups]
    wrong, start = [], threading.Barrier(2)

    @torch.no_grad()
    def compute(number: int) -> None:
        start.wait()
        for _ in range(200):
            found = groups[number](raw)
            wrong.extend(task for task, out in found.items() if not torch.allclose(out, expected[number][task]))

    threads = [threading.Thread(target=compute, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
