"""Hand-made files in Taskonomy's layouts, 16 × 16, whose right answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.data.sources.taskonomy.source import TaskonomySource
from pipelines.data.sources.taskonomy.tasks import TASKS
from pipelines.storage import locate

SIDE = 16
DOMAINS = {
    "rgb": "rgb",
    **{name: name for name in TASKS},
    "segment_semantic": "segmentsemantic",
    "class_scene": "class_places",
}
FOLDERS = {"task": "{0}/{1}", "component": "{0}/taskonomy/{1}", "building": "{1}_{0}"}


def arrays(seed=0):
    """What the files of one point hold: rgb and the five."""
    rng = np.random.default_rng(seed)
    return {
        "rgb": rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8),
        "depth_zbuffer": rng.integers(600, 6000, (SIDE, SIDE), np.uint16),
        "normal": rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8),
        "segment_semantic": rng.integers(0, 18, (SIDE, SIDE), np.uint8),
        "keypoints2d": rng.integers(0, 2000, (SIDE, SIDE), np.uint16),
        "edge_texture": rng.integers(0, 9000, (SIDE, SIDE), np.uint16),
    }


def more_arrays(seed=0):
    """What the files of all tasks hold."""
    rng = np.random.default_rng(seed + 1000)
    grey = rng.integers(0, 256, (SIDE, SIDE, 1), np.uint8)
    curvature = rng.integers(60, 200, (SIDE, SIDE, 3), np.uint8)
    curvature[..., 2] = 0
    return {
        **arrays(seed),
        "depth_euclidean": rng.integers(700, 7000, (SIDE, SIDE), np.uint16),
        "keypoints3d": rng.integers(0, 65536, (SIDE, SIDE), np.uint16),
        "edge_occlusion": rng.integers(0, 1500, (SIDE, SIDE), np.uint16),
        "reshading": np.repeat(grey, 3, axis=2),
        "principal_curvature": curvature,
        "segment_unsup2d": np.repeat(rng.integers(0, 256, (SIDE, 4), np.uint8), 4, axis=1),
        "segment_unsup25d": np.repeat(rng.integers(0, 256, (4, SIDE), np.uint8), 4, axis=0),
        "class_object": rng.normal(0, 5, 1000).astype(np.float32),  # logits
        "class_scene": rng.dirichlet(np.ones(365)).astype(np.float32),  # probabilities
    }


def path(root, task, building="alpha", point=0, layout="task", domain=None) -> Path:
    """Where a file lies."""
    end = "npy" if task.startswith("class_") else "png"
    name = f"point_{point}_view_3_domain_{domain or DOMAINS[task]}.{end}"
    return root / FOLDERS[layout].format(task, building) / name


def save(root, values, **where):
    """Write files, a task each."""
    for task, array in values.items():
        file = path(root, task, **where)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, array) if array.ndim == 1 else Image.fromarray(array).save(file)


def source(root, **options) -> TaskonomySource:
    """A reader at the size of the files."""
    return TaskonomySource(locate(str(root)), {"size": SIDE, **options})


def only(root, **options):
    """The row of the first entry."""
    reader = source(root, **options)
    return reader.read(next(reader.entries()))


def label(root, task, values=None, **options):
    """What is read of one task when its file holds `values`."""
    save(root, more_arrays() if values is None else {**more_arrays(), task: values})
    return only(root, tasks=[task], **options)[f"task.{task}"]
