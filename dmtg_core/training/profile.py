"""Profile of training steps: a trace, and the share of each part in the time of a step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.training.checkpoint import write_json
from dmtg_core.training.context import TrainContext
from dmtg_core.training.data import Batch, Data
from dmtg_core.training.loop import advance
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState
from dmtg_core.training.step import BACKWARD, COMMUNICATION, FORWARD, OPTIMIZER

DATA = "data"
PARTS = (DATA, FORWARD, BACKWARD, OPTIMIZER, COMMUNICATION)
TRACE, OPERATORS, SHARES = "trace.json.gz", "operators.txt", "shares.json"
OPERATORS_SHOWN = 40


class ProfiledData:
    """A fixed number of training batches of a data set. The profiler records the last of them.

    Args:
        data: The data set.
        warm_up: Number of steps before the profile, which allocate memory, select algorithms and compile.
        steps: Number of profiled steps.
        device: Device of the steps.
    """

    def __init__(self, data: Data, warm_up: int, steps: int, device: torch.device) -> None:
        self.data, self.warm_up, self.watched, self.device = data, warm_up, steps, device
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self.profiler = profile(activities=activities)
        self.seconds = math.nan

    def steps(self, batch_size: int) -> int:  # noqa: ARG002 - the protocol's
        """See `Data.steps`."""
        return self.warm_up + self.watched

    def train(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """See `Data.train`. The batches of a small data set are repeated."""
        batches = self._endless(epoch, batch_size)
        for _ in range(start, self.warm_up):
            yield next(batches)
        self._wait()
        self.profiler.start()
        started = time.perf_counter()
        for _ in range(self.watched):
            with record_function(DATA):
                batch = next(batches)
            yield batch
        self._wait()
        self.seconds = time.perf_counter() - started
        self.profiler.stop()

    def _endless(self, epoch: int, batch_size: int) -> Iterator[Batch]:
        while True:
            yield from self.data.train(epoch, batch_size)
            epoch += 1

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Return one batch: the evaluation is not profiled."""
        yield next(self.data.evaluate(split, batch_size))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def profile_steps(
    spec: NetworkSpec,
    data: Data,
    settings: TrainSettings,
    context: TrainContext,
    folder: Path,
    *,
    warm_up: int = 5,
    steps: int = 10,
) -> dict[str, Any]:
    """Train a fresh network for a few steps and write their profile into `folder`.

    All workers call it, each with its part of the data. Each writes its own profile. The profile synchronises with
    the device after each part of a step, which takes a little time.

    Returns:
        `seconds_per_step`, `samples_per_second` of all workers, `shares` of `PARTS` and "other", which sum to 1,
        and `all_reduce_share`, the share of the sums over workers, which mostly overlap with the backward pass.
    """
    device = context.device
    watched = ProfiledData(data, warm_up, steps, device)
    settings = replace(settings, epochs=1, search_share=1.0, checkpoint_every=0)
    state = TrainState.fresh(GroupingNetwork(spec).to(device), settings)
    advance(state, watched, settings, context, until=1)
    events = {event.key: event.cpu_time_total / 1e6 for event in watched.profiler.key_averages()}
    shares = {part: events.get(part, 0.0) / watched.seconds for part in PARTS}
    found = {
        "device": str(device),
        "workers": context.world_size,
        "warm_up": warm_up,
        "steps": steps,
        "seconds_per_step": watched.seconds / steps,
        "samples_per_second": settings.batch_size * steps / watched.seconds,
        "shares": shares | {"other": max(1 - sum(shares.values()), 0.0)},
        "all_reduce_share": sum(s for key, s in events.items() if "all_reduce" in key) / watched.seconds,
    }
    folder.mkdir(parents=True, exist_ok=True)
    watched.profiler.export_chrome_trace(str(folder / TRACE))
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = watched.profiler.key_averages().table(sort_by=order, row_limit=OPERATORS_SHOWN)
    (folder / OPERATORS).write_text(table + "\n", encoding="utf-8")
    write_json(folder / SHARES, found)
    return found
