"""Threads of a training step on the CPU."""

from __future__ import annotations

import pytest
import torch

from dmtg_core import EncoderSpec, GroupingNetwork, InputSpec, NetworkSpec, Task
from dmtg_core.network.cost import training_flops
from dmtg_core.network.threads import BRIEF, step_threads, threads_of_step


@pytest.mark.parametrize(("brief", "operations"), [(False, 10**9), (True, 10**8)])
def test_a_small_step_has_one_thread(monkeypatch, brief: bool, operations: int) -> None:
    monkeypatch.delenv(BRIEF, raising=False)
    if brief:
        monkeypatch.setenv(BRIEF, "10000")
    encoder = EncoderSpec("mlp", options={"widths": [64, 64]})
    network = GroupingNetwork(NetworkSpec(InputSpec("features", (32,)), [Task("a", "binary")], encoder, 2))
    largest = operations // training_flops(network)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert step_threads(network, int(largest)) == 1
        assert step_threads(network, int(largest) + 1) == 3
        with threads_of_step(network, int(largest)):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
