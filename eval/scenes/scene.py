"""Procedural scenes with perfect ground truth.

A scene is a textured background with a few coloured shapes. Shapes are drawn from a long-tailed prior and
come in co-occurring pairs (a star often brings a moon), so that the random, popular and adversarial splits
of POPE differ by construction. These are procedural scenes: nothing here is, or represents, a COCO image.

Every pixel knows its object, so labels, boxes and patch masks are exact. A seed (an integer or a sequence of
integers) fixes a scene completely. `desk.py` adds signs, charts, tiny objects and clutter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from .shapes import COLORS, PARTNER, SHAPES, caption, draw_alpha

PATCH = 8
"""Side of a vision-tower patch in pixels."""

PAIR_RATE = 0.35
"""Probability that an object is followed by its partner."""

_PRIOR = np.array([(index + 1) ** -0.7 for index in range(len(SHAPES))])
_PRIOR /= _PRIOR.sum()
_COUNT_PRIOR = (0.10, 0.20, 0.30, 0.25, 0.15)


@dataclass(frozen=True)
class SceneObject:
    """One object. `x`, `y` (centre) and `radius` are in pixels of the scene, `angle` in radians."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the circumscribed square, in pixels."""
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius


@dataclass(frozen=True)
class Glyph:
    """One character of a sign, digit or lower-case letter; centre and radius in pixels."""

    character: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Bar:
    """One bar of a chart; centre in pixels, `radius` is half its height."""

    color: str
    x: float
    y: float
    radius: float


Part = SceneObject | Glyph | Bar
"""Anything that owns pixels of a scene."""


