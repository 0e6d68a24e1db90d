"""Tasks of every kind, raw labels for them, and small networks, for all tests of the core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmtg_core import ArrayData, Arrays, Batch, EncoderSpec, GroupingNetwork, InputSpec, NetworkSpec, Task
from dmtg_core.search.feature_overlap import CROWDED

FEATURES = InputSpec("features", (6,), mean=(0.5,), std=(2.0,))
IMAGE = InputSpec("image", (16, 16, 3), "uint8", mean=(127.5, 120.0, 130.0), std=(60.0, 61.0, 62.0))

# Several heads have the same loss and width, and several differ, so that batching by family is tested.
SAMPLEWISE = (
    Task("smiling", "binary"),
    Task("colour", "multiclass", 3),
    Task("age", "regression", offset=(40.0,), scale=(15.0,)),
    Task("hat", "binary", weight=2.0),
    Task("shape", "multiclass", 3, ignore_index=255),
    Task("material", "multiclass", 5),
    Task("position", "regression", 2, loss="l1", offset=(1.0, 2.0), scale=(3.0, 4.0)),
    Task("speed", "regression", 2, loss="l1"),
    Task("mass", "regression", loss="smooth_l1"),
    Task("beard", "binary"),
)
DENSE = (
    Task("segments", "dense_classification", 4, ignore_index=0),
    Task("depth", "dense_regression", offset=(1500.0,), scale=(1000.0,), valid_below=8192.0),
    Task("normals", "dense_regression", 3, loss="l1_shift", metric="within_30", offset=(127.5,), scale=(127.5,)),
    Task("edges", "dense_regression", loss="mse", offset=(700.0,), scale=(1000.0,)),
)
MIXED = (SAMPLEWISE[0], DENSE[0], *SAMPLEWISE[1:7], DENSE[1], SAMPLEWISE[7], DENSE[2], *SAMPLEWISE[8:], DENSE[3])
ONE_OF_EACH = (SAMPLEWISE[0], SAMPLEWISE[1], SAMPLEWISE[6], DENSE[0], DENSE[2])


def raw_labels(task: Task, rows: int, rng: np.random.Generator, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """Stored labels of a task, as in its files."""
    area = size if task.dense else ()
    if task.classes:
        return rng.integers(0, task.channels, (rows, *area)).astype(np.uint8)
    if task.kind == "binary":
        return rng.integers(0, 2, rows).astype(np.uint8)
    channels = (task.channels,) if task.channels > 1 else ()
    if task.dense:
        return rng.integers(0, 2**16 if task.channels == 1 else 256, (rows, *area, *channels)).astype(np.uint16)
    return rng.normal(10.0, 5.0, (rows, *channels)).astype(np.float32)


def arrays(spec: InputSpec, tasks: Sequence[Task], rows: int, *, seed: int = 0, missing: float = 0.0) -> Arrays:
    """Random samples; a share `missing` of every task's labels is absent."""
    rng = np.random.default_rng(seed)
    if spec.kind == "image":
        inputs = rng.integers(0, 256, (rows, *spec.shape)).astype(np.uint8)
    else:
        inputs = rng.normal(size=(rows, *spec.shape)).astype(np.float32)
    size = spec.shape[:2] if spec.kind == "image" else (0, 0)
    labels = {task.name: raw_labels(task, rows, rng, size) for task in tasks}
    present = {}
    if missing:
        present = {t.name: rng.random((rows, *size) if t.dense else rows) >= missing for t in tasks}
    return Arrays(inputs, labels, present)


def data(
    spec: InputSpec, tasks: Sequence[Task], rows: int = 48, *, missing: float = 0.0, **options: Any
) -> ArrayData:
    """Training, validation and test data of random samples."""
    splits = {
        name: arrays(spec, tasks, rows, seed=i, missing=missing) for i, name in enumerate(("train", "val", "test"))
    }
    return ArrayData(splits, tasks, **options)


def batch(spec: InputSpec, tasks: Sequence[Task], rows: int = 5, *, seed: int = 0, missing: float = 0.0) -> Batch:
    """One encoded batch."""
    return arrays(spec, tasks, rows, seed=seed, missing=missing).batch(tasks, np.arange(rows), torch.device("cpu"))


def crowded(spec: NetworkSpec) -> NetworkSpec:
    """A spec with so many tasks that their overlap is measured in an encoder of its own."""
    copies = -(-(CROWDED + 1) * spec.groups // len(spec.tasks))
    tasks = tuple(replace(task, name=f"{task.name}_{i}") for i in range(copies) for task in spec.tasks)
    return replace(spec, tasks=tasks)


def mlp_spec(tasks: Sequence[Task] = SAMPLEWISE, groups: int = 3, *, stem: int = 0, **options: Any) -> NetworkSpec:
    """A small network on features."""
    return NetworkSpec(FEATURES, tuple(tasks), EncoderSpec("mlp", stem, {"widths": [8, 4]}), groups, **options)


def image_spec(
    tasks: Sequence[Task] = MIXED, groups: int = 3, *, encoder: str = "convnet", stem: int = 1, **options: Any
) -> NetworkSpec:
    """A small network on images."""
    chosen = {"widths": [6, 8, 8]} if encoder == "convnet" else {}
    return NetworkSpec(IMAGE, tuple(tasks), EncoderSpec(encoder, stem, chosen), groups, decoder_width=8, **options)


def assigned(network: GroupingNetwork, branches: Sequence[int], *, by: float = 3.0) -> GroupingNetwork:
    """The network with its gate set so that task n prefers `branches[n]`."""
    with torch.no_grad():
        network.gate.logits.zero_()
        for n, k in enumerate(branches):
            network.gate.logits[n, k] = by
    return network


def learn_statistics(network: GroupingNetwork, inputs: Tensor) -> GroupingNetwork:
    """The network in evaluation mode, with changed running statistics and biases."""
    network.train()
    with torch.no_grad():
        network.forward_pairs(inputs)
        generator = torch.Generator().manual_seed(1)
        for bias in network.bank.biases.values():
            bias.copy_(torch.randn(bias.shape, generator=generator))
    return network.eval()


def snapshot(network: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the state of a network."""
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that two states have the same names and equal bits."""
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not different, f"differ: {different}"
