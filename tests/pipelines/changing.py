"""A small table whose labels and columns tests change, and its configuration."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from pipelines.config.loading import Config
from pipelines.config.validation import checked

ROWS = 120


def write_table(file: Path, *, seed: int = 0, flip: bool = False, rows: int = ROWS, reverse: bool = False) -> Path:
    """A table of three features and three flags; `flip` exchanges labels, `reverse` the order of columns."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3)) * (1.0, 5.0, 0.2)
    names = ["id", "x1", "x2", "x3", "a", "b", "c"]
    with file.open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow(names[::-1] if reverse else names)
        for i in range(rows):
            flags = [int((x[i, n] > 0.1) != flip) for n in range(3)]
            row = [f"m{i}", *(f"{value:.4f}" for value in x[i]), *flags]
            table.writerow(row[::-1] if reverse else row)
    return file


def table_config(table: Path, work: Path, *tasks: str, **sections: object) -> Config:
    """A configuration that trains in seconds, with all folders below `work`."""
    values: dict[str, object] = {
        "name": "changing",
        "source": {
            "kind": "table",
            "root": str(table),
            "options": {
                "id_column": "id",
                "features": ["x1", "x2", "x3"],
                "tasks": [{"column": name, "kind": "binary"} for name in tasks or ("a", "b")],
            },
        },
        "data": {"shards": str(work / "shards"), "rows_per_shard": 40, "min_support": 1},
        "network": {"encoder": "mlp", "groups": 2, "options": {"widths": [8, 4]}},
        "train": {"epochs": 2, "batch_size": 32, "learning_rate": 0.01, "trees": False},
        "search": {"method": "dmtg", "baseline": False},
        "track": {"uri": "none"},
        "run": {"root": str(work / "runs")},
        "ray": {"executor": "embedded"},
    }
    for name, section in sections.items():
        held = values.get(name)
        values[name] = held | section if isinstance(held, dict) and isinstance(section, dict) else section
    return checked(Config, values)
