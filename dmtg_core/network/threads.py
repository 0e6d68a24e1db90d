"""Number of threads of a training step on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dmtg_core.network.cost import training_flops
from dmtg_core.network.grouping_network import GroupingNetwork

SMALL_STEP = 10**9  # operations of a step: 50 ms at 20 GFLOP/s
SMALL_STEP_BRIEF = 10**8  # where threads wait for each other without keeping a core for long
BRIEF = "GOMP_SPINCOUNT"  # variable of the environment with which they do; the command `dmtg` sets it


def step_threads(network: GroupingNetwork, batch_size: int) -> int:
    """Return the number of threads for a training step: 1 for a small step, else the current number.

    The operators of a small step take less time than the threads need to wait for each other. On a machine with
    other work, a thread that waits for a core makes such a step many times slower, because the others keep their
    cores while they wait. With `BRIEF` they do not, and smaller steps have several threads.

    The rule depends on the size of the step and on the environment, so that a run is repeatable: a sum over
    another number of threads has other rounding errors.

    Args:
        network: The network.
        batch_size: Number of samples of a step on this worker.
    """
    threads = torch.get_num_threads()
    small = SMALL_STEP_BRIEF if BRIEF in os.environ else SMALL_STEP
    if threads == 1 or training_flops(network) * batch_size >= small:
        return threads
    return 1


@contextmanager
def threads_of_step(network: GroupingNetwork, batch_size: int) -> Iterator[None]:
    """Use `step_threads` for the time of the block. On a GPU the number has no effect on the step."""
    before = torch.get_num_threads()
    torch.set_num_threads(step_threads(network, batch_size))
    try:
        yield
    finally:
        torch.set_num_threads(before)
