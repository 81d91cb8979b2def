"""Procedural scenes with perfect ground truth.

A scene is a textured background with a few coloured shapes. Shapes are drawn from a long-tailed prior and
come in co-occurring pairs (a star often brings a moon), so that the random, popular and adversarial splits
of POPE differ by construction. These are procedural scenes: nothing here is, or stands for, a COCO image.

Every pixel knows its object, so labels, boxes and patch masks are exact. A seed (an integer or a sequence of
integers) fixes a scene completely.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SHAPES = (
    "star",
    "moon",
    "circle",
    "ring",
    "square",
    "diamond",
    "triangle",
    "arrow",
    "heart",
    "cross",
    "house",
    "crown",
)
"""Object names, the likelier first. Neighbours (0, 1), (2, 3), ... are co-occurring partners."""

COLORS = {
    "red": (214, 40, 40),
    "green": (42, 160, 62),
    "blue": (40, 70, 214),
    "yellow": (240, 222, 50),
    "orange": (246, 136, 24),
    "purple": (140, 46, 176),
    "cyan": (48, 206, 214),
    "white": (246, 246, 246),
}
"""Colour names and their mean RGB."""

PARTNER = {name: SHAPES[index ^ 1] for index, name in enumerate(SHAPES)}
"""The shape that tends to appear together with each shape."""

PLURALS = {name: name + ("es" if name.endswith("s") else "s") for name in SHAPES}
"""Plural of each object name."""

OBJECTS = {word: name for name in SHAPES for word in (name, PLURALS[name])}
"""Word-to-object table for CHAIR: every word that mentions an object, and the object it mentions."""

PATCH = 8
"""Side of a vision-tower patch in pixels."""

PAIR_RATE = 0.35
"""Probability that an object is followed by its partner."""

_PRIOR = np.array([(index + 1) ** -0.7 for index in range(len(SHAPES))])
_PRIOR /= _PRIOR.sum()
_COUNT_PRIOR = (0.10, 0.20, 0.30, 0.25, 0.15)
_SUPERSAMPLING = 3


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
class Scene:
    """An image and everything that is true of it.

    Attributes:
        image: RGB image.
        objects: the objects, left to right.
        index_map: int8 `(height, width)`, the object (position in `objects`) at a pixel, -1 for background.
    """

    image: Image.Image
    objects: tuple[SceneObject, ...]
    index_map: np.ndarray

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Distinct object names, left to right. The ground truth of POPE and CHAIR."""
        return tuple(dict.fromkeys(item.shape for item in self.objects))

    @cached_property
    def caption(self) -> str:
        """One sentence that names every object once, left to right."""
        return caption([(item.color, item.shape) for item in self.objects])

    def coverage(self, patch: int = PATCH) -> np.ndarray:
        """Share of each patch that each object covers: `(objects, height // patch, width // patch)`."""
        return coverage(self.index_map, len(self.objects), patch)

    def patch_mask(self, patch: int = PATCH, share: float = 0.2) -> np.ndarray:
        """Patches of which objects cover `share` or more: bool `(height // patch, width // patch)`."""
        return self.coverage(patch).sum(0) >= share


