"""Memory and time of planning shards, and the speed of writing them.

`python -m bench.plan plan SAMPLES` plans generated samples and prints MiB, seconds and CPU seconds.
`python -m bench.plan dense SAMPLES` (256 × 256, five tasks) and `python -m bench.plan images SAMPLES` (64 × 64,
two labels) write shards in one process, and print CPU seconds and bytes a sample.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from bench import taskonomy_files
from dmtg_core import InputSpec, Task
from pipelines.config.sections import DataSection, SourceSection
from pipelines.data.planning import make_plans
from pipelines.data.shards import write_shard
from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT, Column, Description, Entry
from pipelines.storage import locate

MANY, FEW = 3_000_000, 300_000
_CLEAR = Path("/proc/self/clear_refs")  # writing 5 resets the peak of the resident memory
_LABELS = [{"column": "flag", "kind": "binary"}, {"column": "kind", "kind": "multiclass"}]


def _entries(count: int) -> Iterator[Entry]:
    for i in range(count):
        split = ("train", "train", "train", "val", "test")[i % 5]
        yield Entry(f"building_{i % 500:03d}/point_{i}", split, {"file": f"{i:09d}.jpg", "row": i})


def _resident(key: str) -> float:
    """Return the memory in MiB that `/proc` names `VmRSS` (now) or `VmHWM` (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def plan(count: int) -> dict[str, float]:
    """Plan generated samples, which need no memory themselves; measure the growth of the memory, and the time."""
    columns = {INPUT: Column("uint8", (64, 64, 3))}
    images = Description(InputSpec("image", (64, 64, 3), "uint8"), (Task("t", "binary"),), columns)
    _CLEAR.write_text("5")
    before, started, worked = _resident("VmRSS"), time.perf_counter(), time.process_time()
    plans = make_plans(_entries(count), images, SourceSection(kind="folder"), DataSection(shards="x"))
    return {
        "memory": _resident("VmHWM") - before,
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - worked,
        "shards": len(plans),
    }


def write(kind: str, count: int) -> dict[str, float]:
    """Write the shards of `count` generated samples in this process."""
    with tempfile.TemporaryDirectory(prefix="dmtg-") as folder:
        root = Path(folder)
        options = {"tasks": _LABELS} if kind == "images" else {}
        if kind == "images":
            _write_images(root, count)
        else:
            taskonomy_files.write(root, count)
        source = build_source("folder" if kind == "images" else "taskonomy", folder, options)
        data = DataSection(shards="x", rows_per_shard=count)
        description = source.describe()
        section = SourceSection(kind="folder", root=folder)
        shards = make_plans(source.entries(), description, section, data)
        worked = time.process_time()
        place = locate(f"{folder}/shards")
        parts = [write_shard(source, description, one, place, data.compression) for one in shards]
        worked = time.process_time() - worked
        files = [file.stat().st_size for file in root.rglob("*.*g")]  # jpg and png
    return {
        "cpu": worked / count,
        "raw_bytes": sum(files) / count,
        "decoded_bytes": float(description.row_bytes),
        "shard_bytes": sum(part["shard"]["bytes"] for part in parts) / count,
    }


def _write_images(root: Path, count: int) -> None:
    """Write photographs of 96 × 128 pixels with smooth surfaces and noise, and their labels."""
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((128, 96))
        noisy = np.asarray(coarse) + rng.normal(0, 3, (96, 128, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{i}.jpg", quality=90)
    rows = "".join(f"{i},{i % 2},{i % 7},{('train', 'train', 'val', 'test')[i % 4]}\n" for i in range(count))
    (root / "labels.csv").write_text("image,flag,kind,split\n" + rows)


def _measured(count: int, key: str) -> Callable[[], float]:
    """Return a function that plans in a process of its own."""

    def call() -> float:
        command = [sys.executable, "-m", "bench.plan", "plan", str(count)]
        printed, _ = psutil.Popen(command, stdout=subprocess.PIPE, text=True).communicate()
        return float(json.loads(printed)[key])

    return call


Costs = tuple[Callable[[], float], Callable[[], float]]

# name → (bound, value, function that returns numerator and denominator of the ratio); the time is that of the
# processor, because a run of minutes meets another load of the machine than a run of seconds
ROWS: dict[str, tuple[str, float, Callable[[], Costs]]] = {
    "plan_growth": ("at_most", 1.3, lambda: (_measured(MANY, "memory"), _measured(FEW, "memory"))),
    "plan_growth_time": ("at_most", 11, lambda: (_measured(MANY, "cpu"), _measured(FEW, "cpu"))),
}


if __name__ == "__main__":
    what, samples = sys.argv[1], int(sys.argv[2])
    print(json.dumps(plan(samples) if what == "plan" else write(what, samples)))
