"""A training step on a GPU: the published step in float32 against ours, pruned, in bfloat16, with CUDA graphs.

The rows exist only on a machine with a GPU. Each row notes the images per second and the model FLOP utilisation of
our step (FLOPs of forward and backward pass over the peak of the device in this time), and the share of an epoch
from host memory in which the device waits for batches. For a whole run, `dmtg train --profile` and the metrics of
each epoch have this share.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.steps import arrays_of, batch_of, grouping_of_five, ours, published, taskonomy
from dmtg_core import ArrayData, GroupingNetwork, NetworkSpec
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState

# dense bfloat16 FLOP/s of the data sheets, by a part of the device's name
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
CALLS, WARM_UP = 10, 5
Costs = tuple[Callable[[], float], Callable[[], float], Callable[[], dict[str, Any]]]


def timed(step: Callable[[], object], device: str) -> Callable[[], float]:
    """Measure the seconds of a call with synchronisation. The first calls compile and are not measured."""
    for _ in range(WARM_UP):
        step()

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def cost() -> float:
        wait()
        started = time.perf_counter()
        for _ in range(CALLS):
            step()
        wait()
        return (time.perf_counter() - started) / CALLS

    return cost


def step_flops(spec: NetworkSpec, rows: int) -> float:
    """Compute the FLOPs of a pruned step, two for each multiply-add: three times those of its forward pass.

    The backward pass is not counted directly, because PyTorch's counter counts its grouped convolutions as full
    ones.
    """
    state = TrainState.fresh(GroupingNetwork(spec), TrainSettings())
    state.keep(grouping_of_five(spec), TrainSettings())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        state.network.forward_pairs(batch_of(spec, 1).inputs)
    return 3.0 * rows * counter.get_total_flops()


def waiting_share(step: Callable[..., object], spec: NetworkSpec, rows: int, device: str, held: float) -> float:
    """Measure the share of a step's time spent waiting for its batch if batches come from host memory.

    Args:
        held: Seconds of a step with a batch on the device.
    """
    data = ArrayData({"train": arrays_of(spec, rows * CALLS)}, spec.tasks, device=device)

    def epoch(number: int) -> float:
        started = time.perf_counter()
        for batch in data.train(number, rows):
            step(batch)
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / CALLS

    return max(0.0, 1 - held / min(epoch(number) for number in range(4)))


def against_published(rows: int, size: int = 256, device: str = "cuda", precision: str = "bf16") -> Costs:
    """Compare the published step with ours on the published network of five tasks, K = 3."""
    spec = taskonomy(size)
    step = ours(spec, rows, pruned=True, device=device, precision=precision, graphs=True)
    mine = timed(step, device)
    theirs = timed(published(spec, rows, device), device)

    def notes() -> dict[str, Any]:
        seconds = min(mine() for _ in range(3))
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        peak = next((flops for part, flops in PEAK.items() if part in name), None)
        used = step_flops(spec, rows) / seconds
        return {
            "device": name,
            "images_per_second": round(rows / seconds, 1),
            "flops_per_second": used,
            "model_flop_utilisation": peak and round(used / peak, 4),
            "waiting_for_data": round(waiting_share(step, spec, rows, device, seconds), 4),
        }

    return theirs, mine, notes


def rows() -> dict[str, tuple[str, float, Callable[[], Costs]]]:
    """Return the rows of this machine. There are none without a GPU."""
    if not torch.cuda.is_available():
        return {}
    return {f"step_gpu_{n}": ("at_least", 6, lambda n=n: against_published(n)) for n in (24, 48, 96)}
