"""Arrays of NYUv2, one file for each or one HDF5 file for each split, and their stored values."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from pipelines.data.sources.base import BadSampleError
from pipelines.data.sources.images import read_problem, to_integers
from pipelines.errors import UserError
from pipelines.storage import Location

H5 = (".h5", ".hdf5")
UNKNOWN = 255  # stored class of a pixel that has none, -1 in the files
CLASSES = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa", "table", "tv", "wall",
    "window",
)  # fmt: skip


def read_npy(location: Location) -> np.ndarray:
    """The array of a `.npy` file.

    Raises:
        BadSampleError: When the file is missing or damaged.
    """
    try:
        found = np.load(io.BytesIO(location.read_bytes()), allow_pickle=False)
    except (FileNotFoundError, PermissionError) as error:
        raise BadSampleError(f"cannot open the file {location}: {read_problem(error)}") from error
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise BadSampleError(f"damaged .npy file {location}: {error}") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
        raise BadSampleError(f"expected numbers: {location}")
    return found


@contextmanager
def opened_h5(location: Location) -> Iterator[Any]:
    """An HDF5 file, local or in object storage.

    Raises:
        UserError: When h5py is not installed, or the file cannot be opened.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            "an HDF5 file needs the package h5py, which is not installed",
            where=str(location),
            remedy="pip install 'dmtg[sources]'",
        ) from error
    try:
        with location.filesystem.open_input_file(location.path) as raw, h5py.File(raw, "r") as file:
            yield file
    except OSError as error:
        raise UserError(
            f"cannot open the HDF5 file: {error}", where=str(location), remedy="copy it again"
        ) from error


def stored_image(values: np.ndarray, name: str) -> np.ndarray:
    """uint8 (H, W, 3) of values from 0 to 1, or of bytes.

    Raises:
        BadSampleError: For another shape or range.
    """
    if values.ndim != 3 or values.shape[2] != 3:
        raise BadSampleError(f"expected an image (H, W, 3), got {values.shape}: {name}")
    if values.dtype == np.uint8:
        return values
    low, high = float(values.min()), float(values.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also false for NaN
        raise BadSampleError(f"expected values from 0 to 1, got {low:g} to {high:g}: {name}")
    return to_integers(values * 255, np.uint8)


def stored_classes(values: np.ndarray, name: str) -> np.ndarray:
    """uint8 (H, W): the class of each pixel, `UNKNOWN` for -1.

    Raises:
        BadSampleError: For an id that is no class.
    """
    if values.ndim != 2:
        raise BadSampleError(f"expected classes (H, W), got {values.shape}: {name}")
    known = np.rint(values)
    if not (known == values).all() or known.min() < -1 or known.max() >= len(CLASSES):
        raise BadSampleError(
            f"expected classes from -1 to {len(CLASSES) - 1}, got {values.min():g} to {values.max():g}: {name}"
        )
    return np.where(known < 0, UNKNOWN, known).astype(np.uint8)


def stored_depth(values: np.ndarray, name: str) -> np.ndarray:
    """float16 (H, W) in metres; NaN where nothing was measured, 0 in the files.

    Raises:
        BadSampleError: For another shape.
    """
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2:
        raise BadSampleError(f"expected depths (H, W, 1), got {values.shape}: {name}")
    return np.where(values > 0, values, np.nan).astype(np.float16)


def stored_normal(values: np.ndarray, name: str) -> np.ndarray:
    """float16 (H, W, 3), unit vectors; NaN where there is no surface, (0, 0, 0) in the files.

    Raises:
        BadSampleError: For another shape.
    """
    if values.ndim != 3 or values.shape[2] != 3:
        raise BadSampleError(f"expected normals (H, W, 3), got {values.shape}: {name}")
    there = np.any(values != 0, axis=2, keepdims=True)
    return np.where(there, values, np.nan).astype(np.float16)


# folder or dataset → what its array becomes
STORED: Mapping[str, Callable[[np.ndarray, str], np.ndarray]] = {
    "image": stored_image,
    "label": stored_classes,
    "depth": stored_depth,
    "normal": stored_normal,
}
