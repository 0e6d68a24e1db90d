"""Furniture: pieces of each class in the materials of a building, and the themes that combine them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipelines.data.sources.rooms.solids import (
    CHECKER,
    CLOUDS,
    PLANKS,
    STRIPES,
    TILES,
    Material,
    Solid,
    Vector,
    ball,
    block,
    paint,
    post,
)


@dataclass(frozen=True)
class Style:
    """The materials that the rooms of a building share."""

    floor: Material
    walls: Material
    ceiling: Material
    wood: Material
    white: Material
    steel: Material
    dark: Material


_SmallMaker = Callable[[np.random.Generator, Style], list[Solid]]


def _bottle(rng: np.random.Generator, _: Style) -> list[Solid]:
    glass = paint(rng, rng.choice((0.08, 0.35, 0.55)), 0.7, 0.4, CLOUDS, 0.2, 0.9)
    h, r = rng.uniform(0.2, 0.3), rng.uniform(0.035, 0.05)
    return [
        post("bottle", glass, 0, 0, (0, 0.7 * h), r),
        post("bottle", glass, 0, 0, (0.7 * h, h + 0.05), 0.4 * r),
    ]


def _vase(rng: np.random.Generator, _: Style) -> list[Solid]:
    clay = paint(rng, rng.uniform(), 0.55, 0.75, STRIPES, 0.1, 0.5, 0.7)
    h, r = rng.uniform(0.1, 0.16), rng.uniform(0.08, 0.12)
    return [ball("vase", clay, (0, 0, h), (r, r, h)), post("vase", clay, 0, 0, (1.7 * h, 2.3 * h), 0.5 * r)]


def _books(rng: np.random.Generator, _: Style) -> list[Solid]:
    ends = [(0.04 * i, 0.04 * i + 0.035) for i in range(rng.integers(1, 4))]
    return [
        block(
            "book", paint(rng, rng.uniform(), 0.65, 0.65), (-0.13, 0.13), (-0.09, 0.09), z, rng.uniform(-0.5, 0.5)
        )
        for z in ends
    ]


def _toaster(rng: np.random.Generator, style: Style) -> list[Solid]:
    body = (style.steel, paint(rng, 0.0, 0.7, 0.6, CLOUDS, 0.2, 0.6))[rng.integers(2)]
    slots = ((-0.055, -0.025), (0.025, 0.055))
    return [
        block("toaster", body, (-0.15, 0.15), (-0.1, 0.1), (0.01, 0.2)),
        *(block("toaster", style.dark, (-0.1, 0.1), y, (0.18, 0.205)) for y in slots),
    ]


def _microwave(rng: np.random.Generator, style: Style) -> list[Solid]:
    body = (style.white, style.steel, style.dark)[rng.integers(3)]
    return [
        block("microwave", body, (-0.25, 0.25), (-0.19, 0.19), (0, 0.29)),
        block("microwave", style.dark, (-0.22, 0.1), (0.19, 0.2), (0.04, 0.25)),
        block("microwave", style.steel, (0.13, 0.22), (0.19, 0.2), (0.06, 0.23)),
    ]


@dataclass(frozen=True)
class Piece:
    """A piece of furniture against a wall at y = 0, centred on x = 0, on the floor at z = 0.

    `tops` are positions for small things, each with the things that may stand there.
    """

    solids: list[Solid]
    width: float
    depth: float
    height: float
    tops: Sequence[tuple[Vector, Sequence[_SmallMaker]]] = ()


def draw_style(rng: np.random.Generator) -> Style:
    """Draw the materials of a building."""
    wood = paint(rng, rng.uniform(0.05, 0.1), 0.5, rng.uniform(0.4, 0.75), PLANKS, 0.12, 0.1, 0.6)
    floors = (
        replace(wood, scale=rng.uniform(0.12, 0.2)),
        paint(rng, rng.uniform(), 0.1, 0.75, TILES, rng.uniform(0.3, 0.6), 0.15, 0.6),
        paint(rng, rng.uniform(), 0.15, 0.8, CHECKER, rng.uniform(0.35, 0.6), 0.12, rng.uniform(0.4, 0.7)),
        paint(rng, rng.uniform(), 0.22, 0.6, CLOUDS, 0.12, 0.0, 0.75),
    )
    hue = rng.uniform()
    walls = (
        paint(rng, hue, 0.12, 0.86, CLOUDS, 1.0, 0.0, 0.96),
        paint(rng, hue, rng.uniform(0.2, 0.4), 0.78, CLOUDS, 1.0, 0.0, 0.95),
        paint(rng, hue, 0.2, 0.85, STRIPES, rng.uniform(0.2, 0.5), 0.0, 0.92),
        paint(rng, hue, 0.1, 0.85, TILES, rng.uniform(0.2, 0.3), 0.1, 0.88),
    )
    return Style(
        floor=floors[rng.integers(len(floors))],
        walls=walls[rng.integers(len(walls))],
        ceiling=paint(rng, 0.1, 0.03, 0.93, CLOUDS, 1.0, 0.0, 0.97),
        wood=wood,
        white=paint(rng, 0.1, 0.04, 0.95, CLOUDS, 0.5, 0.3, 0.97),
        steel=paint(rng, 0.6, 0.05, 0.7, CLOUDS, 0.6, 0.5, 0.9),
        dark=paint(rng, 0.6, 0.1, 0.14, CLOUDS, 0.3, 0.5, 0.7),
    )


def _couch(rng: np.random.Generator, _: Style) -> Piece:
    w, d, h = rng.uniform(0.7, 1.05), rng.uniform(0.8, 0.95), rng.uniform(0.75, 0.9)
    cloth = paint(rng, rng.choice((0.0, 0.1, 0.35, 0.6, 0.75)), rng.uniform(0.2, 0.7), 0.5, CLOUDS, 0.06)
    seat = replace(cloth, colour=cloth.second)
    pillow = paint(rng, rng.uniform(), 0.6, 0.8, STRIPES, 0.1)
    solids = [
        block("couch", cloth, (-w, w), (0.0, d), (0.06, 0.3)),
        block("couch", cloth, (-w, w), (0.0, 0.22), (0.3, h)),
        *(block("couch", cloth, (x - 0.1, x + 0.1), (0.0, d), (0.06, 0.6)) for x in (0.1 - w, w - 0.1)),
        *(block("couch", seat, x, (0.2, d + 0.02), (0.3, 0.44)) for x in ((0.2 - w, -0.01), (0.01, w - 0.2))),
        ball("couch", pillow, (rng.choice((0.4 - w, w - 0.4)), 0.32, 0.6), (0.2, 0.1, 0.18)),
    ]
    return Piece(solids, 2 * w, d, h)


def _bed(rng: np.random.Generator, style: Style) -> Piece:
    w, d = rng.uniform(0.5, 0.9), rng.uniform(1.9, 2.1)
    cover = paint(rng, rng.uniform(), 0.5, 0.7, rng.choice((CLOUDS, STRIPES, CHECKER)), rng.uniform(0.2, 0.5))
    solids = [
        block("bed", style.wood, (-w, w), (0.0, 0.06), (0.0, rng.uniform(0.8, 1.1))),
        block("bed", style.wood, (-w, w), (0.0, d), (0.1, 0.3)),
        block("bed", style.white, (0.02 - w, w - 0.02), (0.05, d - 0.02), (0.3, 0.5)),
        block("bed", cover, (-w - 0.01, w + 0.01), (0.6, d), (0.26, 0.53)),
        *(ball("bed", style.white, (x, 0.32, 0.55), (0.42 * w, 0.2, 0.1)) for x in (-w / 2, w / 2)),
    ]
    return Piece(solids, 2 * w, d, 1.0)


def _table(rng: np.random.Generator, style: Style) -> Piece:
    w, d, h = rng.uniform(0.5, 0.8), rng.uniform(0.7, 0.95), rng.uniform(0.68, 0.76)
    wood = replace(style.wood, scale=0.1, gloss=0.15)
    legs = [(x, y) for x in (0.06 - w, w - 0.06) for y in (0.06, d - 0.06)]
    solids = [block("dining table", wood, (-w, w), (0.0, d), (h - 0.05, h))]
    solids += [post("dining table", wood, x, y, (0.0, h - 0.05), 0.035) for x, y in legs]
    tops = [((x, rng.uniform(0.3, 0.7) * d, h), (_bottle, _vase, _books)) for x in (-0.6 * w, 0.0, 0.6 * w)]
    return Piece(solids, 2 * w, d, h, tops)


def _chair(rng: np.random.Generator, _: Style) -> Piece:
    w, h = rng.uniform(0.19, 0.23), rng.uniform(0.85, 1.0)
    painted = paint(rng, rng.choice((0.0, 0.07, 0.1, 0.55)), 0.55, 0.6, PLANKS, 0.1, 0.15)
    legs = [(x, y) for x in (0.03 - w, w - 0.03) for y in (0.03, 2 * w - 0.03)]
    solids = [
        block("chair", painted, (-w, w), (0.0, 2 * w), (0.42, 0.47)),
        block("chair", painted, (-w, w), (0.0, 0.04), (0.58, h)),
        *(block("chair", painted, (x, x + 0.04), (0.0, 0.04), (0.47, 0.58)) for x in (-w, w - 0.04)),
        *(post("chair", painted, x, y, (0.0, 0.42), 0.022) for x, y in legs),
    ]
    return Piece(solids, 2 * w, 2 * w, h)


def _refrigerator(rng: np.random.Generator, style: Style) -> Piece:
    w, d, h = rng.uniform(0.3, 0.4), rng.uniform(0.62, 0.7), rng.uniform(1.6, 1.9)
    body = (style.steel, style.white)[rng.integers(2)]
    split = h * rng.uniform(0.55, 0.7)
    solids = [
        block("refrigerator", style.dark, (0.01 - w, w - 0.01), (0.0, d - 0.05), (0.03, h - 0.01)),
        *(block("refrigerator", body, (-w, w), (0.0, d), z) for z in ((0.04, split - 0.012), (split + 0.012, h))),
        *(
            post("refrigerator", style.dark, 0.07 - w, d + 0.03, (z, z + 0.35), 0.015)
            for z in (split - 0.45, split + 0.1)
        ),
    ]
    return Piece(solids, 2 * w, d + 0.05, h)


def _oven(rng: np.random.Generator, style: Style) -> Piece:
    d, body = 0.62, (style.steel, style.white, style.dark)[rng.integers(3)]
    plates = [(x, y) for x in (-0.15, 0.15) for y in (0.18, 0.45)]
    solids = [
        block("oven", body, (-0.3, 0.3), (0.0, d), (0.0, 0.88)),
        block("oven", style.dark, (-0.22, 0.22), (d, d + 0.015), (0.2, 0.6)),
        block("oven", style.steel, (-0.24, 0.24), (d, d + 0.04), (0.66, 0.69)),
        *(ball("oven", style.steel, (x, d, 0.79), (0.03, 0.03, 0.03)) for x in (-0.2, -0.07, 0.07, 0.2)),
        *(post("oven", style.dark, x, y, (0.88, 0.9), 0.1) for x, y in plates),
    ]
    return Piece(solids, 0.6, d + 0.05, 0.9)


def _counter(rng: np.random.Generator, style: Style) -> Piece:
    w, d = rng.uniform(0.55, 0.9), 0.62
    top = paint(rng, 0.1, 0.1, rng.uniform(0.3, 0.7), CLOUDS, 0.04, 0.3, 0.7)
    doors = (style.white, style.wood)[rng.integers(2)]
    solids = [
        block("background", doors, (-w, w), (0.0, d - 0.04), (0.08, 0.86)),
        block("background", style.dark, (-0.008, 0.008), (0.0, d - 0.03), (0.1, 0.84)),
        block("background", top, (-w, w), (0.0, d), (0.86, 0.9)),
    ]
    things = (_microwave, _microwave, _toaster, _toaster, _bottle, _vase)
    return Piece(solids, 2 * w, d, 0.95, [((x, 0.3, 0.9), things) for x in (0.27 - w, w - 0.27)])


def _sink(rng: np.random.Generator, style: Style) -> Piece:
    w, d, h = rng.uniform(0.28, 0.38), rng.uniform(0.42, 0.52), rng.uniform(0.8, 0.88)
    solids = [
        block("background", style.wood, (0.04 - w, w - 0.04), (0.0, d - 0.05), (0.0, h - 0.14)),
        block("sink", style.white, (-w, w), (0.0, d), (h - 0.14, h)),
        ball("sink", style.steel, (0.0, 0.55 * d, h), (0.7 * w, 0.32 * d, 0.012)),
        post("sink", style.steel, 0.0, 0.06, (h, h + 0.2), 0.02),
        block("sink", style.steel, (-0.015, 0.015), (0.05, 0.2), (h + 0.18, h + 0.21)),
    ]
    return Piece(solids, 2 * w, d, h + 0.2)


def _toilet(rng: np.random.Generator, style: Style) -> Piece:
    h = rng.uniform(0.38, 0.44)
    lid = paint(rng, 0.1, 0.1, 0.9, CLOUDS, 0.2, 0.4, 0.9)
    solids = [
        block("toilet", style.white, (-0.2, 0.2), (0.0, 0.2), (h - 0.05, h + 0.36)),
        post("toilet", style.white, 0.0, 0.36, (0.0, h - 0.1), 0.13),
        ball("toilet", style.white, (0.0, 0.4, h - 0.08), (0.19, 0.27, 0.14)),
        ball("toilet", lid, (0.0, 0.4, h + 0.03), (0.19, 0.26, 0.03)),
    ]
    return Piece(solids, 0.42, 0.7, h + 0.36)


def _plant(rng: np.random.Generator, _: Style) -> Piece:
    r, z, tall = rng.uniform(0.12, 0.19), rng.uniform(0.25, 0.4), rng.uniform(0.3, 0.8)
    pot = paint(rng, rng.choice((0.04, 0.1, 0.6)), 0.5, 0.6, CLOUDS, 0.2, 0.1)
    solids = [post("potted plant", pot, 0.0, r + 0.1, (0.0, z), r)]
    for _leaf in range(9):
        leaf = paint(rng, 0.32, 0.65, rng.uniform(0.3, 0.6), CLOUDS, 0.06, 0.05, 0.6)
        x, y = rng.normal(0, 0.6 * r, 2)
        half = (rng.uniform(0.06, 0.16), rng.uniform(0.06, 0.16), rng.uniform(0.1, 0.22))
        solids.append(ball("potted plant", leaf, (x, max(y, -r) + r + 0.1, z + rng.uniform(0.05, tall)), half))
    return Piece(solids, 0.5, 2 * r + 0.2, z + tall)


def _bookcase(rng: np.random.Generator, style: Style) -> Piece:
    w, d, h = rng.uniform(0.35, 0.6), 0.3, rng.uniform(0.8, 1.7)
    shelves = np.linspace(0.05, h, max(3, round(h / 0.36)))
    solids = [block("background", style.wood, (-w, w), (0.0, 0.02), (0.0, h))]
    solids += [block("background", style.wood, (x, x + 0.03), (0.0, d), (0.0, h)) for x in (-w, w - 0.03)]
    solids += [block("background", style.wood, (-w, w), (0.0, d), (z - 0.03, z)) for z in shelves]
    for z in shelves[:-1]:
        x = 0.04 - w
        while x < w - 0.12:
            thick, tall = rng.uniform(0.03, 0.09), rng.uniform(0.17, 0.28)
            book = paint(rng, rng.uniform(), 0.65, rng.uniform(0.35, 0.85), STRIPES, 0.3)
            solids.append(block("book", book, (x, x + thick), (0.02, d - 0.06), (z, z + tall)))
            x += thick + rng.choice((0.003, 0.12), p=(0.8, 0.2))
    return Piece(solids, 2 * w, d, h, [((0.0, 0.15, h), (_vase, _bottle, _books))])


def _stand(rng: np.random.Generator, style: Style) -> Piece:
    w, h = rng.uniform(0.5, 0.75), rng.uniform(0.4, 0.55)
    screen_w, screen_h = w * rng.uniform(0.7, 0.95), w * rng.uniform(0.75, 0.9)
    screen = replace(paint(rng, 0.6, 0.4, 0.25, CLOUDS, 0.3, 0.6, 1.6), gloss=0.8)
    solids = [
        block("background", style.wood, (-w, w), (0.02, 0.42), (0.05, h)),
        block("tv", style.dark, (-0.15, 0.15), (0.12, 0.3), (h, h + 0.04)),
        block("tv", style.dark, (-screen_w, screen_w), (0.18, 0.23), (h + 0.04, h + screen_h)),
        block("tv", screen, (0.03 - screen_w, screen_w - 0.03), (0.22, 0.235), (h + 0.07, h + screen_h - 0.03)),
    ]
    return Piece(solids, 2 * w, 0.44, h + screen_h)


def _tv(rng: np.random.Generator, style: Style) -> Piece:
    w, h = rng.uniform(0.35, 0.7), rng.uniform(0.5, 0.8)
    screen = paint(rng, 0.6, 0.4, 0.25, CLOUDS, 0.3, 0.8, 1.6)
    solids = [
        block("tv", style.dark, (-w, w), (0, 0.05), (0, h)),
        block("tv", screen, (0.03 - w, w - 0.03), (0.05, 0.055), (0.03, h - 0.03)),
    ]
    return Piece(solids, 2 * w, 0.06, h)


def _clock(rng: np.random.Generator, style: Style) -> Piece:
    r = rng.uniform(0.14, 0.2)
    rim = paint(rng, rng.uniform(), 0.5, 0.4)
    solids = [
        ball("clock", rim, (0, 0.02, r), (r, 0.03, r)),
        ball("clock", style.white, (0, 0.03, r), (0.85 * r, 0.022, 0.85 * r)),
        block("clock", style.dark, (-0.01, 0.01), (0.05, 0.055), (r, 1.7 * r)),
        block("clock", style.dark, (0, 0.6 * r), (0.05, 0.055), (r - 0.01, r + 0.01)),
    ]
    return Piece(solids, 2 * r, 0.06, 2 * r)


def _window(rng: np.random.Generator, style: Style) -> Piece:
    """A bright sky without depth and class, in a white frame."""
    w, h = rng.uniform(0.35, 0.7), rng.uniform(0.7, 1.0)
    sky = replace(paint(rng, 0.58, 0.3, 1.0, CLOUDS, 0.7, 0.0, 0.8), glow=True)
    bars = ((-0.02, 0.02), (-w - 0.05, -w), (w, w + 0.05))
    solids = [replace(block("uncertain", sky, (-w, w), (0, 0.01), (0, h)), hole=True)]
    solids += [block("background", style.white, x, (0, 0.05), (-0.05, h + 0.05)) for x in bars]
    solids += [block("background", style.white, (-w, w), (0, 0.05), z) for z in ((-0.05, 0), (h, h + 0.05))]
    return Piece(solids, 2 * w + 0.1, 0.06, h + 0.05)


def _picture(rng: np.random.Generator, style: Style) -> Piece:
    w, h = rng.uniform(0.25, 0.6), rng.uniform(0.4, 0.7)
    pattern, scale = rng.choice((CLOUDS, STRIPES, CHECKER)), rng.uniform(0.1, 0.3)
    art = paint(rng, rng.uniform(), 0.5, 0.7, pattern, scale, 0.0, 0.4)
    solids = [
        block("background", style.wood, (-w, w), (0, 0.03), (0, h)),
        block("background", art, (0.04 - w, w - 0.04), (0.03, 0.035), (0.04, h - 0.04)),
    ]
    return Piece(solids, 2 * w, 0.04, h)


def _dining(rng: np.random.Generator, style: Style) -> Piece:
    """A table with equal chairs on its long sides."""
    table, chair = _table(rng, style), _chair(rng, style)
    gap, solids = chair.depth - rng.uniform(0.0, 0.2), [*table.solids]
    for x in (-0.25 * table.width, 0.25 * table.width):
        if rng.random() < 0.8:
            solids += moved(chair.solids, (x, -gap, 0.0), rng.normal(0, 0.15))
        if rng.random() < 0.8:
            solids += moved(chair.solids, (x, table.depth + gap, 0.0), math.pi + rng.normal(0, 0.15))
    return Piece(solids, table.width, table.depth, 1.0, table.tops)


_Maker = Callable[[np.random.Generator, Style], Piece]

# furniture along the walls, in order of placement; furniture on the walls; furniture in the middle
THEMES: Sequence[tuple[Sequence[_Maker], Sequence[_Maker], Sequence[_Maker]]] = (
    (
        (_couch, _stand, _bookcase, _plant, _chair, _plant, _couch),
        (_picture, _window, _clock, _picture),
        (_dining, _table),
    ),
    (
        (_refrigerator, _counter, _oven, _counter, _sink, _plant, _chair),
        (_window, _clock, _picture),
        (_dining,),
    ),
    (
        (_bed, _bookcase, _chair, _plant, _stand, _bookcase),
        (_picture, _window, _tv, _clock),
        (_chair,),
    ),
    (
        (_toilet, _sink, _counter, _plant, _chair, _plant),
        (_window, _picture, _clock),
        (),
    ),
)


def moved(solids: Sequence[Solid], offset: Vector, yaw: float) -> list[Solid]:
    """The solids, turned about the vertical through their origin and then shifted."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    return [
        replace(
            solid,
            centre=(
                offset[0] + cos * solid.centre[0] - sin * solid.centre[1],
                offset[1] + sin * solid.centre[0] + cos * solid.centre[1],
                offset[2] + solid.centre[2],
            ),
            yaw=solid.yaw + yaw,
        )
        for solid in solids
    ]
