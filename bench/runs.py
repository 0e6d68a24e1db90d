"""Whole runs: gain of progressive pruning, cost of a search in runs of naive MTL, checkpoints, two workers.

They train on small rendered rooms with five dense tasks, rendered once into work/bench.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.steps import FACES, FIVE, batch_of, binary, timed
from dmtg_core import (
    ArrayData,
    Arrays,
    EncoderSpec,
    GroupingNetwork,
    InputSpec,
    LocalContext,
    Metrics,
    NetworkSpec,
    TrainSettings,
    TrainState,
    evaluate,
    fit,
    normalized_gain,
    train_step,
)
from dmtg_core.training.step import WeighedLoss, step_noise
from pipelines.data.sources.rooms.scene import render_scene
from pipelines.data.sources.taskonomy.tasks import TASKS

ROOT = Path("work/bench")
SIZE, TRAIN, VAL = 64, 192, 64
SETTINGS = TrainSettings(epochs=6, search_share=0.5, batch_size=16, learning_rate=3e-3, gate_learning_rate=0.05)
Costs = tuple[Callable[[], float], Callable[[], float], Callable[[], dict[str, Any]]]


def _rooms() -> dict[str, np.ndarray]:
    file = ROOT / f"rooms_{SIZE}_{TRAIN + VAL}.npz"
    if not file.exists():
        scenes = [render_scene((7, n), SIZE, n // 16) for n in range(TRAIN + VAL)]
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **{name: np.stack([scene[name] for scene in scenes]) for name in ("rgb", *FIVE)})
    return dict(np.load(file))


def _data() -> ArrayData:
    rooms = _rooms()
    image = rooms.pop("rgb")

    def part(rows: slice) -> Arrays:
        return Arrays(image[rows], {name: labels[rows] for name, labels in rooms.items()}, {})

    splits = {"train": part(slice(TRAIN)), "val": part(slice(TRAIN, None))}
    return ArrayData(splits, [TASKS[name] for name in FIVE])


def _spec(groups: int) -> NetworkSpec:
    image = InputSpec("image", (SIZE, SIZE, 3), "uint8", (127.5,), (63.0,))
    encoder = EncoderSpec("convnet", 1, {"widths": [16, 32, 48], "dense_stride": 4})
    return NetworkSpec(image, [TASKS[name] for name in FIVE], encoder, groups, decoder_width=32)


class _Runs:
    """Runs of one kind, each with the next seed. Their metrics are stored."""

    def __init__(self, data: ArrayData, groups: int, **over: Any) -> None:
        self.data, self.groups, self.over = data, groups, over
        self.seeds = itertools.count()
        self.metrics: list[Metrics] = []

    def __call__(self) -> float:
        seed = next(self.seeds)
        network = GroupingNetwork(replace(_spec(self.groups), seed=seed))
        started = time.perf_counter()
        state = fit(network, self.data, replace(SETTINGS, seed=seed, **self.over), LocalContext(device="cpu"))
        seconds = time.perf_counter() - started
        self.metrics.append(evaluate(state.network, self.data, "val"))
        return seconds


def _gains(runs: _Runs, over: _Runs) -> dict[str, Any]:
    """Compute normalized gains of runs over others with the same seeds, in per cent."""
    tasks = runs.data.tasks
    pairs = zip(runs.metrics, over.metrics, strict=True)
    return {"gains": [round(normalized_gain(tasks, a, b), 1) for a, b in pairs]}


def progressive() -> Costs:
    """Compare runs with progressive pruning with runs that keep all heads, as in the published code."""
    data = _data()
    pruned, full = _Runs(data, 3), _Runs(data, 3, search_share=1.0, prune_threshold=0.0)
    return pruned, full, lambda: _gains(pruned, full)


def over_naive(groups: int) -> Costs:
    """Compare one-shot runs with runs of naive MTL of the same number of epochs."""
    data = _data()
    ours, naive = _Runs(data, groups), _Runs(data, 1)
    return ours, naive, lambda: _gains(ours, naive)


def _memory(tasks: int) -> Callable[[], float]:
    """Measure the peak memory that steps with `tasks` binary tasks add to a fresh process, in MiB."""
    code = (
        "import pathlib, re\nfrom bench import steps\n"
        # `ru_maxrss` would begin with the peak of the process that started this one
        "def mib(key):\n"
        "    status = pathlib.Path('/proc/self/status').read_text()\n"
        "    return int(re.search(key + r':\\s+(\\d+) kB', status)[1]) / 1024\n"
        "steps.ours(steps.binary(1, steps.SMALL), 64)()\n"
        "before = mib('VmRSS')\n"
        f"step = steps.ours(steps.binary({tasks}, steps.SMALL), 64)\n"
        "for _ in range(3):\n    step()\n"
        "print(mib('VmHWM') - before)\n"
    )

    def cost() -> float:
        done = subprocess.run(  # noqa: S603 - this file's own code
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        return float(done.stdout.split()[-1])

    return cost


def checkpoints() -> tuple[Callable[[], float], Callable[[], float]]:
    """Compare fifty steps of the forty-attribute network and a checkpoint with the same fifty steps alone.

    Both are measured in the same block. Blocks of some seconds differ by more than a checkpoint costs, so that two
    blocks would compare the speed of the machine at two times. The checkpoint is written while training waits.
    """
    spec, settings, batch = binary(40, FACES), TrainSettings(), batch_of(binary(40, FACES), 16)
    folder = ROOT / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    context = LocalContext(folder, device="cpu")
    state = TrainState.fresh(GroupingNetwork(spec), settings)
    module = WeighedLoss(state.network).train()
    noise = step_noise(state.network, settings, 0, 0, 16)
    alone = [0.0]

    def cost() -> float:
        started = time.perf_counter()
        for _ in range(50):
            train_step(module, state.optimizer, batch, noise, 1.0, settings, context)
        alone[0] = time.perf_counter() - started
        context.report(None, state.save)
        return time.perf_counter() - started

    return cost, lambda: alone[0]


class _Worker:
    """`TrainContext` of one process of a data-parallel training."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cpu")

    def prepare(self, module: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world_size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def report(self, record: Any, save: Any) -> None:
        raise NotImplementedError

    def checkpoint_due(self) -> bool:
        raise NotImplementedError

    def latest(self) -> None:
        raise NotImplementedError


def _work(rank: int, workers: int, store: str, calls: Connection) -> None:
    """Reply to each call with the seconds of a step on this worker's part of 64 samples."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
    spec, settings, context = binary(40, FACES), TrainSettings(), _Worker()
    state, batch = TrainState.fresh(GroupingNetwork(spec), settings), batch_of(spec, 64 // workers)
    module = context.prepare(WeighedLoss(state.network).train())
    noise = step_noise(state.network, settings, 0, 0, 64)
    cost = timed(lambda: train_step(module, state.optimizer, batch, noise, 1.0, settings, context))
    with contextlib.suppress(EOFError):  # the other end of the connection is closed
        while calls.recv():
            calls.send(cost())
    dist.destroy_process_group()


def _workers(count: int) -> Callable[[], float]:
    """Measure the seconds of a step of `count` workers with a thread each, which wait between two calls."""
    store, ends = str(Path(tempfile.mkdtemp()) / "store"), []
    for rank in range(count):
        mine, theirs = get_context("spawn").Pipe()
        get_context("spawn").Process(target=_work, args=(rank, count, store, theirs), daemon=True).start()
        ends.append(mine)

    def cost() -> float:
        for end in ends:
            end.send(True)
        return statistics.mean([end.recv() for end in ends])

    return cost


# name → (bound, value, function that returns numerator and denominator of the ratio, and notes)
ROWS: dict[str, tuple[str, float, Callable[[], Any]]] = {
    "growth_memory": ("at_most", 1.3, lambda: (_memory(100), _memory(10))),
    "run_progressive_over_full": ("at_most", 0.8, progressive),
    "run_over_mtl_k2": ("at_most", 2, lambda: over_naive(2)),
    "run_over_mtl_k3": ("at_most", 3, lambda: over_naive(3)),
    "run_over_mtl_k4": ("at_most", 4, lambda: over_naive(4)),
    "checkpoint_overhead": ("at_most", 1.03, checkpoints),
    "two_workers": ("at_least", 1.6, lambda: (_workers(1), _workers(2))),
}
