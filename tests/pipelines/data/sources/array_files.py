"""Tar files of WebDataset, and the arrays of NYUv2."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_tar(path: Path, samples: Sequence[tuple[str, dict[str, bytes]]]) -> Path:
    """A tar file of WebDataset: key, and ending → content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for ending, content in files.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_nyuv2(root: Path, *, train: int = 3, val: int = 2, size: tuple[int, int] = (16, 24)) -> Path:
    """The arrays of NYUv2 as LibMTL reads them, with unknown pixels at the left."""
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            for name, values in nyuv2_arrays(number, size).items():
                (root / split / name).mkdir(parents=True, exist_ok=True)
                np.save(root / split / name / f"{number}.npy", values)
    return root


def nyuv2_arrays(number: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """The four arrays of a sample."""
    rng = np.random.default_rng(number)
    normal = rng.normal(size=(*size, 3))
    normal /= np.linalg.norm(normal, axis=2, keepdims=True)
    arrays = {
        "image": rng.uniform(size=(*size, 3)).astype(np.float32),
        "label": rng.integers(0, 13, size).astype(np.float32),
        "depth": rng.uniform(0.7, 9.9, (*size, 1)).astype(np.float32),
        "normal": normal.astype(np.float32),
    }
    for name, unknown in (("label", -1), ("depth", 0), ("normal", 0)):
        arrays[name][:, 0] = unknown
    return arrays
