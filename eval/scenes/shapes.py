"""The objects of a scene: their names, colours and outlines, and the words for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
"""Object names, the most likely first. Pairs (0, 1), (2, 3), ... are co-occurring partners."""

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

_SUPERSAMPLING = 3


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


def draw_alpha(shape: str, x: float, y: float, radius: float, angle: float, side: int) -> np.ndarray:
    """Antialiased opacity, float32 `(side, side)` in 0..1, of a shape centred at (x, y)."""
    factor = _SUPERSAMPLING
    mask = Image.new("L", (side * factor, side * factor), 0)
    pen = ImageDraw.Draw(mask)
    cos, sin = math.cos(angle), math.sin(angle)
    for fill, outline in _OUTLINES[shape]:
        turned = [(u * cos - v * sin, u * sin + v * cos) for u, v in outline]
        pen.polygon([((x + u * radius) * factor, (y + v * radius) * factor) for u, v in turned], fill=fill)
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
