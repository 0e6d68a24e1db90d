"""Furnished rooms: the positions of the furniture, and a camera that looks across the room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipelines.data.sources.rooms.furniture import THEMES, Piece, Style, draw_style, moved
from pipelines.data.sources.rooms.render import render
from pipelines.data.sources.rooms.solids import Scene, Solid, Vector, ball, block, paint


def render_scene(
    seed: int | Sequence[int], resolution: int, style: int | Sequence[int] = 0
) -> dict[str, np.ndarray]:
    """Render one room with its labels; see `rooms.render.render` for the arrays.

    Args:
        seed: Seed of the room, its furniture and the camera.
        resolution: Pixels of a side.
        style: Seed of the style that all rooms of a building share.
    """
    rng = np.random.default_rng(seed)
    return render(_scene(rng, draw_style(np.random.default_rng(style))), resolution, rng)


class _Room:
    """A room that is furnished piece by piece; pieces neither overlap nor block the camera."""

    def __init__(self, rng: np.random.Generator, style: Style) -> None:
        self.rng, self.style = rng, style
        self.size = (rng.uniform(2.8, 4.4), rng.uniform(2.8, 4.4), rng.uniform(2.3, 2.7))
        self.pieces: list[list[Solid]] = []
        self.taken: list[tuple[np.ndarray, np.ndarray]] = []  # lowest and highest corner of each piece
        self.behind = int(rng.integers(4))  # the wall behind the camera
        reach = self.size[1 - self.behind % 2]
        self.eye = self.at(self.behind, rng.uniform(-0.35, 0.35), rng.uniform(0.2, 0.5), rng.uniform(1.2, 1.7))
        self.target = self.at(self.behind, rng.uniform(-0.25, 0.25), 0.8 * reach, rng.uniform(0.6, 1.1))

    def shell(self) -> list[Solid]:
        """The room itself, in the order of `Scene`."""
        length, width, height = self.size
        thick, style = 0.1, self.style
        around = ((-thick, length + thick), (-thick, width + thick), (-thick, height + thick))
        return [
            block("background", style.walls, (-thick, 0.0), around[1], around[2]),
            block("background", style.walls, (length, length + thick), around[1], around[2]),
            block("background", style.walls, around[0], (-thick, 0.0), around[2]),
            block("background", style.walls, around[0], (width, width + thick), around[2]),
            block("background", style.floor, around[0], around[1], (-thick, 0.0)),
            block("background", style.ceiling, around[0], around[1], (height, height + thick)),
        ]

    def at(self, wall: int, share: float, out: float, z: float) -> Vector:
        """The point at `share` of the wall's length from its middle, `out` metres into the room."""
        length, width, _ = self.size
        middle = ((length / 2, 0.0), (length, width / 2), (length / 2, width), (0.0, width / 2))[wall]
        cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[wall]
        along = share * self.size[wall % 2]
        return (middle[0] + cos * along - sin * out, middle[1] + sin * along + cos * out, z)

    def add(self, piece: Piece, wall: int, share: float, out: float = 0.0, z: float = 0.0) -> bool:
        """Place a piece with its back to a wall; return False if there is no space for it."""
        half = piece.width / 2 / self.size[wall % 2]
        corners = np.array(
            [self.at(wall, share - half, out, z), self.at(wall, share + half, out + piece.depth, z)]
        )
        low, high = corners.min(0) - 0.02, corners.max(0) + np.array([0.02, 0.02, piece.height])
        near_eye = np.linalg.norm(np.clip(self.eye, low, high)[:2] - self.eye[:2]) < 0.8
        if near_eye or any((low < other[1]).all() and (other[0] < high).all() for other in self.taken):
            return False
        self.taken.append((low, high))
        solids = list(piece.solids)
        for top, things in piece.tops:
            if self.rng.random() < 0.75:
                make = things[int(self.rng.integers(len(things)))]
                solids += moved(make(self.rng, self.style), top, self.rng.normal(0, 0.2))
        self.pieces.append(moved(solids, self.at(wall, share, out, z), wall * math.pi / 2))
        return True

    def add_somewhere(self, piece: Piece, z: float = 0.0) -> None:
        """Place a piece at one of the walls that the camera sees; give up after ten tries."""
        for _ in range(10):
            wall = int((self.behind + self.rng.choice((1, 2, 2, 3))) % 4)
            free = 0.5 - piece.width / 2 / self.size[wall % 2] - 0.01
            if free > 0 and self.add(piece, wall, self.rng.uniform(-free, free), z=z):
                return


def _scene(rng: np.random.Generator, style: Style) -> Scene:
    """A furnished room and a camera that looks across it."""
    room = _Room(rng, style)
    standing, hanging, free = THEMES[int(rng.integers(len(THEMES)))]
    if free and rng.random() < 0.6:
        piece = free[int(rng.integers(len(free)))](rng, style)
        middle = room.size[1] / 2 - piece.depth / 2
        room.add(piece, 0, rng.uniform(-0.1, 0.1), middle + rng.uniform(-0.3, 0.3))
    for make in standing:
        room.add_somewhere(make(rng, style))
    for make in hanging:
        if rng.random() < 0.75:
            piece = make(rng, style)
            room.add_somewhere(piece, min(rng.uniform(1.2, 1.5), room.size[2] - piece.height - 0.1))
    x, y = (side * rng.uniform(0.35, 0.65) for side in room.size[:2])
    shade = replace(paint(rng, 0.12, 0.1, 1.0), glow=True)
    lamp = ball("background", shade, (x, y, room.size[2] - 0.3), (0.16, 0.16, 0.13))
    return Scene(room.size, room.shell(), lamp, room.pieces, room.eye, room.target, rng.uniform(0.55, 0.75))
