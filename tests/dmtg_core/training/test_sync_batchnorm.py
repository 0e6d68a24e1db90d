"""Batch normalisation over workers on CPUs, compared with torch's batch normalisation of the whole batch."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dmtg_core.training.context import SyncBatchNorm

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "vectors": (nn.BatchNorm1d(7), (16, 7)),
    "sequences": (nn.BatchNorm1d(3, eps=0.1), (16, 3, 5)),
    "maps": (nn.BatchNorm2d(300, momentum=0.3), (16, 300, 4, 2)),
    "volumes without scale": (nn.BatchNorm3d(2, affine=False), (16, 2, 3, 4, 2)),
    "plain means": (nn.BatchNorm2d(4, momentum=None), (16, 4, 3, 3)),
    "no statistics": (nn.BatchNorm2d(4, track_running_stats=False), (16, 4, 3, 3)),
}
PARTS = (slice(0, 5), slice(5, 16))  # of the first and of the second worker
STEPS = 3


def samples_of(name: str, step: int) -> tuple[Tensor, Tensor]:
    """Inputs far from zero, and the gradients of the outputs."""
    generator = torch.Generator().manual_seed(step)
    shape = LAYERS[name][1]
    return torch.randn(shape, generator=generator) * 3 + 20, torch.randn(shape, generator=generator)


def run(layer: nn.Module, name: str, part: slice) -> dict[str, Tensor]:
    """Outputs and gradients of the last step, running statistics after all steps, and outputs in evaluation."""
    for step in range(STEPS):
        layer.zero_grad()
        x, gradient = samples_of(name, step)
        x = x[part].clone().requires_grad_()
        y = layer(x)
        y.backward(gradient[part])
    assert x.grad is not None
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d{key}": p.grad for key, p in layer.named_parameters() if p.grad is not None}
    found |= {f"buffer {key}": b.clone() for key, b in layer.named_buffers()}
    return found | {"evaluated": layer.eval()(x).detach()}


def build(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    layer = copy.deepcopy(LAYERS[name][0]).train()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    return nn.Sequential(layer)


def work(rank: int, workers: int, folder: Path) -> None:
    assert workers == len(PARTS)
    for name in LAYERS:
        layer = build(name)
        SyncBatchNorm.convert(layer, torch.device("cpu"))
        if any(True for _ in layer.parameters()):
            DistributedDataParallel(layer)  # it refuses torch's own layer on CPUs
        save_file(run(layer, name, PARTS[rank]), folder / f"{name}_{rank}.safetensors")


def test_two_workers_normalise_as_one_with_the_whole_batch(two_processes, tmp_path: Path) -> None:
    two_processes(work, tmp_path)
    for name in LAYERS:
        first, second = (load_file(tmp_path / f"{name}_{rank}.safetensors") for rank in range(2))
        expected = run(build(name), name, slice(None))
        assert first.keys() == expected.keys()
        for key, value in expected.items():
            if key in ("y", "dx") or (key == "evaluated" and name != "no statistics"):
                found = torch.cat([first[key], second[key]])
            elif key.startswith("d"):  # data-parallel training sums them
                found = first[key] + second[key]
            elif key == "evaluated":  # without statistics each worker's own batch counts
                continue
            else:
                torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
                found = first[key]
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)


def test_a_single_process_normalises_as_before() -> None:
    for name in LAYERS:
        layer = build(name)
        SyncBatchNorm.convert(layer, torch.device("cpu"))
        torch.testing.assert_close(run(layer, name, slice(None)), run(build(name), name, slice(None)))
