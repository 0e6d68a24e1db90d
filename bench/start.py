"""From a command to its result on a small table: start-up, first line, memory, and training against a bare loop.

The table has 600 rows, eight features and three binary tasks. Each measured command begins in an empty folder, so
it also creates the shards. The networks are naive MTL and one gated network with K = 2. A training run registers
its models and writes its report. The default executor is compared with `ray.executor=ray`.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.nn import functional as F

from bench.processes import first_line_seconds, peak_mib, seconds
from bench.runner import Row
from dmtg_core import EncoderSpec, GroupingNetwork, InputSpec, NetworkSpec, Task
from dmtg_core.network.threads import step_threads
from pipelines.runs.files import METRICS, read_jsonl
from pipelines.storage import locate

DMTG = str(Path(sys.executable).with_name("dmtg"))
RAY = "ray.executor=ray"
TASKS = ("a", "b", "c")
MEMORY_MIB = 1.2 * 1024
# three settings and naive MTL, each with two seeds
EIGHT_TRIALS = ("sweep.groups=[2]", "sweep.gate_learning_rates=[0.01, 0.03, 0.1]", "sweep.seeds=[1, 2]")
# for each seed three single tasks, a wide encoder, a gated network, and naive MTL
TWELVE_CELLS = ("compare.methods=[single_task, wide, dmtg]", "compare.seeds=[1, 2]")

# the table of `embedded_over_loop`: a step takes some milliseconds, so it is more than overhead
ROWS_OF_LOOP, FEATURES_OF_LOOP, WIDTHS, BATCH, EPOCHS = 6400, 32, [512, 512], 64, 4
TRIAL = 20 * BATCH  # samples of the bare loop with all threads


def table(rows: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Generate features `(rows, features)` and labels `(rows, 3)` that depend on products of neighbours."""
    x = np.random.default_rng(0).normal(size=(rows, features)).astype(np.float32)
    labels = np.stack([x[:, n] * x[:, n + 1] > 0 for n in range(len(TASKS))], 1)
    return x, labels.astype(np.float32)


