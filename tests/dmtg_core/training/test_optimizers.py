"""The optimizers make torch's own steps, without its compiler."""

import copy

import pytest
import torch

from dmtg_core.training.settings import OPTIMIZERS

TORCH = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
OPTIONS = {"adam": {}, "adamw": {"weight_decay": 0.1}, "sgd": {"momentum": 0.9}}


def steps(make, network, name, count, state=None):
    """Take steps on a copy of a network; its parameters, the state of the optimizer, and the calls of a hook."""
    network, hooked = copy.deepcopy(network), []
    optimizer = make(network.parameters(), lr=0.1, **OPTIONS[name])
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.01})
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))  # its tensors are updated in place
    optimizer.register_step_post_hook(lambda *_: hooked.append(1))
    data = torch.linspace(-1, 1, 12).reshape(4, 3)
    for _ in range(count):
        optimizer.zero_grad()
        (network(data) ** 2).sum().backward()
        optimizer.step()
    assert all(p.grad_fn is None for p in network.parameters())
    return [p.detach() for p in network.parameters()], optimizer.state_dict(), len(hooked)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_the_steps_of_torchs_own(name):
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    found, state, hooked = steps(OPTIMIZERS[name], network, name, 3)
    expected, torchs, _ = steps(TORCH[name], network, name, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert state["param_groups"] == torchs["param_groups"]
    assert hooked == 3
    assert not torch.equal(found[0], network.weight)
    resumed, expected = (steps(make[name], network, name, 2, torchs)[0] for make in (OPTIMIZERS, TORCH))
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)
    assert not torch.equal(resumed[0], steps(TORCH[name], network, name, 2)[0][0])  # the state is used
    assert issubclass(OPTIMIZERS[name], TORCH[name])
