"""Two training processes on one machine: a minimal data-parallel context and the function of each process."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dmtg_core import GroupingNetwork, NetworkSpec, TemperatureSchedule, TrainSettings, fit
from dmtg_core.training.checkpoint import save_network
from tests.dmtg_core import samples

SETTINGS = TrainSettings(
    epochs=4, search_share=0.5, batch_size=16, optimizer="sgd", learning_rate=0.05, gate_learning_rate=1.0,
    clip_norm=2.0, entropy_weight=0.01, prune_threshold=0.3, temperature=TemperatureSchedule("cosine", 2.5, 0.5),
    aggregator="pcgrad",
)  # fmt: skip
ROWS, MISSING = 90, 0.4


def spec_for(sampling: str) -> NetworkSpec:
    """A network without batch normalisation, whose gradients are the same however a batch is split."""
    return replace(samples.mlp_spec(stem=1), sampling=sampling, initial="gaussian", initial_scale=1.0)


class ProcessContext:
    """A worker of a gloo group."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cpu")

    def prepare(self, module: nn.Module) -> nn.Module:
        """Wrapped for data-parallel training."""
        return DistributedDataParallel(module, static_graph=True, gradient_as_bucket_view=True)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all workers."""
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def report(self, record: Mapping[str, Any], save: Any) -> None:
        """Nothing is written."""

    def checkpoint_due(self) -> bool:
        """Never."""
        return False

    def latest(self) -> Path | None:
        """Nothing was written."""
        return None


class ThreadContext:
    """A worker in a thread, for code whose only collective is a sum.

    Args:
        rank: Its number.
        shared: A barrier for all workers, and a list in which each has a place.
    """

    device = torch.device("cpu")

    def __init__(self, rank: int, shared: tuple[threading.Barrier, list[Any]]) -> None:
        self.rank, self.world_size = rank, len(shared[1])
        self.barrier, self.places = shared
        self.messages = 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all workers."""
        self.messages += 1
        self.places[self.rank] = tensor
        self.barrier.wait()
        total = torch.stack(self.places).sum(0)
        self.barrier.wait()
        return total


def in_threads(workers: int, work: Callable[[Any], Any]) -> list[Any]:
    """Results of `work(context)` on all workers, by rank."""
    shared = threading.Barrier(workers), [None] * workers

    def run(rank: int) -> Any:
        try:
            return work(ThreadContext(rank, shared))
        except BaseException:
            shared[0].abort()
            raise

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, range(workers)))


class Group:
    """Processes of one gloo group that run one function after another: their start takes longer than most.

    Args:
        workers: Number of processes.
        folder: A folder for the file by which they find each other.
    """

    def __init__(self, workers: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        pipes = [context.Pipe() for _ in range(workers)]
        self.ends = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, workers, folder, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def __call__(self, work: Callable[..., None], folder: Path, *options: Any) -> None:
        """Run `work(rank, workers, folder, *options)` in each process, and wait for all of them."""
        for end in self.ends:
            end.send((work, folder, options))
        for end in self.ends:
            problem = end.recv() if end.poll(180) else "no answer"
            if problem:
                self.end()  # the others may wait for it for ever
            assert not problem, problem

    def end(self) -> None:
        """Kill the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, workers: int, folder: Path, end: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers)
    while True:
        try:
            work, place, options = end.recv()
        except EOFError:  # the process of the tests has ended
            break
        problem = ""
        try:
            work(rank, workers, place, *options)
            dist.barrier()
        except BaseException:
            problem = traceback.format_exc()
            raise
        finally:
            end.send(problem)
    # DistributedDataParallel never releases the group. A thread of the group that frees a tensor while the
    # interpreter ends aborts the process, so the process ends without ending the interpreter.
    os._exit(0)


def train(rank: int, workers: int, folder: Path, sampling: str) -> None:
    """The function of one process: train its part and write its state."""
    spec = spec_for(sampling)
    data = samples.data(spec.input, spec.tasks, ROWS, missing=MISSING, rank=rank, world_size=workers)
    state = fit(GroupingNetwork(spec), data, SETTINGS, ProcessContext())
    place = folder / f"rank_{rank}"
    save_network(place, state.network)
    (place / "history.json").write_text(json.dumps(state.history))