def write_table(folder: Path, rows: int = 600, features: int = 8, train: float = 0.7) -> None:
    """Write a table and its configuration. The first rows are for training, half of the others for validation."""
    x, labels = table(rows, features)
    names = [f"x{i}" for i in range(features)]
    with (folder / "table.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["id", "split", *names, *TASKS])
        for i, (values, row) in enumerate(zip(x.tolist(), labels.astype(int).tolist(), strict=True)):
            split = "train" if i < train * rows else ("val", "test")[i % 2]
            lines.writerow([f"r{i}", split, *values, *row])
    tasks = [{"column": name, "kind": "binary"} for name in TASKS]
    config = {
        "name": "table",
        "source": {"kind": "table", "root": "table.csv", "options": {"id_column": "id", "tasks": tasks}},
        "data": {"shards": "shards"},
        "network": {"encoder": "mlp", "groups": 2, "options": {"widths": [16, 8]}},
        "train": {"epochs": 4, "learning_rate": 0.01},
        "search": {"method": "dmtg"},
        "run": {"root": "runs", "name": "run"},
    }
    (folder / "table.yaml").write_text(yaml.safe_dump(config))


@contextmanager
def table_folder(**options: Any) -> Iterator[Path]:
    """Return an empty folder with a table and its configuration. It is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        write_table(Path(folder), **options)
        yield Path(folder)


def _command(name: str, *overrides: str) -> list[str]:
    return [DMTG, name, "-c", "table.yaml", *overrides]


def _seconds(name: str, *overrides: str) -> float:
    with table_folder() as folder:
        return seconds(_command(name, *overrides), folder)


def against_ray(name: str, *overrides: str) -> tuple[Callable[[], float], Callable[[], float]]:
    """Compare the seconds of a command with those of the same command on Ray."""
    return lambda: _seconds(name, *overrides), lambda: _seconds(name, *overrides, RAY)


def first_line() -> tuple[Callable[[], float], Callable[[], float]]:
    """Compare the seconds to the first line of a training run with those of importing PyTorch."""

    def ours() -> float:
        with table_folder() as folder:
            return first_line_seconds(_command("train"), folder)

    return ours, lambda: seconds([sys.executable, "-c", "import torch"], Path())


def memory() -> tuple[Callable[[], float], Callable[[], float]]:
    """Compare the peak memory of a training run with `MEMORY_MIB`."""

    def ours() -> float:
        with table_folder() as folder:
            return peak_mib(_command("train"), folder)

    return ours, lambda: MEMORY_MIB


def over_loop() -> tuple[Callable[[], float], Callable[[], float], Callable[[], dict[str, Any]]]:
    """Compare the training time of a run with that of a bare loop: one gated network, all of its heads, 4 epochs.

    The training time of a run is the sum of the seconds of its epochs, as in `metrics.jsonl`: waiting for batches,
    steps, and sums of losses, without validation. The bare loop does the same with as many threads, which
    `dmtg_core.network.threads` chooses by the size of a step. A note has a step of the bare loop with all threads.
    """
    overrides = (
        "search.baseline=false", "search.share=1", "gate.prune=false", "ray.workers=1",
        f"network.options.widths={WIDTHS}", f"train.batch_size={BATCH}", f"train.epochs={EPOCHS}",
    )  # fmt: skip
    steps = EPOCHS * ROWS_OF_LOOP // BATCH

    def ours() -> float:
        with table_folder(rows=ROWS_OF_LOOP * 5 // 4, features=FEATURES_OF_LOOP, train=0.8) as folder:
            seconds(_command("train", *overrides), folder)
            records = read_jsonl(locate(str(folder / "runs" / "run")) / METRICS)
        assert len(records) == EPOCHS
        return sum(record["seconds"] for record in records) / steps

    threads = step_threads(network_of_loop(), BATCH)

    def bare() -> float:
        return bare_loop(threads, ROWS_OF_LOOP, EPOCHS) / steps

    def notes() -> dict[str, Any]:
        network = f"mlp {WIDTHS}, K = 2, {len(TASKS)} binary tasks, batches of {BATCH}, {steps} steps"
        every = bare_loop(torch.get_num_threads(), TRIAL, 1) / (TRIAL // BATCH)
        return {"network": network, "loop_threads": threads, "loop_all_threads": every}

    return ours, bare, notes


def network_of_loop() -> GroupingNetwork:
    """Return the network of `over_loop`."""
    tasks = [Task(name, "binary") for name in TASKS]
    shape = InputSpec("features", (FEATURES_OF_LOOP,))
    return GroupingNetwork(NetworkSpec(shape, tasks, EncoderSpec("mlp", options={"widths": WIDTHS}), 2)).train()


def bare_loop(threads: int, samples: int, epochs: int) -> float:
    """Measure the seconds that a plain PyTorch loop takes to train the network of `over_loop`."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    inputs, labels = map(torch.from_numpy, table(samples, FEATURES_OF_LOOP))
    network = network_of_loop()
    branch_of, task_of = torch.tensor(network.pairs).T
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01, fused=True)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(len(task_of))
    started = time.perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(samples, generator=generator).split(BATCH):
            outputs = network.forward_pairs(inputs[rows]).rows  # (P, B)
            losses = F.binary_cross_entropy_with_logits(outputs, labels[rows].T[task_of], reduction="none").mean(1)
            gate = network.gate(2.5, network.gate.noise(generator))[task_of, branch_of]  # (P,)
            optimizer.zero_grad()
            (losses @ gate).backward()
            optimizer.step()
            total += losses.detach()
    total.tolist()
    found = time.perf_counter() - started
    torch.set_num_threads(before)
    return found


# name → (bound, value, function that returns numerator and denominator of the ratio, and notes)
ROWS: dict[str, Row] = {
    "start_table": ("at_most", 0.25, lambda: against_ray("train")),
    "start_first_line": ("at_most", 0.5, first_line),
    "start_memory": ("at_most", 1.0, memory),
    "sweep_small": ("at_most", 0.25, lambda: against_ray("sweep", *EIGHT_TRIALS)),
    "compare_small": ("at_most", 0.25, lambda: against_ray("compare", *TWELVE_CELLS)),
    "embedded_over_loop": ("at_most", 1.15, over_loop),
}
