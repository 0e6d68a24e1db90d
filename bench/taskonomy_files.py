"""Generated files in Taskonomy's layout, with the sizes and bit depths of the real files, for measurements.

The pixels are smooth surfaces with sensor noise, so that PNG compresses them about as well as photographs.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

TASKS = ("depth_zbuffer", "normal", "segment_semantic", "keypoints2d", "edge_texture")
POINTS = 100  # points of a building


def write(root: Path, samples: int, size: int = 256) -> None:
    """Write `samples` points of view of `size` × `size` with five tasks each. A finished folder is kept."""
    done = root / f"{samples}.done"
    if done.exists():
        return
    with ProcessPoolExecutor(2) as pool:
        for _ in pool.map(partial(_point, root, size), range(samples), chunksize=50):
            pass
    done.touch()


def _point(root: Path, size: int, number: int) -> None:
    rng = np.random.default_rng(number)
    surfaces = _surfaces(rng, size, 9)
    pixels = {
        "rgb": _noisy(rng, surfaces[..., :3] * 255, 2.0, np.uint8),
        "depth_zbuffer": _noisy(rng, 500 + 3000 * surfaces[..., 3], 1.0, np.uint16),
        "normal": _noisy(rng, surfaces[..., 4:7] * 255, 0.5, np.uint8),
        "segment_semantic": (surfaces[..., 7] * 17).astype(np.uint8),
        "keypoints2d": _noisy(rng, 400 * np.maximum(surfaces[..., 8] - 0.7, 0), 3.0, np.uint16),
        "edge_texture": _noisy(rng, 4000 * np.abs(surfaces[..., 8] - 0.5), 20.0, np.uint16),
    }
    building, point = f"building{number // POINTS:03d}", number % POINTS
    for task, values in pixels.items():
        domain = task.replace("_", "") if task == "segment_semantic" else task
        file = root / task / building / f"point_{point}_view_0_domain_{domain}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(file, compress_level=3)


def _surfaces(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Smooth values in 0..1, float32 (size, size, count)."""
    coarse = rng.random((count, 8, 8), dtype=np.float32)
    planes = [Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC) for plane in coarse]
    return np.stack([np.asarray(plane) for plane in planes], axis=2).clip(0, 1)


def _noisy(
    rng: np.random.Generator, values: np.ndarray, noise: float, dtype: type[np.unsignedinteger]
) -> np.ndarray:
    limit = np.iinfo(dtype).max
    return (values + noise * rng.standard_normal(values.shape, dtype=np.float32)).clip(0, limit).astype(dtype)
