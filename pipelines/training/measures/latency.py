"""Inference cost: parameters, operations and measured time of a run's models and of the baselines."""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from dmtg_core.input_spec import InputSpec
from dmtg_core.network.cost import inference_cost
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.tasks import Task
from pipelines.runs.results import ALL, NAIVE, SINGLE

SECONDS, FEWEST = 0.05, 3  # least duration of a measurement, and least number of passes
LARGE = 32  # samples of the larger batch


def costs(network: GroupingNetwork, spec: NetworkSpec) -> dict[str, Any]:
    """Cost of each group, of all groups, of naive MTL, and of single-task networks, on the network's device.

    Args:
        network: A hard network in evaluation mode.
        spec: The configured network; naive MTL and single-task networks have its encoder.
    """
    device = network.gate.logits.device
    alone = replace(spec.without_weights(), groups=1, sampling="fixed")
    rows = [
        {"name": name, "tasks": [task.name for task in model.tasks], **measured(model, spec.input, device)}
        for name, model in network.specialise().items()
    ]
    names = [task.name for task in spec.tasks]
    rows += [
        {"name": ALL, "tasks": names, **measured(network, spec.input, device)},
        {"name": NAIVE, "tasks": names, **measured(_fresh(alone, device), spec.input, device)},
        {"name": SINGLE, "tasks": names, **_single(alone, device)},
    ]
    return {"device": name_of(device), "threads": torch.get_num_threads(), "batches": [1, LARGE], "rows": rows}


def measured(network: Any, spec: InputSpec, device: torch.device) -> dict[str, Any]:
    """Parameters, operations, and the median milliseconds of a batch of each size."""
    return asdict(inference_cost(network)) | {
        "milliseconds": [milliseconds(network, spec, device, size) for size in (1, LARGE)]
    }


@torch.inference_mode()
def milliseconds(network: nn.Module, spec: InputSpec, device: torch.device, size: int) -> float:
    """Median time of a batch that is on the device."""
    inputs = torch.ones(size, *spec.shape, dtype=getattr(torch, spec.dtype), device=device)

    def once() -> float:
        start = time.perf_counter()
        network(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()  # warm-up
    times: list[float] = []
    while len(times) < FEWEST or sum(times) < SECONDS:
        times.append(once())
    return 1000 * statistics.median(times)


def name_of(device: torch.device) -> str:
    """The name of a device."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU ({platform.machine()})"


def _fresh(spec: NetworkSpec, device: torch.device) -> GroupingNetwork:
    return GroupingNetwork(spec).to(device).eval()


def _single(alone: NetworkSpec, device: torch.device) -> dict[str, Any]:
    """Sum over the tasks; tasks of one kind and width have equal networks."""
    equal: dict[tuple[str, int], list[Task]] = {}
    for task in alone.tasks:
        equal.setdefault((task.kind, task.channels), []).append(task)
    found = [
        (len(tasks), measured(_fresh(replace(alone, tasks=(tasks[0],)), device), alone.input, device))
        for tasks in equal.values()
    ]
    return {
        "parameters": _sum((count, one["parameters"]) for count, one in found),
        "flops": _sum((count, one["flops"]) for count, one in found),
        "milliseconds": [_sum((count, one["milliseconds"][i]) for count, one in found) for i in range(2)],
    }


def _sum(parts: Any) -> Any:
    return sum(count * value for count, value in parts)
