"""Each policy's own colour, marker and dash: by its name, the same in every chart, table and run.

Eight hues and fifteen shapes, so that a colour never has to be told by itself. The hues were chosen to differ for
readers with and without each kind of colour blindness, on light and on dark paper; a test holds them to that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from zlib import crc32

HUES: tuple[tuple[str, str], ...] = (
    ("#1a26a6", "#4d66cc"),
    ("#8c1a00", "#e6800d"),
    ("#33a68c", "#40b38c"),
    ("#59264d", "#995980"),
    ("#bf8000", "#ffbf00"),
    ("#1a738c", "#40ccff"),
    ("#9966e6", "#a680ff"),
    ("#bf3340", "#cc3300"),
)
"""Each hue on light and on dark paper."""

INK = ("#1c1b19", "#e7e4da")
"""Of text, and the unpruned model's."""

DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.6), (1.4, 1.4), (5, 1.4, 1.4, 1.4))
"""Lengths of strokes and gaps, in widths of the line."""

Shape = list[tuple[float, float]]
"""Corners of a closed polygon within -1 to 1, y upwards."""


def _star(points: int, inner: float, turn: float = 0.0) -> Shape:
    corners = range(2 * points)
    radii = [1.0 if i % 2 == 0 else inner for i in corners]
    angles = [math.pi * (i / points + turn + 0.5) for i in corners]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _round(corners: int, size: float = 1.0, turn: float = 0.0, upto: float = 2.0) -> Shape:
    angles = [math.pi * (upto * i / corners + turn) for i in range(corners)]
    return [(size * math.cos(a), size * math.sin(a)) for a in angles]


_PLUS: Shape = [
    (-0.36, 1), (0.36, 1), (0.36, 0.36), (1, 0.36), (1, -0.36), (0.36, -0.36), (0.36, -1), (-0.36, -1),
    (-0.36, -0.36), (-1, -0.36), (-1, 0.36), (-0.36, 0.36),
]  # fmt: skip

SHAPES: tuple[Shape, ...] = (
    _round(24, 0.92),  # circle
    _round(4, 1.15, 0.25),  # square
    _round(3, 1.1, 0.5),  # triangle up
    _round(4, 1.12),  # diamond
    _PLUS,
    _round(3, 1.1, 1.5),  # triangle down
    _star(5, 0.42),
    [((x - y) * 0.75, (x + y) * 0.75) for x, y in _PLUS],  # cross
    _round(3, 1.1, 1.0),  # triangle left
    _round(5, 1.05, 0.5),  # pentagon
    [(-0.95, 0.95), (0.95, 0.95), (-0.95, -0.95), (0.95, -0.95)],  # hourglass
    _round(3, 1.1, 0.0),  # triangle right
    [(0.95, 0.95), (0.95, -0.95), (-0.95, 0.95), (-0.95, -0.95)],  # bow tie
    [(x * 0.5, y) for x, y in _round(4, 1.2)],  # thin diamond
    [(x, y - 0.5) for x, y in _round(13, 1.1, 0.0, 13 / 12)],  # half moon
)

PLACES = (
    "none", "uniform", "random", "flowcut", "divprune", "visionzip", "fastv", "agilepruner", "vflowopt", "mustdrop",
    "pool", "downsample", "dyvte", "paint", "vhr", "var",
    "cdpruner", "dart", "holov", "vispruner", "scope", "zooprune", "mmtok", "sparsevlm", "pyramiddrop", "prumerge",
    "prumerge+", "vidcom2", "fastvid", "dycoke", "prunevid", "streamingllm", "snapkv", "lookm", "vlcache", "recycled",
    "taskkv", "duoattention", "vcd", "pai", "opera", "dola", "act", "zerotuning", "carve", "pyramidkv",
)  # fmt: skip
"""Names with a place of their own; only ever append, so that a policy looks alike in old reports and new ones."""


@dataclass(frozen=True)
class Look:
    """How a policy is drawn.

    Attributes:
        hue: number in `HUES`, -1 for ink.
        shape: number in `SHAPES`; ``dash`` in `DASHES`.
    """

    hue: int
    shape: int
    dash: int

    @property
    def light(self) -> str:
        """Its colour on white paper."""
        return (HUES[self.hue] if self.hue >= 0 else INK)[0]

    @property
    def variable(self) -> str:
        """Its colour in a page, light or dark as the reader has it."""
        return f"var(--hue-{self.hue})" if self.hue >= 0 else "var(--ink)"

    @property
    def path(self) -> str:
        """Its marker as an SVG path within -1 to 1, y downwards."""
        return "M" + "L".join(f"{x:.3g} {-y:.3g}" for x, y in SHAPES[self.shape]) + "z"


def _place(number: int) -> Look:
    """8 hues and 15 shapes have no common divisor: 120 places pass before a pair comes again, with another dash."""
    if number == 0:
        return Look(-1, 0, 0)
    return Look(number % len(HUES), number % len(SHAPES), number // len(HUES) % len(DASHES))


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name, no two alike in hue and shape up to 120 names.

    A name in `PLACES` has its own whatever it stands with. Others, such as labels and compositions, take a place that
    follows from the name; should two of one run want the same, the later one in the alphabet takes the next free one.
    """
    known = {name: number for number, name in enumerate(PLACES)}
    found = dict.fromkeys(names, -1)
    taken = set()
    every, pairs = range(len(PLACES), 480), len(HUES) * len(SHAPES) - len(PLACES)
    for name in sorted(found):
        if name in known:
            found[name] = known[name]
            continue
        first = crc32(name.encode()) % pairs
        order = (*every[first:pairs], *every[:first], *every[pairs:])
        found[name] = next((n for n in order if n not in taken), every[first])
        taken.add(found[name])
    return {name: _place(number) for name, number in found.items()}


def look_context(look: Look) -> dict[str, str]:
    """How a page draws a policy: the marker's path, its colour, and the strokes of its line."""
    dash = " ".join(f"{length:g}" for length in DASHES[look.dash])
    return {"path": look.path, "colour": look.variable, "dash": dash}
