"""Rows of the benchmark: `python -m bench [ROWS=]step [--repeats N]`; writes `bench.json`, prints a table.

Each row measures two costs in turn, A B A B …, and takes the median of the ratios pair by pair, so that a machine
whose speed drifts slows both. `medians` are the two costs: seconds a call, a sample or an epoch, or MiB.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bench import ingest
from dmtg_core import ArrayData, Arrays, EncoderSpec, GroupingNetwork, InputSpec, LocalContext, NetworkSpec, Task
from dmtg_core.settings import TrainSettings
from dmtg_core.step import WeighedLoss, step_noise, train_step
from dmtg_core.training import TrainState

Costs = tuple[Callable[[], float], Callable[[], float]]


def _binary(count: int, rows: int = 64) -> tuple[tuple[Task, ...], InputSpec, ArrayData]:
    generator = torch.Generator().manual_seed(0)
    tasks = tuple(Task(f"t{n}", "binary") for n in range(count))
    inputs = torch.randint(0, 256, (rows, 64, 64, 3), generator=generator, dtype=torch.uint8).numpy()
    labels = {t.name: torch.randint(0, 2, (rows,), generator=generator).numpy().astype("uint8") for t in tasks}
    spec = InputSpec("image", (64, 64, 3), "uint8", (127.5,), (63.0,))
    arrays = Arrays(inputs, labels, {})
    return tasks, spec, ArrayData({"train": arrays, "val": arrays}, tasks)


def _our_step(count: int, groups: int = 4) -> Callable[[], object]:
    tasks, spec, data = _binary(count)
    encoder = EncoderSpec("convnet", 0, {"widths": [16, 32]})
    state = TrainState.fresh(GroupingNetwork(NetworkSpec(spec, tasks, encoder, groups)), TrainSettings())
    module, settings, context = WeighedLoss(state.network), TrainSettings(), LocalContext(device="cpu")
    batch = next(data.train(0, 64))
    noise = step_noise(state.network, settings, 0, 0, 64)
    return lambda: train_step(module, state.optimizer, batch, noise, 1.0, settings, context)


def _separate_heads_step(count: int, groups: int = 4) -> Callable[[], object]:
    """The published shape of a step: a module and a loss call for every head, each loss read by the host."""
    tasks, spec, data = _binary(count)
    network = GroupingNetwork(NetworkSpec(spec, tasks, EncoderSpec("convnet", 0, {"widths": [16, 32]}), groups))
    heads = nn.ModuleList(nn.ModuleList(nn.Linear(32, 1) for _ in tasks) for _ in range(groups))
    optimizer = torch.optim.Adam([*network.parameters(), *heads.parameters()])
    batch = next(data.train(0, 64))

    def step() -> None:
        gate = network.gate(1.0, torch.zeros(len(tasks), groups))
        loss = torch.zeros(())
        for k, features in network.features(batch.inputs).items():
            pooled = features.mean((2, 3))
            for n, task in enumerate(tasks):
                one = nn.functional.binary_cross_entropy_with_logits(
                    heads[k][n](pooled).squeeze(1), batch.targets[task.name]
                )
                one.item()
                loss = loss + gate[n, k] * one
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _timed(step: Callable[[], object], calls: int = 3) -> Callable[[], float]:
    """Seconds of a call."""

    def cost() -> float:
        started = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - started) / calls

    return cost


# name → (bound, value, how to make the numerator and the denominator of the ratio)
ROWS: dict[str, tuple[str, float, Callable[[], Costs]]] = {
    "step_binary40": ("at_least", 1.2, lambda: (_timed(_separate_heads_step(40)), _timed(_our_step(40)))),
    "growth_step": ("at_most", 1.3, lambda: (_timed(_our_step(100)), _timed(_our_step(10)))),
    **ingest.ROWS,
}


MOST_REPEATS = {"shard_memory": 3}  # of rows that take minutes


def measure(name: str, repeats: int) -> dict[str, object]:
    """One row of `bench.json`."""
    repeats = min(repeats, MOST_REPEATS.get(name, repeats))
    bound, value, make = ROWS[name]
    above, below = make()
    above(), below()
    pairs = [(above(), below()) for _ in range(repeats)]
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return {
        "name": name,
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "bound": bound,
        "value": value,
        "repeats": repeats,
        "medians": [statistics.median(costs) for costs in zip(*pairs, strict=True)],
        "command": f"make bench ROWS={name}",
        "machine": machine,
    }


def missed(row: dict[str, object]) -> bool:
    """Whether a row misses its bound."""
    ratio, value = float(str(row["ratio"])), float(str(row["value"]))
    return ratio < value if row["bound"] == "at_least" else ratio > value


def main() -> None:
    """Measure the rows asked for, all by default; what misses its bound is printed first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    names = [name for name in ROWS if not asked.rows or any(name.startswith(row) for row in asked.rows)]
    found = sorted((measure(name, asked.repeats) for name in names), key=missed, reverse=True)
    Path("bench.json").write_text(json.dumps(found, indent=2) + "\n")
    for row in found:
        mark = "MISSES" if missed(row) else "ok"
        print(f"{mark:6}  {row['name']:16} {row['ratio']:>7}  {row['bound']} {row['value']}  ({row['machine']})")


if __name__ == "__main__":
    main()
