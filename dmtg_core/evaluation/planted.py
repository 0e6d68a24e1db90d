"""A generated problem with known groups, for tests and measurements of a search."""

from __future__ import annotations

import numpy as np

from dmtg_core.grouping import Grouping
from dmtg_core.input_spec import InputSpec
from dmtg_core.tasks import Task
from dmtg_core.training.data import Arrays

NOISE = 0.3  # standard deviation of the noise that is added before a label is thresholded at the median


def planted(
    seed: int, *, tasks: int = 9, groups: int = 3, features: int = 16, rows: int = 4000
) -> tuple[InputSpec, tuple[Task, ...], dict[str, Arrays], Grouping]:
    """Generate binary tasks in groups. Each group depends on a 2-dimensional subspace of normal features.

    A label is computed from the two coordinates of the subspace, rotated by an angle that is specific to the task.
    It is the sum of a sine, a square and a product, plus noise, thresholded at its median. No linear function of
    the features predicts it. Tasks of a group need the same features. Tasks of different groups compete for the
    encoder.

    Args:
        seed: Seed of all random numbers.
        tasks: N. Task n belongs to group n mod `groups`.
        groups: Number of groups, with two dimensions each.
        features: Dimensions of the input, at least two for each group.
        rows: Number of samples. Half are for training, a quarter for validation, a quarter for the test.

    Returns:
        Input, tasks, samples by split, and the true grouping.

    Raises:
        ValueError: If there are more groups than tasks, or fewer than two features for each group.
    """
    if not 1 <= groups <= tasks or 2 * groups > features:
        raise ValueError(
            f"{groups} groups need at least {groups} tasks and {2 * groups} features, got {tasks} and {features}"
        )
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(features, features)))
    names = [f"task_{n}" for n in range(tasks)]
    truth = [n % groups for n in range(tasks)]
    x = rng.normal(size=(rows, features)).astype(np.float32)
    labels = {}
    for n, name in enumerate(names):
        a, b = (x @ basis[:, 2 * truth[n] : 2 * truth[n] + 2]).T
        turn = rng.uniform(0, 2 * np.pi)
        u, v = a * np.cos(turn) + b * np.sin(turn), b * np.cos(turn) - a * np.sin(turn)
        y = np.sin(2 * u) + v * v - 1 + 0.5 * u * v
        labels[name] = (y + NOISE * rng.normal(size=rows) > np.median(y)).astype(np.uint8)
    parts = {
        "train": slice(0, rows // 2),
        "val": slice(rows // 2, rows * 3 // 4),
        "test": slice(rows * 3 // 4, None),
    }
    splits = {s: Arrays(x[part], {name: y[part] for name, y in labels.items()}, {}) for s, part in parts.items()}
    spec = InputSpec("features", (features,))
    return spec, tuple(Task(name, "binary") for name in names), splits, Grouping.from_assignment(names, truth)
