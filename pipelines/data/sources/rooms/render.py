"""Renderer of a scene of simple solids: the picture and the exact labels of every pixel.

World: metres, x and y on the floor, z up. Camera: x right, y up, z towards the viewer. Every solid is a unit
cube, ball or cylinder that is stretched, turned about the vertical and moved. A ray is therefore tested in the
unit frame of the solid, with one test for each shape. All rays of a picture are tested at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from pipelines.data.sources.images import to_integers
from pipelines.data.sources.rooms.solids import (
    BALL,
    CHECKER,
    CLOUDS,
    CYLINDER,
    PLANKS,
    STRIPES,
    TILES,
    Scene,
    Solid,
    Vector,
)

UNITS_PER_METRE = 512  # unit of a depth value
NOTHING = 65535  # depth of a pixel without a surface

# With these gains the mean and the deviation of the two responses are near those of Taskonomy's files
# (keypoints 50 and 100, edges 718 and 1070).
_KEYPOINT_GAIN = 40.0
_EDGE_GAIN = 115.0

# strengths have no unit; the reach is in metres squared
_LAMP, _LAMP_REACH, _AROUND, _FILL, _GLOW = 1.9, 4.0, 0.29, 0.16, 2.5
_FAR, _TINY = np.float32(1e6), np.float32(1e-9)


class _Solids:
    """The solids of a scene as arrays with one entry for each solid."""

    def __init__(self, solids: Sequence[Solid]) -> None:
        materials = [solid.material for solid in solids]
        self.shape = np.array([s.shape for s in solids])
        self.centre = np.array([s.centre for s in solids], np.float32)
        self.radius = np.array([np.linalg.norm(s.half) for s in solids], np.float32)
        self.half = np.array([s.half for s in solids], np.float32)
        self.label = np.array([s.label for s in solids], np.uint8)
        self.hole = np.array([s.hole for s in solids])
        # the square of a display value approximates linear light and is cheap to invert
        self.colour = np.array([m.colour for m in materials], np.float32).T ** 2
        self.second = np.array([m.second for m in materials], np.float32).T ** 2
        self.pattern = np.array([m.pattern for m in materials])
        self.scale = np.array([m.scale for m in materials], np.float32)
        self.gloss = np.array([m.gloss for m in materials], np.float32)
        self.glow = np.array([m.glow for m in materials])
        yaw = np.array([s.yaw for s in solids])
        turn = np.zeros((len(solids), 3, 3))
        turn[:, 0, 0] = turn[:, 1, 1] = np.cos(yaw)
        turn[:, 0, 1], turn[:, 1, 0], turn[:, 2, 2] = np.sin(yaw), -np.sin(yaw), 1
        # (P, 3, 3): world to unit frame
        self.to_unit = (turn / self.half[:, :, None]).astype(np.float32)

    def ball(self, group: range) -> tuple[np.ndarray, float]:
        """Centre and radius of a ball that encloses a group of solids."""
        centre, radius = self.centre[group.start : group.stop], self.radius[group.start : group.stop]
        middle = ((centre - radius[:, None]).min(0) + (centre + radius[:, None]).max(0)) / 2
        return middle, float((np.sqrt(((centre - middle) ** 2).sum(1)) + radius).max())


def render(scene: Scene, resolution: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Render a scene: its picture and its labels, in Taskonomy's encodings.

    A pixel's labels are those of the ray through its centre. Its colour is a weighted mean over that ray and
    its eight neighbours at half a pixel's distance, so that edges are smooth.

    Returns:
        By task: rgb and normal uint8 (R, R, 3); segment_semantic uint8 (R, R); depth_zbuffer, keypoints2d and
        edge_texture uint16 (R, R). If the depth is `NOTHING` (a window), the normal is that of the pane.
    """
    side = 2 * resolution + 1
    solids = _Solids([*scene.shell, scene.lamp, *(solid for piece in scene.pieces for solid in piece)])
    eye = np.array(scene.eye, np.float32)
    axes = _camera_axes(scene)
    rays = _rays(axes, scene.tangent, side)
    depth, index = _leave_room(scene.size, eye, rays)
    _cast(solids, _groups(scene, with_lamp=True), eye, rays, depth, index)
    points = eye[:, None] + depth * rays
    normal, u, v = _surface(solids, index, points)
    light = _shade(scene, solids, index, points, normal, -rays, _albedo(solids, index, u, v, rng))
    picture = _develop(light.reshape(3, side, side), rng)
    centre = (slice(1, None, 2), slice(1, None, 2))
    surface, at = depth.reshape(side, side)[centre], index.reshape(side, side)[centre]
    to_camera = axes * np.array([[1], [1], [-1]], np.float32)
    facing = (to_camera @ normal).reshape(3, side, side)[:, *centre]
    return {
        "rgb": picture,
        "depth_zbuffer": to_integers(np.where(solids.hole[at], NOTHING, surface * UNITS_PER_METRE), np.uint16),
        "normal": to_integers((facing.transpose(1, 2, 0) + 1) * 127.5, np.uint8),
        "segment_semantic": solids.label[at],
        **responses(picture),
    }


