"""What decides between K branches in one pass and one after the other: a trial, a rule, a measurement."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from dmtg_core.network.batched.branches import BatchedBranches
from dmtg_core.network.batched.layers import NotBatchableError
from dmtg_core.network.cost import training_flops
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.inputs import random_input

log = logging.getLogger(__name__)

# On a CPU one pass saves the time of dispatching operators, and its products are no faster. It is chosen if it
# saves this many layers, and if a layer has at most this many operations in a step (docs/howto/speed.md: figures).
SAVED_LAYERS, SMALL_LAYER = 20, 4_000_000
ROUNDS, PASSES = 7, 5  # of the measurement on a GPU


def built(network: GroupingNetwork) -> BatchedBranches:
    """Build the batched branches of a network.

    Raises:
        ValueError: If the branches cannot be computed in one pass. The message names the layer.
    """
    try:
        return BatchedBranches(dict(network.branches.items()), features_of_stem(network))
    except NotBatchableError as error:
        raise ValueError(f"the branches do not fit one pass: {error}") from error


def small(network: GroupingNetwork, batch_size: int) -> bool:
    """Whether dispatching operators takes most of the time of a step on a CPU, see `SAVED_LAYERS`."""
    count = len(network.branches)
    branch = network.branches.values()[0]
    layers = sum(1 for layer in branch.modules() if any(True for _ in layer.parameters(recurse=False)))
    if (count - 1) * layers < SAVED_LAYERS:
        return False
    return training_flops(network) * batch_size <= SMALL_LAYER * count * layers


@cache
def log_once(message: str) -> None:
    """Log a message, unless this process has logged it."""
    log.info(message)


def _raw(network: GroupingNetwork, rows: int) -> Tensor:
    return random_input(network.spec.input, rows).to(network.gate.logits.device)


@torch.no_grad()
def features_of_stem(network: GroupingNetwork) -> Tensor:
    """Output of the stem for a few samples. Running statistics do not change."""
    was_training = network.training
    network.eval()
    found: Tensor = network.stem(network.normalise(_raw(network, 3)))
    network.train(was_training)
    return found


def measured(network: GroupingNetwork, batched: BatchedBranches, batch_size: int, precision: str) -> float:
    """Measure forward and backward passes of the encoders: time of one pass ÷ one after the other."""
    raw = _raw(network, max(batch_size, 2))
    was_training, held = network.training, [buffer.clone() for buffer in network.buffers()]
    network.train()

    def seconds(chosen: BatchedBranches | None) -> float:
        network.batched = chosen
        return _seconds(lambda: _forward_and_backward(network, raw, precision))

    seconds(None), seconds(batched)
    ratios = [1 / seconds(None) * seconds(batched) for _ in range(ROUNDS)]
    network.batched = None
    for buffer, value in zip(network.buffers(), held, strict=True):
        buffer.copy_(value)
    network.train(was_training)
    return statistics.median(ratios)


def _forward_and_backward(network: GroupingNetwork, raw: Tensor, precision: str) -> None:
    with torch.autocast(raw.device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = network.features(raw)
    loss = torch.stack([value.float().square().mean() for value in features.values()]).sum()
    torch.autograd.grad(loss, [p for p in network.branches.parameters() if p.requires_grad], allow_unused=True)


def _seconds(work: Callable[[], None]) -> float:
    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    wait()
    started = time.perf_counter()
    for _ in range(PASSES):
        work()
    wait()
    return time.perf_counter() - started