def with_article(words: str) -> str:
    """`words` after the indefinite article it takes: "a star", "an arrow"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def caption(pairs: Sequence[tuple[str, str]]) -> str:
    """The caption of a list of (colour, shape) pairs, in the given order."""
    phrases = [with_article(f"{color} {shape}") for color, shape in pairs]
    if not phrases:
        return "The image shows nothing."
    listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return f"The image shows {listed}."


def coverage(index_map: np.ndarray, count: int, patch: int = PATCH) -> np.ndarray:
    """Share of each patch that each object covers: float32 `(count, height // patch, width // patch)`."""
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
    names = _draw_names(rng, int(rng.integers(5, 11)) if dense else int(rng.choice(5, p=_COUNT_PRIOR)) + 1)
    placed: list[SceneObject] = []
    scale = 1.0 if width * height <= 128 * 128 else 1.35
    for name in names:
        item = _place(rng, name, placed, width, height, scale)
        if item is not None:
            placed.append(item)
    objects = tuple(sorted(placed, key=lambda item: item.x))
    canvas = _background(rng, width, height)
    index_map = np.full((height, width), -1, np.int8)
    for index, item in enumerate(objects):
        _draw(rng, canvas, index_map, index, item)
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


def cooccurrence(scenes: Sequence[Scene]) -> Counter[tuple[str, str]]:
    """How many scenes show both objects, for each ordered pair of distinct names."""
    return Counter((a, b) for scene in scenes for a in scene.names for b in scene.names if a != b)


def pope_questions(scenes: Sequence[Scene], split: str, seed: int) -> list[dict[str, Any]]:
    """POPE questions about `scenes`, built by the rules of the official code.

    Per scene with at least three distinct objects: the first three, each followed by an absent object that
    was not asked before. The absent one is drawn uniformly (`random`), is the most frequent (`popular`), or
    goes most often with the object just asked (`adversarial`).

    Returns:
        Dictionaries: `question_id` from 1, `image` (position in `scenes`), `text`, `label` (yes/no),
            `object`.

    Raises:
        ValueError: an unknown split, or a scene that has all the objects that the scenes show.
    """
    if split not in ("random", "popular", "adversarial"):
        raise ValueError(f"split must be random, popular or adversarial, got {split!r}")
    rng = np.random.default_rng(seed)
    frequency = Counter(name for scene in scenes for name in scene.names)
    together = cooccurrence(scenes)
    seen = sorted(frequency)
    questions: list[dict[str, Any]] = []

    def ask(image: int, name: str, label: str) -> None:
        text = f"Is there {with_article(name)} in the image?"
        number = len(questions) + 1
        questions.append(
            {"question_id": number, "image": image, "text": text, "label": label, "object": name}
        )

    for image, scene in enumerate(scenes):
        if len(scene.names) < 3:
            continue
        asked: set[str] = set()
        for name in scene.names[:3]:
            absent = [other for other in seen if other not in scene.names and other not in asked]
            if not absent:
                raise ValueError(
                    f"{len(scenes)} scenes show {len(seen)} kinds of objects, too few to ask for an absent one: scene "
                    f"{image} has {', '.join(scene.names)}. Take more scenes, 4 at least."
                )
            if split == "random":
                negative = absent[int(rng.integers(len(absent)))]
            elif split == "popular":
                negative = max(absent, key=lambda other: frequency[other])
            else:
                negative = max(absent, key=lambda other: together[name, other])
            asked.add(negative)
            ask(image, name, "yes")
            ask(image, negative, "no")
    return questions


def _draw_names(rng: np.random.Generator, count: int) -> list[str]:
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


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
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


def _draw(
    rng: np.random.Generator, canvas: np.ndarray, index_map: np.ndarray, index: int, item: SceneObject
) -> None:
    """Paint one object into `canvas` and `index_map`, in place."""
    height, width = index_map.shape
    reach = math.ceil(item.radius * 1.15) + 1
    left, top = int(item.x) - reach, int(item.y) - reach
    side = 2 * reach + 1
    alpha = _alpha(item, item.x - left, item.y - top, side)
    rows = slice(max(top, 0), min(top + side, height))
    columns = slice(max(left, 0), min(left + side, width))
    alpha = alpha[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    color = np.array(COLORS[item.color], np.float32) + rng.uniform(-16, 16, 3).astype(np.float32)
    shade = np.linspace(rng.uniform(-14, 14), rng.uniform(-14, 14), alpha.shape[0], dtype=np.float32)
    paint = color + shade[:, None, None]
    canvas[rows, columns] += alpha[..., None] * (paint - canvas[rows, columns])
    index_map[rows, columns][alpha > 0.5] = index


def _alpha(item: SceneObject, x: float, y: float, side: int) -> np.ndarray:
    """Antialiased opacity, float32 `(side, side)` in 0..1, of an object centred at (x, y)."""
    factor = _SUPERSAMPLING
    mask = Image.new("L", (side * factor, side * factor), 0)
    pen = ImageDraw.Draw(mask)
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    for fill, outline in _OUTLINES[item.shape]:
        turned = [(u * cos - v * sin, u * sin + v * cos) for u, v in outline]
        pen.polygon(
            [((x + u * item.radius) * factor, (y + v * item.radius) * factor) for u, v in turned], fill=fill
        )
    return np.asarray(mask.reduce(factor), np.float32) / 255


def _arc(count: int, radius: float = 1.0, x: float = 0.0, y: float = 0.0) -> list[tuple[float, float]]:
    steps = [2 * math.pi * step / count for step in range(count)]
    return [(x + radius * math.sin(turn), y - radius * math.cos(turn)) for turn in steps]


def _star() -> list[tuple[float, float]]:
    steps = [(math.pi * step / 5, 1.0 if step % 2 == 0 else 0.42) for step in range(10)]
    return [(radius * math.sin(turn), -radius * math.cos(turn)) for turn, radius in steps]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * step / 40 for step in range(40)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1,
        )
        for t in turns
    ]


# Outlines in units of the radius, y downwards, painted in order: 255 adds to the object, 0 cuts a hole.
_OUTLINES: dict[str, list[tuple[int, list[tuple[float, float]]]]] = {
    "star": [(255, _star())],
    "moon": [(255, _arc(40)), (0, _arc(40, 0.85, 0.5, -0.12))],
    "circle": [(255, _arc(40, 0.95))],
    "ring": [(255, _arc(40)), (0, _arc(40, 0.55))],
    "square": [(255, [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])],
    "diamond": [(255, [(0, -1.1), (0.68, 0), (0, 1.1), (-0.68, 0)])],
    "triangle": [(255, [(0, -0.95), (0.95, 0.8), (-0.95, 0.8)])],
    "arrow": [(255, [(-1, -0.3), (0.1, -0.3), (0.1, -0.85), (1.05, 0), (0.1, 0.85), (0.1, 0.3), (-1, 0.3)])],
    "heart": [(255, _heart())],
    "cross": [
        (255, [(-0.3, -1), (0.3, -1), (0.3, 1), (-0.3, 1)]),
        (255, [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)]),
    ],
    "house": [
        (255, [(0, -1.05), (1, -0.15), (0.7, -0.15), (0.7, 0.9), (-0.7, 0.9), (-0.7, -0.15), (-1, -0.15)])
    ],
    "crown": [
        (255, [(-1, 0.75), (-1, -0.75), (-0.5, 0.0), (0, -0.9), (0.5, 0.0), (1, -0.75), (1, 0.75)]),
    ],
}