def _camera_axes(scene: Scene) -> np.ndarray:
    """Right, up and forward directions of the camera in the world: the rows of a (3, 3)."""
    forward = np.subtract(scene.target, scene.eye)
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(right, forward), forward]).astype(np.float32)


def _rays(axes: np.ndarray, tangent: float, side: int) -> np.ndarray:
    """(3, side²) directions whose component along the optical axis is 1, so that ray length is z-buffer depth.

    The grid is half a pixel wide: pixel centres are at odd rows and columns, corners at even ones.
    """
    across = np.linspace(-tangent, tangent, side, dtype=np.float32)
    x, y = np.meshgrid(across, -across)
    return axes.T @ np.stack([x.ravel(), y.ravel(), np.ones(side * side, np.float32)])


def _leave_room(size: Vector, eye: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intersections of rays from inside the room with its shell: (N,) distance and (N,) index of the wall."""
    up = rays > 0
    ends = np.where(up, np.array(size, np.float32)[:, None], 0)
    reach = (ends - eye[:, None]) / np.where(rays == 0, _TINY, rays)
    axis = np.abs(reach).argmin(0)
    chosen = np.arange(rays.shape[1])
    return np.abs(reach[axis, chosen]), 2 * axis + up[axis, chosen]


def _groups(scene: Scene, *, with_lamp: bool) -> list[range]:
    """Indices of the solids of each piece, as `render` numbers them; the lamp itself casts no shadow."""
    first = len(scene.shell)
    groups = [range(first, first + 1)]
    for piece in scene.pieces:
        groups.append(range(groups[-1].stop, groups[-1].stop + len(piece)))
    return groups if with_lamp else groups[1:]


def _cast(
    solids: _Solids,
    groups: Sequence[range],
    origin: np.ndarray,
    rays: np.ndarray,
    reach: np.ndarray,
    index: np.ndarray,
) -> None:
    """Shorten each ray from `origin` to the nearest solid that it meets.

    Args:
        solids: All solids.
        groups: Indices of the solids to test; neighbouring solids are in one group.
        origin: (3,).
        rays: (3, N), of any length; distances are multiples of this length.
        reach: (N,) distance at which each ray ends, changed in place.
        index: (N,) solid at which each ray ends, changed in place.
    """
    unit = rays / np.sqrt((rays * rays).sum(0))
    for group in groups:
        here = _near(unit, *solids.ball(group), origin)
        unit_here, rays_here = unit.take(here, axis=1), rays.take(here, axis=1)
        for i in group:
            near = _near(unit_here, solids.centre[i], solids.radius[i], origin)
            start = solids.to_unit[i] @ (origin - solids.centre[i])
            enter, leave = _interval(solids.shape[i], start, solids.to_unit[i] @ rays_here.take(near, axis=1))
            at = here[near]
            hit = np.flatnonzero((enter < leave) & (enter > 1e-4) & (enter < reach[at]))
            at = at[hit]
            reach[at] = enter[hit]
            index[at] = i


def _near(unit: np.ndarray, centre: np.ndarray, radius: float, origin: np.ndarray) -> np.ndarray:
    """Indices of the rays that may pass through a ball; only these need the exact tests."""
    towards = centre - origin
    distance = np.sqrt(towards @ towards)
    if distance <= radius:
        return np.arange(unit.shape[1])
    return np.flatnonzero((towards / distance) @ unit >= np.sqrt(1 - (radius / distance) ** 2))


def _interval(shape: int, start: np.ndarray, ray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances at which rays enter and leave a convex unit shape: (N,) each, enter > leave for a miss."""
    ray = np.where(np.abs(ray) < _TINY, _TINY, ray)
    if shape == BALL:
        return _round(start, ray)
    flat = slice(2, 3) if shape == CYLINDER else slice(0, 3)
    first, second = (-1 - start[flat, None]) / ray[flat], (1 - start[flat, None]) / ray[flat]
    enter, leave = np.minimum(first, second).max(0), np.maximum(first, second).min(0)
    if shape == CYLINDER:
        enter_side, leave_side = _round(start[:2], ray[:2])
        enter, leave = np.maximum(enter, enter_side), np.minimum(leave, leave_side)
    return enter, leave


def _round(start: np.ndarray, ray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances at which rays enter and leave |x| ≤ 1, in two or three dimensions."""
    a, b, c = (ray * ray).sum(0), start @ ray, start @ start - 1
    inside = b * b - a * c
    root = np.sqrt(np.maximum(inside, 0))
    return np.where(inside > 0, (-b - root) / a, _FAR), (-b + root) / a


def _surface(solids: _Solids, index: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit normals (3, N) in the world, and texture coordinates u and v (N,) in metres."""
    to_unit = solids.to_unit[index]
    at = np.einsum("nij,jn->in", to_unit, points - solids.centre.T.take(index, axis=1))
    shape = solids.shape[index]
    size = np.abs(at)
    side = np.sqrt(at[0] ** 2 + at[1] ** 2)
    # the largest coordinate selects the face of a box; a cylinder has two caps (axis 2) and a side (axis 3)
    axis = np.where(shape == CYLINDER, np.where(size[2] > side, 2, 3), size.argmax(0))
    gradient = np.where(axis == np.arange(3)[:, None], np.sign(at), 0).astype(np.float32)
    wound = (shape == BALL) | (axis == 3)
    gradient[:2, wound] = at[:2, wound]
    gradient[2] = np.where(shape == BALL, at[2], gradient[2])
    normal = np.einsum("nij,in->jn", to_unit, gradient)
    half = solids.half.T.take(index, axis=1)
    metres = at * half
    u = np.where(axis == 0, metres[1], metres[0])
    u = np.where(wound, np.arctan2(at[1], at[0]) * half[0], u)
    v = np.where((axis == 2) & ~wound, metres[1], metres[2])
    return normal / np.sqrt((normal * normal).sum(0)), u, v


def _albedo(
    solids: _Solids, index: np.ndarray, u: np.ndarray, v: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The colour of each point before lighting: (3, N)."""
    table = rng.random((64, 64), np.float32)
    # every solid shows a different part of the pattern
    shift = (rng.random(len(solids.shape), np.float32) * 40)[index]
    u, v = u / solids.scale[index], v / solids.scale[index]
    pattern, mix = solids.pattern[index], np.zeros_like(u)
    for kind in range(1, CLOUDS + 1):
        chosen = np.flatnonzero(pattern == kind)
        mix[chosen] = _pattern(kind, u[chosen], v[chosen], shift[chosen], table)
    first, second = solids.colour.take(index, axis=1), solids.second.take(index, axis=1)
    colour = first + (second - first) * mix
    return colour * (0.9 + 0.2 * _noise(table, u * 3 + shift, v * 3))


def _pattern(kind: int, u: np.ndarray, v: np.ndarray, shift: np.ndarray, table: np.ndarray) -> np.ndarray:
    """How much of the second colour there is, 0..1; a period of the pattern is 1 in u and v."""
    if kind == CHECKER:
        return (np.floor(u) + np.floor(v)) % 2
    if kind == STRIPES:
        return np.floor(2 * u) % 2
    if kind == TILES:
        return ((u % 1 < 0.06) | (v % 1 < 0.06)).astype(np.float32)
    if kind == PLANKS:
        row = np.floor(v)
        seam = (v % 1 < 0.07) | ((u * 0.2 + row * 0.37) % 1 < 0.012)
        grain = 0.5 * _noise(table, u * 0.5 + shift, v * 6) + 0.5 * _noise(table, row * 7.3, row * 3.1)
        return np.where(seam, 1, 0.8 * grain).astype(np.float32)
    return 0.6 * _noise(table, u + shift, v) + 0.4 * _noise(table, 2.7 * u, 2.7 * v + shift)


def _noise(table: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Random values on a grid, smoothly joined: 0..1."""
    left, low = np.floor(u), np.floor(v)
    s, t = u - left, v - low
    s, t = s * s * (3 - 2 * s), t * t * (3 - 2 * t)
    i, j = left.astype(np.int32) & 63, low.astype(np.int32) & 63
    k, m = (i + 1) & 63, (j + 1) & 63
    return (table[i, j] * (1 - s) + table[k, j] * s) * (1 - t) + (table[i, m] * (1 - s) + table[k, m] * s) * t


def _shade(
    scene: Scene,
    solids: _Solids,
    index: np.ndarray,
    points: np.ndarray,
    normal: np.ndarray,
    to_eye: np.ndarray,
    albedo: np.ndarray,
) -> np.ndarray:
    """Light from each point to the eye: a lamp with shadows, ambient light, fill light and a highlight."""
    lamp = np.array(scene.lamp.centre, np.float32)
    to_lamp = lamp[:, None] - points
    square = (to_lamp * to_lamp).sum(0)
    to_lamp /= np.sqrt(square)
    view = to_eye / np.sqrt((to_eye * to_eye).sum(0))
    facing = np.maximum((normal * to_lamp).sum(0), 0)
    lit = np.flatnonzero(facing)
    lit = lit[_in_sight(scene, solids, lamp, (points + 0.01 * normal).take(lit, axis=1))]
    strength = np.zeros_like(facing)
    strength[lit] = _LAMP * _LAMP_REACH / (_LAMP_REACH + square[lit])
    around = _AROUND * _openness(scene.size, points, normal)
    fill = _FILL * np.maximum((normal * view).sum(0), 0)
    middle = to_lamp + view
    middle /= np.sqrt((middle * middle).sum(0))
    highlight = solids.gloss[index] * strength * np.maximum((normal * middle).sum(0), 0) ** 40
    light = albedo * (strength * facing + around + fill) + highlight
    return np.where(solids.glow[index], _GLOW * albedo, light)


def _in_sight(scene: Scene, solids: _Solids, lamp: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(N,) True for a point with no solid between it and the lamp."""
    blocker = np.full(points.shape[1], -1)
    reach = np.ones(points.shape[1], np.float32)
    _cast(solids, _groups(scene, with_lamp=False), lamp, points - lamp[:, None], reach, blocker)
    return blocker < 0


def _openness(size: Vector, points: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Share of the ambient light that reaches a point: less in the corners of the room."""
    inner = np.array(size, np.float32)[:, None]
    gap = np.maximum(np.minimum(points, inner - points), 0)
    return (1 - 0.4 * np.exp(-gap / 0.35) * (1 - np.abs(normal))).prod(0)


def _develop(light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Convert light on the half-pixel grid (3, 2R + 1, 2R + 1) to a picture with sensor noise, uint8 (R, R, 3)."""
    rows = (light[:, :-2:2] + 2 * light[:, 1:-1:2] + light[:, 2::2]) / 4
    pixels = (rows[..., :-2:2] + 2 * rows[..., 1:-1:2] + rows[..., 2::2]) / 4
    shown = 255 * np.sqrt(1 - np.exp(-1.25 * pixels)) + rng.normal(0, 1.5, pixels.shape).astype(np.float32)
    return np.ascontiguousarray(np.rint(shown.clip(0, 255)).astype(np.uint8).transpose(1, 2, 0))


def responses(picture: np.ndarray) -> dict[str, np.ndarray]:
    """Keypoint and edge strength of a picture, from its brightness alone.

    Keypoints: the square root of the scale-normalised determinant of the Hessian at σ = 1.5, which SURF
    approximates (Bay et al., ECCV 2006), and 0 where the determinant is negative. The root makes it proportional
    to the contrast. Edges: the magnitude of the gradient at σ = 1.

    Args:
        picture: uint8 (H, W, 3).

    Returns:
        keypoints2d and edge_texture, uint16 (H, W).
    """
    grey = picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    sigma = 1.5
    # kernels that are cut off at the usual 4σ respond to constant brightness
    rr, cc, rc = (ndimage.gaussian_filter(grey, sigma, order, truncate=5.0) for order in ((2, 0), (0, 2), (1, 1)))
    keypoints = _KEYPOINT_GAIN * sigma**2 * np.sqrt(np.maximum(rr * cc - rc * rc, 0))
    edges = _EDGE_GAIN * ndimage.gaussian_gradient_magnitude(grey, 1.0)
    return {
        "keypoints2d": to_integers(keypoints, np.uint16),
        "edge_texture": to_integers(edges, np.uint16),
    }
