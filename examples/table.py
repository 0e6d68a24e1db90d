"""Group the targets of a table in plain PyTorch.

    python examples/table.py [TABLE.csv TARGET TARGET …]

The script uses neither Ray nor MLflow. It reads only the table and writes no files. Without arguments it generates
a table with known groups: targets 0, 2 and 4 depend on two of the features, and the other targets depend on two
other features. Targets with two values are binary. All other targets are numbers. Columns that are not targets are
features.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch

from dmtg_core import (
    ArrayData,
    Arrays,
    EncoderSpec,
    InputSpec,
    NetworkSpec,
    SearchOptions,
    Task,
    TrainSettings,
    normalized_gain,
    search,
)


def made_up(rows: int = 2000) -> dict[str, np.ndarray]:
    """Generate six features and six targets."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 6))
    table = {f"feature_{i}": x[:, i] for i in range(6)}
    for n in range(6):
        a, b = x[:, :2].T if n % 2 == 0 else x[:, 2:4].T
        value = np.sin(2 * (a if n < 3 else b)) + (a * b if n == 2 else b * b - 1)
        table[f"target_{n}"] = value if n == 5 else (value > 0).astype(float)
    return table


def read(path: str) -> dict[str, np.ndarray]:
    """Read the columns of a CSV file of numbers. An empty cell becomes NaN."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def task_of(name: str, values: np.ndarray) -> Task:
    """Return a binary task for a target with the values 0 and 1, otherwise a regression task.

    A regression target is scaled by its mean and its standard deviation.
    """
    if set(np.unique(values[~np.isnan(values)])) == {0.0, 1.0}:
        return Task(name, "binary", metric="auroc")
    return Task(name, "regression", offset=(float(np.nanmean(values)),), scale=(float(np.nanstd(values)),))


def main(words: list[str], epochs: int = 30) -> None:
    """Read and split the table, search for a grouping, and print the result."""
    torch.set_num_threads(1)  # more threads slow down operations on tensors this small
    table = read(words[0]) if words else made_up()
    targets = words[1:] or [name for name in table if name.startswith("target_")]
    tasks = [task_of(name, table[name]) for name in targets]
    features = np.stack([values for name, values in table.items() if name not in targets], 1).astype("float32")
    labels = {name: table[name].astype("float32") for name in targets}

    order = np.random.default_rng(1).permutation(len(features))
    ends = np.cumsum([int(0.7 * len(order)), int(0.15 * len(order))])
    splits = dict(zip(("train", "val", "test"), np.split(order, ends), strict=True))
    data = ArrayData(
        {
            split: Arrays(features[r], {name: y[r] for name, y in labels.items()}, {})
            for split, r in splits.items()
        },
        tasks,
    )
    train = features[splits["train"]]
    spec = NetworkSpec(
        InputSpec("features", (features.shape[1],), mean=train.mean(0).tolist(), std=train.std(0).tolist()),
        tasks,
        EncoderSpec("mlp", options={"widths": [16, 4]}),
        groups=2,
    )
    settings = TrainSettings(epochs=epochs, batch_size=128, learning_rate=0.01, search_share=0.3)
    found = search(spec, data, settings, SearchOptions(budget=4))

    print(f"grouping: {found.grouping} (kept: {found.chosen})")
    gain = normalized_gain(tasks, found.metrics["test"], found.baseline["test"])
    print(f"errors on test are {gain:.1f} % lower than those of naive MTL, with this seed")
    for name, model in found.network.specialise().items():
        print(f"{name}: {', '.join(task.name for task in model.tasks)}")


if __name__ == "__main__":
    main(sys.argv[1:])
