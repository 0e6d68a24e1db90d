"""The planted problem: binary tasks in groups, each group reading its own 2-dimensional subspace of the input."""

import numpy as np

from dmtg_core import ArrayData, Arrays, Grouping, InputSpec, Task


def planted(seed: int, *, tasks: int = 9, groups: int = 3, features: int = 16, rows: int = 4000):
    """Input spec, tasks, splits and the true grouping."""
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
        y = np.sin(2 * u) + v * v - 1 + 0.5 * u * v  # not linear: a head alone cannot solve it
        labels[name] = (y + 0.3 * rng.normal(size=rows) > np.median(y)).astype(np.uint8)
    cut = (rows // 2, rows * 3 // 4)
    splits = {
        split: Arrays(x[part], {name: y[part] for name, y in labels.items()}, {})
        for split, part in (
            ("train", slice(0, cut[0])),
            ("val", slice(cut[0], cut[1])),
            ("test", slice(cut[1], None)),
        )
    }
    spec = InputSpec("features", (features,))
    return spec, tuple(Task(name, "binary") for name in names), splits, Grouping.from_assignment(names, truth)


def planted_data(seed: int, **options) -> tuple[InputSpec, tuple[Task, ...], ArrayData, Grouping]:
    """The same with the splits as training data."""
    spec, tasks, splits, truth = planted(seed, **options)
    return spec, tasks, ArrayData(splits, tasks, seed=seed), truth
