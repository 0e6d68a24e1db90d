"""Speed of reading shards against reading files directly, on files in Taskonomy's layout.

The data are 4,000 samples of 256 × 256 with five tasks, 852 KB each decoded, generated once below `work/bench`.
All figures are for an epoch after the first, one worker, and batches of 24 that are ready for a training step:
stored input and encoded targets.
"""

from __future__ import annotations

import itertools
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench import taskonomy_files
from bench.processes import peak_mib
from pipelines.config.sections import DataSection
from pipelines.data.manifest import read_manifest
from pipelines.data.reader import Reader
from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT
from pipelines.data.stream import StreamData
from pipelines.storage import locate

ROOT = Path("work/bench")
SAMPLES, FEW, BATCH = 4000, 1000, 24
LOADED = 480  # samples for the slow loaders


def _shard_command(samples: int) -> list[str]:
    taskonomy_files.write(ROOT / f"raw{samples}", samples)
    config = ROOT / "config.yaml"
    config.write_text("name: bench\nsource: {kind: taskonomy}\ndata: {shards: x}\n")
    overrides = [f"source.root={ROOT / f'raw{samples}'}", f"data.shards={ROOT / f'shards{samples}'}"]
    return [sys.executable, "-m", "pipelines.cli.app", "shard", "-c", str(config), *overrides]


@cache
def _reader(tasks: int) -> Reader:
    folder = locate(str(ROOT / f"shards{SAMPLES}"))
    if not (folder / "_manifest.json").exists():
        subprocess.run(_shard_command(SAMPLES), check=True, capture_output=True)  # noqa: S603
    manifest = read_manifest(folder)
    return Reader(folder, manifest, manifest.description.tasks[:tasks])


@cache
def _stream(tasks: int) -> tuple[StreamData, itertools.count[int]]:
    """Return a stream after its first epoch, and the numbers of its next epochs."""
    options = DataSection(shards="x")
    data = StreamData(_reader(tasks), options, seed=0, rank=0, world_size=1, device=torch.device("cpu"))
    for _ in data.train(0, BATCH):
        pass
    return data, itertools.count(1)


def _epoch(tasks: int = 5) -> float:
    """Measure the seconds for a sample in a streamed epoch."""
    data, epochs = _stream(tasks)
    return _seconds_a_sample(len(batch.inputs) for batch in data.train(next(epochs), BATCH))


def _seconds_a_sample(sizes: Iterable[int]) -> float:
    started = time.perf_counter()
    samples = sum(sizes)
    return (time.perf_counter() - started) / samples


def _scan() -> float:
    """Measure the seconds for a sample when pyarrow alone reads the same columns of the same files."""
    reader = _reader(5)
    columns = list(reader.columns())

    def sizes() -> Iterable[int]:
        for shard in reader.manifest.shards["train"]:
            file = pq.ParquetFile(str(reader.folder / shard.file))
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=columns).num_rows

    return _seconds_a_sample(sizes())


class _Pngs(Dataset[dict[str, Tensor]]):
    """The original files, decoded for each sample in each epoch."""

    def __init__(self) -> None:
        _reader(5)
        self.source = build_source("taskonomy", str(ROOT / f"raw{SAMPLES}"), {})
        self.tasks = self.source.describe().tasks
        self.entries = list(self.source.entries())[:LOADED]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.source.read(self.entries[index])
        sample = {INPUT: torch.from_numpy(np.array(row[INPUT]))}
        for task in self.tasks:
            sample[task.name] = task.encode(torch.from_numpy(np.array(row[f"task.{task.name}"])).unsqueeze(0))[0]
        return sample


class _Pickles(Dataset[dict[str, Tensor]]):
    """A pickle of float32 tensors for each sample, as in the published code."""

    def __init__(self) -> None:
        self.folder = ROOT / "pickles"
        self.folder.mkdir(exist_ok=True)
        pngs = _Pngs()
        for i in range(len(pngs)):
            if not self._file(i).exists():
                sample = {name: value.float() for name, value in pngs[i].items()}
                self._file(i).write_bytes(pickle.dumps(sample))

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.pkl"

    def __len__(self) -> int:
        return LOADED

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample: dict[str, Tensor] = pickle.loads(self._file(index).read_bytes())  # noqa: S301 - written above
        return sample


def _loader(kind: type[_Pngs | _Pickles]) -> Callable[[], float]:
    """Measure the seconds for a sample of a DataLoader with two running workers."""
    loader = DataLoader(kind(), BATCH, shuffle=True, num_workers=2, persistent_workers=True)

    def epoch() -> float:
        return _seconds_a_sample(len(batch[INPUT]) for batch in loader)

    return epoch


def _gap() -> float:
    """Measure the seconds from the last batch of an epoch to the first of the next."""
    data, epochs = _stream(5)
    for _ in data.train(next(epochs), BATCH):
        pass
    started = time.perf_counter()
    batches = data.train(next(epochs), BATCH)
    next(batches)
    seconds = time.perf_counter() - started
    for _ in batches:
        pass
    return seconds


def _whole_epoch() -> float:
    return _epoch() * _reader(5).manifest.rows("train")


def _peak_memory(samples: int) -> float:
    """Measure the peak memory of a sharding job with all its processes, in MiB. Shared memory counts once."""
    command = _shard_command(samples)
    shutil.rmtree(ROOT / f"shards{samples}", ignore_errors=True)
    return peak_mib(command, Path())


Costs = tuple[Callable[[], float], Callable[[], float]]

# name → (bound, value, function that returns numerator and denominator of the ratio)
ROWS: dict[str, tuple[str, float, Callable[[], Costs]]] = {
    "ingest_over_png": ("at_least", 5, lambda: (_loader(_Pngs), _epoch)),
    "ingest_over_pickle": ("at_least", 2, lambda: (_loader(_Pickles), _epoch)),
    "ingest_over_scan": ("at_least", 0.3, lambda: (_scan, _epoch)),
    "one_of_five_columns": ("at_most", 0.5, lambda: (lambda: _epoch(1), _epoch)),
    "epoch_gap": ("at_most", 0.05, lambda: (_gap, _whole_epoch)),
    "shard_memory": ("at_most", 1.2, lambda: (lambda: _peak_memory(SAMPLES), lambda: _peak_memory(FEW))),
}
