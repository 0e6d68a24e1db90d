"""Small pictures of stored inputs and dense labels, as PNG data addresses."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import matplotlib as mpl
import numpy as np
from PIL import Image

from pipelines.report.figures import COLOURS

SIDE = 128  # longest edge in pixels
STEPS = 64  # colours of the colour map; more are hard to distinguish and make larger files
STRIPES = ((255, 255, 255), (120, 120, 120))  # a pattern differs from every colour, also in print
STRIP = 64  # features in a row of a strip


@dataclass(frozen=True)
class Picture:
    """A PNG file as a data address, and its alternative text."""

    source: str
    alt: str


def photo(pixels: np.ndarray, alt: str) -> Picture:
    """A picture of an image `(H, W, C)` of any dtype: the first three channels as RGB, or the first one in grey.

    8-bit values are not scaled. Other values are scaled from the smallest to the largest value of the image.
    """
    shown = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1]
    if shown.dtype != np.uint8:
        values = np.nan_to_num(shown.astype(np.float64))
        span = values.max() - values.min() or 1.0
        shown = ((values - values.min()) / span * 255).astype(np.uint8)
    image = Image.fromarray(shown if shown.shape[-1] == 3 else shown[..., 0])
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return Picture(_address(image), alt)


def strip(values: np.ndarray, limits: tuple[float, float], alt: str) -> Picture:
    """A picture of features `(F,)` in rows, in the colour map from the lower to the upper limit."""
    rows = -(-len(values) // STRIP)
    padded = np.full(rows * min(STRIP, len(values)), np.nan)
    padded[: len(values)] = values
    grid = padded.reshape(rows, -1)
    cell = max(SIDE // grid.shape[1], 1)
    grid = grid.repeat(cell, 0).repeat(cell, 1)
    return heat(grid, ~np.isnan(grid), limits, alt)


def heat(values: np.ndarray, valid: np.ndarray, limits: tuple[float, float], alt: str) -> Picture:
    """A picture of numbers `(H, W)` in the colour map between the two limits; stripes if not `valid`."""
    values, valid = _small(values.astype(np.float64)), _small(valid)
    low, high = limits
    places = (np.where(valid, values, low) - low) / ((high - low) or 1.0)
    steps = np.clip(places * STEPS, 0, STEPS - 1).astype(np.uint8)
    return _indexed(steps, valid, _heat_colours(), alt)


def directions(units: np.ndarray, valid: np.ndarray, alt: str) -> Picture:
    """A picture of directions `(H, W, 3)`: -1 to 1 as red, green and blue; stripes if not `valid`."""
    units, valid = _small(units.astype(np.float64)), _small(valid)
    pixels = (np.clip(np.where(valid[..., None], units, 0.0), -1, 1) * 127.5 + 127.5).astype(np.uint8)
    pixels[~valid] = np.array(STRIPES, np.uint8)[_stripes(valid.shape)][~valid]
    return Picture(_address(Image.fromarray(pixels)), alt)


def class_map(ids: np.ndarray, valid: np.ndarray, seen: Sequence[int], alt: str) -> Picture:
    """A picture of class ids `(H, W)` in the colours of their places in `seen`; stripes if not `valid`."""
    ids, valid = _small(ids), _small(valid)
    places = np.searchsorted(seen, np.where(valid, ids, seen[0] if seen else 0)) % len(_class_colours())
    return _indexed(places, valid, _class_colours(), alt)


def class_colour(place: int) -> str:
    """Colour of a class in `class_map`, as an HTML colour."""
    return "#" + bytes(_class_colours()[place % len(_class_colours())]).hex()


def ramp() -> Picture:
    """A picture of the colour map from its lower to its upper end."""
    values = np.linspace(0, 1, SIDE)[None].repeat(10, 0)
    return heat(values, np.ones(values.shape, bool), (0.0, 1.0), "colour scale from low, dark, to high, light")


def stripes() -> Picture:
    """A picture of the stripes, which mean that there is no label."""
    invalid = np.zeros((10, 20), bool)
    return heat(invalid, invalid, (0.0, 1.0), "stripes")


def _small(values: np.ndarray) -> np.ndarray:
    """Every n-th pixel. Class ids and values with gaps must not be averaged."""
    step = -(-max(values.shape[:2]) // SIDE)
    return values[::step, ::step]


def _stripes(shape: tuple[int, ...]) -> np.ndarray:
    rows, columns = np.indices(shape[:2])
    return (rows + columns) // 3 % 2


def _indexed(places: np.ndarray, valid: np.ndarray, colours: Sequence[tuple[int, int, int]], alt: str) -> Picture:
    image = Image.fromarray(np.where(valid, places, len(colours) + _stripes(valid.shape)).astype(np.uint8))
    image.putpalette([part for colour in (*colours, *STRIPES) for part in colour])
    return Picture(_address(image), alt)


@lru_cache
def _heat_colours() -> tuple[tuple[int, int, int], ...]:
    """The colours of viridis. Its lightness rises monotonically, so that it is readable in grey."""
    table = mpl.colormaps["viridis"](np.linspace(0, 1, STEPS))
    return tuple(_triple(row[:3]) for row in table)


@lru_cache
def _class_colours() -> tuple[tuple[int, int, int], ...]:
    """The palette of the figures, then its lighter and its darker colours."""
    base = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in COLOURS])
    return tuple(_triple(row) for row in np.concatenate([base, 0.5 + base / 2, base / 2]))


def _triple(row: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (round(255 * float(part)) for part in row)
    return red, green, blue


def _address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