@dataclass(frozen=True)
class Scene:
    """An image and everything that is true of it.

    Attributes:
        image: RGB image.
        objects: the objects, left to right.
        index_map: int8 `(height, width)`, the part (position in `parts`) at a pixel, -1 for background.
        sign: the characters of its sign in reading order, if it has one.
        chart: the bars of its chart, left to right, if it has one.
        cluttered: whether there are meaningless strokes.
    """

    image: Image.Image
    objects: tuple[SceneObject, ...]
    index_map: np.ndarray
    sign: tuple[Glyph, ...] = ()
    chart: tuple[Bar, ...] = ()
    cluttered: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """Objects, characters and bars, as `index_map` numbers them."""
        return (*self.objects, *self.sign, *self.chart)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Distinct object names, left to right. The ground truth of POPE and CHAIR."""
        return tuple(dict.fromkeys(item.shape for item in self.objects))

    @cached_property
    def caption(self) -> str:
        """One sentence that names every object once, left to right."""
        return caption([(item.color, item.shape) for item in self.objects])

    def coverage(self, patch: int = PATCH) -> np.ndarray:
        """Share of each patch that each part covers: `(parts, height // patch, width // patch)`."""
        return coverage(self.index_map, len(self.parts), patch)

    def patch_mask(self, patch: int = PATCH, share: float = 0.2) -> np.ndarray:
        """Patches of which parts cover `share` or more: bool `(height // patch, width // patch)`."""
        return self.coverage(patch).sum(0) >= share


def coverage(index_map: np.ndarray, count: int, patch: int = PATCH) -> np.ndarray:
    """Share of each patch that each part covers: float32 `(count, height // patch, width // patch)`."""
    rows, columns = index_map.shape[0] // patch, index_map.shape[1] // patch
    cells = np.repeat(np.repeat(np.arange(rows * columns).reshape(rows, columns), patch, 0), patch, 1)
    flat = cells * (count + 1) + index_map + 1
    pixels = np.bincount(flat.ravel(), minlength=rows * columns * (count + 1))
    pixels = pixels.reshape(rows, columns, count + 1)[..., 1:]
    return (pixels.transpose(2, 0, 1) / patch**2).astype(np.float32)


def make_scene(seed: int | Sequence[int], size: tuple[int, int] = (128, 128), dense: bool = False) -> Scene:
    """Draw one scene.

    Args:
        seed: fixes the scene completely.
        size: width and height in pixels, each a multiple of 8.
        dense: 5 to 10 objects instead of 1 to 5.
    """
    if any(side < 64 or side % PATCH for side in size):
        raise ValueError(
            f"size must be at least 64 x 64 and a multiple of {PATCH} pixels, got {size[0]} x {size[1]}"
        )
    rng = np.random.default_rng(seed)
    width, height = size
    names = draw_names(rng, int(rng.integers(5, 11)) if dense else int(rng.choice(5, p=_COUNT_PRIOR)) + 1)
    placed: list[SceneObject] = []
    scale = 1.0 if width * height <= 128 * 128 else 1.35
    for name in names:
        item = _place(rng, name, placed, width, height, scale)
        if item is not None:
            placed.append(item)
    objects = tuple(sorted(placed, key=lambda item: item.x))
    canvas = draw_background(rng, width, height)
    index_map = np.full((height, width), -1, np.int8)
    for index, item in enumerate(objects):
        draw_object(rng, canvas, index_map, index, item)
    canvas += rng.standard_normal((height, width, 1), dtype=np.float32) * rng.uniform(1.0, 7.0)
    return Scene(Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)), objects, index_map)


def make_scenes(
    count: int, seed: int, sizes: Sequence[tuple[int, int]] = ((128, 128),), min_names: int = 1
) -> Iterator[Scene]:
    """Yield `count` scenes with at least `min_names` distinct objects, `sizes` taken in turn."""
    index = yielded = 0
    while yielded < count:
        scene = make_scene((seed, index), sizes[yielded % len(sizes)])
        index += 1
        if len(scene.names) >= min_names:
            yielded += 1
            yield scene


def draw_names(rng: np.random.Generator, count: int) -> list[str]:
    """Names of `count` objects; an object often brings its partner."""
    names = [SHAPES[rng.choice(len(SHAPES), p=_PRIOR)]]
    while len(names) < count:
        partner = PARTNER[names[-1]]
        brings = partner not in names and rng.random() < PAIR_RATE
        names.append(partner if brings else SHAPES[rng.choice(len(SHAPES), p=_PRIOR)])
    return names


def _place(
    rng: np.random.Generator, name: str, placed: list[SceneObject], width: int, height: int, scale: float
) -> SceneObject | None:
    """A free spot for one object, or None when sixty draws find none."""
    colors = tuple(COLORS)
    color, angle = colors[rng.integers(len(colors))], float(rng.uniform(-0.2, 0.2))
    for attempt in range(60):
        shrink = 1.0 if attempt < 30 else 0.7
        radius = max(7.5, float(np.exp(rng.uniform(np.log(7.5), np.log(22.0)))) * shrink) * scale
        x = float(rng.uniform(radius, width - radius))
        y = float(rng.uniform(radius, height - radius))
        if all(math.hypot(x - other.x, y - other.y) > 0.95 * (radius + other.radius) for other in placed):
            return SceneObject(name, color, x, y, radius, angle)
    return None


def draw_background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Float32 `(height, width, 3)`: a greyish base under one of four textures."""
    base = rng.uniform(70, 160) + rng.uniform(-14, 14, 3)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    kind = rng.integers(4)
    direction = rng.uniform(0, 2 * math.pi)
    along = x * np.float32(math.cos(direction)) + y * np.float32(math.sin(direction))
    if kind == 0:
        texture = np.zeros_like(along)
    elif kind == 1:
        texture = (along - along.mean()) / np.ptp(along) * rng.uniform(20, 60)
    elif kind == 2:
        texture = np.sin(along * (2 * math.pi / rng.uniform(8, 24))) * rng.uniform(4, 12)
    else:
        period = int(rng.integers(6, 20))
        texture = (((x // period) + (y // period)) % 2 - 0.5) * rng.uniform(6, 20)
    return (base.astype(np.float32) + texture[..., None]).astype(np.float32)


def draw_object(
    rng: np.random.Generator, canvas: np.ndarray, index_map: np.ndarray, index: int, item: SceneObject
) -> None:
    """Paint one object into `canvas` and `index_map`, in place."""
    height, width = index_map.shape
    reach = math.ceil(item.radius * 1.15) + 1
    left, top = int(item.x) - reach, int(item.y) - reach
    side = 2 * reach + 1
    alpha = draw_alpha(item.shape, item.x - left, item.y - top, item.radius, item.angle, side)
    rows = slice(max(top, 0), min(top + side, height))
    columns = slice(max(left, 0), min(left + side, width))
    alpha = alpha[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    color = np.array(COLORS[item.color], np.float32) + rng.uniform(-16, 16, 3).astype(np.float32)
    shade = np.linspace(rng.uniform(-14, 14), rng.uniform(-14, 14), alpha.shape[0], dtype=np.float32)
    paint = color + shade[:, None, None]
    canvas[rows, columns] += alpha[..., None] * (paint - canvas[rows, columns])
    index_map[rows, columns][alpha > 0.5] = index
