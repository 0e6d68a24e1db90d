"""Solids of a scene: boxes, balls and cylinders with a material, and the scene that holds them.

World: metres, x and y on the floor, z up.
"""

from __future__ import annotations

from collections.abc import Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np

from pipelines.data.sources.taskonomy.source import CLASSES

BOX, BALL, CYLINDER = 0, 1, 2
PLAIN, CHECKER, STRIPES, TILES, PLANKS, CLOUDS = range(6)

Pair = tuple[float, float]
Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Material:
    """Material of a surface: two colours (red, green, blue in 0..1 as displayed) that a pattern mixes.

    `scale` is the size of the pattern in metres and `gloss` the strength of the highlight. A surface with `glow`
    has its colour in any light.
    """

    colour: Vector
    second: Vector
    pattern: int = PLAIN
    scale: float = 0.3
    gloss: float = 0.0
    glow: bool = False


@dataclass(frozen=True)
class Solid:
    """A box, ball or cylinder: centre and half sizes in metres, turned by `yaw` about the vertical.

    `label` is its class id. The depth of a `hole` is `NOTHING`.
    """

    shape: int
    centre: Vector
    half: Vector
    material: Material
    label: int
    yaw: float = 0.0
    hole: bool = False


@dataclass(frozen=True)
class Scene:
    """A room of the inner size `size` with a corner at the origin, and a camera in it.

    `shell` holds the walls at both ends of x, those at both ends of y, the floor and the ceiling. `lamp` is a
    solid with a material that glows; the light comes from its centre. Each of the `pieces` is a group of solids
    that belong together, in any order.
    """

    size: Vector
    shell: Sequence[Solid]
    lamp: Solid
    pieces: Sequence[Sequence[Solid]]
    eye: Vector
    target: Vector
    tangent: float  # tangent of half the field of view


def paint(
    rng: np.random.Generator,
    hue: float,
    saturation: float,
    value: float,
    pattern: int = CLOUDS,
    scale: float = 0.4,
    gloss: float = 0.0,
    contrast: float = 0.85,
) -> Material:
    """A material with a random colour near the given one; its second colour is `contrast` times as bright."""
    hue = (hue + rng.normal(0, 0.025)) % 1
    saturation = min(max(saturation + rng.normal(0, 0.06), 0), 1)
    value = min(max(value + rng.normal(0, 0.05), 0.06), 1)
    first, second = (hsv_to_rgb(hue, saturation, min(v, 1)) for v in (value, value * contrast))
    return Material(first, second, pattern, scale, gloss)


def block(name: str, material: Material, x: Pair, y: Pair, z: Pair, yaw: float = 0.0) -> Solid:
    """A box of the class `name`, given by its ends along each axis."""
    middle = ((x[0] + x[1]) / 2, (y[0] + y[1]) / 2, (z[0] + z[1]) / 2)
    half = ((x[1] - x[0]) / 2, (y[1] - y[0]) / 2, (z[1] - z[0]) / 2)
    return Solid(BOX, middle, half, material, CLASSES.index(name), yaw)


def post(name: str, material: Material, x: float, y: float, z: Pair, radius: float) -> Solid:
    """An upright cylinder of the class `name`."""
    half = (radius, radius, (z[1] - z[0]) / 2)
    return Solid(CYLINDER, (x, y, (z[0] + z[1]) / 2), half, material, CLASSES.index(name))


def ball(name: str, material: Material, centre: Vector, half: Vector) -> Solid:
    """A ball of the class `name`, stretched to the half sizes."""
    return Solid(BALL, centre, half, material, CLASSES.index(name))
