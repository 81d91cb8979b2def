"""Desks: scenes with a few objects and what is hard in practice: a sign to read, a chart, tiny objects, clutter.

Words have three letters and differ in one (cat, car, cap), so a sign can be read only if every character is seen.
Bars of a chart differ in height by at least one patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .scene import PATCH, Bar, Glyph, Scene, SceneObject, draw_background, draw_names, draw_object
from .shapes import COLORS

SIGN_WORDS = (
    *("cat", "car", "cap", "can", "cup", "cut"),
    *("pen", "pin", "pan", "pot", "hat", "hot"),
    *("hut", "bat", "bus", "bed"),
)
"""Words of signs."""

CHARACTERS = "0123456789" + "".join(sorted({letter for word in SIGN_WORDS for letter in word}))
"""Characters of signs: digits, and the letters of `SIGN_WORDS`."""

TINY = 7.0
"""Objects with a smaller radius (in pixels) are tiny: hardly larger than one patch."""

SIGN_RATE, CHART_RATE, CLUTTER_RATE = 0.75, 0.4, 0.4
"""Shares of the desks that have a sign, a chart, clutter."""

TINY_RATE = 0.3
"""Share of the objects that are tiny."""

Box = tuple[float, float, float, float]


def make_desk(seed: int | Sequence[int], size: tuple[int, int] = (128, 128)) -> Scene:
    """Draw one desk.

    Args:
        seed: fixes the desk completely.
        size: width and height in pixels, each a multiple of 8 and at least 128.
    """
    if any(side < 128 or side % PATCH for side in size):
        raise ValueError(
            f"size must be at least 128 x 128 and a multiple of {PATCH} pixels, got {size[0]} x {size[1]}"
        )
    rng = np.random.default_rng(seed)
    width, height = size
    canvas = draw_background(rng, width, height)
    cluttered = bool(rng.random() < CLUTTER_RATE)
    if cluttered:
        _draw_clutter(rng, canvas)
    index_map = np.full((height, width), -1, np.int8)
    taken: list[Box] = []
    sign = _write_sign(rng, canvas, taken) if rng.random() < SIGN_RATE else ()
    chart = _draw_chart(rng, canvas, taken) if rng.random() < CHART_RATE else ()
    objects = _place_objects(rng, int(rng.integers(1, 6)), taken, width, height)
    for index, item in enumerate(objects):
        draw_object(rng, canvas, index_map, index, item)
    for index, glyph in enumerate(sign, len(objects)):
        _own(index_map, index, glyph.x, glyph.y, 0.62 * glyph.radius, glyph.radius)
    for index, bar in enumerate(chart, len(objects) + len(sign)):
        _own(index_map, index, bar.x, bar.y, BAR / 2, bar.radius)
    canvas += rng.standard_normal((height, width, 1), dtype=np.float32) * rng.uniform(1.0, 6.0)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    return Scene(image, objects, index_map, sign, chart, cluttered)


def make_desks(count: int, seed: int, sizes: Sequence[tuple[int, int]] = ((128, 128),)) -> Iterator[Scene]:
    """Yield `count` desks, `sizes` taken in turn."""
    for index in range(count):
        yield make_desk((seed, index), sizes[index % len(sizes)])


BAR, GAP, LEVEL = 8, 3, 8
"""Width of a bar, the gap between two bars, and the step between heights, in pixels."""


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError(
            "Pillow was built without FreeType, which the signs of desks need: install Pillow's own wheel"
        )
    return font


def _own(index_map: np.ndarray, index: int, x: float, y: float, across: float, down: float) -> None:
    """Give the pixels of a box (centre, half width, half height) to part `index`, in place."""
    index_map[round(y - down) : round(y + down), round(x - across) : round(x + across)] = index


def _free(box: Box, taken: Sequence[Box]) -> bool:
    left, top, right, bottom = box
    return all(right <= a or c <= left or bottom <= b or d <= top for a, b, c, d in taken)


def _spot(
    rng: np.random.Generator, across: int, down: int, canvas: np.ndarray, taken: list[Box]
) -> tuple[int, int]:
    """Upper left corner of a free box of the given size, which is marked as taken."""
    height, width = canvas.shape[:2]
    while True:
        left, top = int(rng.integers(1, width - across)), int(rng.integers(1, height - down))
        box = (left - 2.0, top - 2.0, left + across + 2.0, top + down + 2.0)
        if _free(box, taken):
            taken.append(box)
            return left, top


def _write_sign(rng: np.random.Generator, canvas: np.ndarray, taken: list[Box]) -> tuple[Glyph, ...]:
    """Paint a sign with a number of two or three digits, or a word."""
    if rng.random() < 0.5:
        text = "".join(str(digit) for digit in rng.integers(0, 10, int(rng.integers(2, 4))))
    else:
        text = SIGN_WORDS[rng.integers(len(SIGN_WORDS))]
    size = int(rng.integers(13, 19))
    radius, advance = 0.5 * size, 0.66 * size
    across, down = math.ceil(advance * len(text)) + 4, math.ceil(2 * radius) + 2
    left, top = _spot(rng, across, down, canvas, taken)
    plate, ink = rng.uniform(205, 250, 3), rng.uniform(5, 60, 3)
    if rng.random() < 0.3:
        plate, ink = ink, plate
    mask = Image.new("L", (across, down), 0)
    pen = ImageDraw.Draw(mask)
    middle = down / 2
    centers = [2 + advance * (index + 0.5) for index in range(len(text))]
    for character, x in zip(text, centers, strict=True):
        # a common baseline, as for letters of a word
        pen.text((x, middle + 0.36 * size), character, fill=255, font=_font(size), anchor="ms")
    alpha = np.asarray(mask, np.float32)[..., None] / 255
    canvas[top : top + down, left : left + across] = plate + alpha * (ink - plate)
    return tuple(
        Glyph(character, left + x, top + middle, radius) for character, x in zip(text, centers, strict=True)
    )


def _draw_chart(rng: np.random.Generator, canvas: np.ndarray, taken: list[Box]) -> tuple[Bar, ...]:
    """Paint a panel with three or four bars; heights differ by at least `LEVEL`."""
    count = int(rng.integers(3, 5))
    across, down = count * (BAR + GAP) + GAP, 5 * LEVEL + 4
    left, top = _spot(rng, across, down, canvas, taken)
    canvas[top : top + down, left : left + across] = rng.uniform(10, 50, 3)
    heights = rng.permutation(5)[:count]
    colors = [list(COLORS)[index] for index in rng.permutation(len(COLORS))[:count]]
    bars = []
    for index, (level, color) in enumerate(zip(heights, colors, strict=True)):
        high = LEVEL * (int(level) + 1)
        x, base = left + GAP + index * (BAR + GAP), top + down - 2
        canvas[base - high : base, x : x + BAR] = np.array(COLORS[color]) + rng.uniform(-12, 12, 3)
        bars.append(Bar(color, x + BAR / 2, base - high / 2, high / 2))
    return tuple(bars)


def _place_objects(
    rng: np.random.Generator, count: int, taken: Sequence[Box], width: int, height: int
) -> tuple[SceneObject, ...]:
    """Free spots for up to `count` objects, left to right; fewer where there is no room."""
    colors, placed = tuple(COLORS), list[SceneObject]()
    for name in draw_names(rng, count):
        tiny = rng.random() < TINY_RATE
        color, angle = colors[rng.integers(len(colors))], float(rng.uniform(-0.2, 0.2))
        for _ in range(60):
            radius = float(rng.uniform(5.0, TINY) if tiny else np.exp(rng.uniform(np.log(8.0), np.log(16.0))))
            x, y = float(rng.uniform(radius, width - radius)), float(rng.uniform(radius, height - radius))
            item = SceneObject(name, color, x, y, radius, angle)
            apart = (
                math.hypot(x - other.x, y - other.y) > 0.95 * (radius + other.radius) for other in placed
            )
            if _free(item.box, taken) and all(apart):
                placed.append(item)
                break
    return tuple(sorted(placed, key=lambda item: item.x))


def _draw_clutter(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Paint strokes and dots in dull colours, in place."""
    height, width = canvas.shape[:2]
    layer = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(layer)
    for _ in range(int(rng.integers(12, 32)) * width * height // 128**2):
        shade = int(rng.uniform(40, 190))
        color = tuple(int(shade + bend) for bend in rng.integers(-12, 13, 3))
        x, y, turn, reach = (
            rng.uniform(0, width),
            rng.uniform(0, height),
            rng.uniform(0, math.pi),
            rng.uniform(1, 9),
        )
        across, down = reach * math.cos(turn), reach * math.sin(turn)
        pen.line([(x - across, y - down), (x + across, y + down)], fill=color, width=int(rng.integers(1, 3)))
    canvas[:] = np.asarray(layer, np.float32)
