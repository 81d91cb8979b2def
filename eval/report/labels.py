"""Where labels of a chart can stand: on no line, no point, no other label, and inside the frame.

Pure geometry in pixels, y upwards. Lines are obstacles as points along them, closer to each other than a label is high.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Spot = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""

DISTANCES = (5.0, 9.0, 14.0, 20.0, 28.0, 38.0, 50.0)
"""From a point to its label, in points of 1/72 inch."""

DIRECTIONS = 16
NEAR = 9.0
"""Up to this distance a label needs no leader."""


@dataclass(frozen=True)
class Label:
    """A text to be placed.

    Attributes:
        width: in pixels, ``height`` alike.
        anchors: the points that it may stand beside, the best one first.
    """

    text: str
    width: float
    height: float
    anchors: Sequence[Spot]


@dataclass
class Obstacles:
    """What labels must keep off.

    Attributes:
        frame: what labels stay inside of.
        scale: pixels per point.
        dots: ``(n, 2)`` of points and of lines.
        boxes: labels that have their places.
    """

    frame: Box
    scale: float
    dots: npt.NDArray[np.floating[Any]] = field(default_factory=lambda: np.zeros((0, 2)))
    boxes: list[Box] = field(default_factory=list)

    def add_line(self, corners: npt.ArrayLike) -> None:
        """A line through ``(n, 2)`` corners."""
        spots = np.asarray(corners, float)
        parts = [spots[:1]]
        for begin, end in pairwise(spots):
            steps = max(1, math.ceil(math.dist(begin, end) / (2 * self.scale)))
            parts.append(begin + (end - begin) * (np.arange(1, steps + 1) / steps)[:, None])
        self.dots = np.concatenate([self.dots, *parts])

    def add_dot(self, x: float, y: float, radius: float = 3.4) -> None:
        """A marker of a radius in points."""
        r = radius * self.scale
        around = [(x + a * r, y + b * r) for a in (-1, 0, 1) for b in (-1, 0, 1)]
        self.dots = np.concatenate([self.dots, around])

    def free(self, box: Box) -> bool:
        """Whether a label may stand there."""
        left, bottom, right, top = box
        if left < self.frame[0] or bottom < self.frame[1] or right > self.frame[2] or top > self.frame[3]:
            return False
        x, y = self.dots[:, 0], self.dots[:, 1]
        if ((x > left) & (x < right) & (y > bottom) & (y < top)).any():
            return False
        return not any(
            left < other[2] and right > other[0] and bottom < other[3] and top > other[1]
            for other in self.boxes
        )

    def crosses(self, begin: Spot, end: Spot) -> bool:
        """Whether a leader would run through a label."""
        steps = max(2, math.ceil(math.dist(begin, end) / (2 * self.scale)))
        at = np.linspace(begin, end, steps)
        return any(
            bool(((at[:, 0] > b[0]) & (at[:, 0] < b[2]) & (at[:, 1] > b[1]) & (at[:, 1] < b[3])).any())
            for b in self.boxes
        )


def place(label: Label, obstacles: Obstacles) -> tuple[Spot, Spot, Spot | None] | None:
    """The nearest free place for a label; it is then an obstacle itself, and so is its leader.

    Returns:
        Its lower left corner, the anchor, and where its leader ends (``None``: it stands close enough); ``None`` if
        there is no free place.
    """
    scale = obstacles.scale
    pad = 1.2 * scale
    for distance in DISTANCES:
        for anchor in label.anchors:
            for turn in range(DIRECTIONS):
                angle = math.pi * (0.25 + 2 * turn / DIRECTIONS)
                across, up = math.cos(angle), math.sin(angle)
                x, y = anchor[0] + distance * scale * across, anchor[1] + distance * scale * up
                # the label's nearest edge or corner touches the spot
                left = x - label.width * (1 - across) / 2
                bottom = y - label.height * (1 - up) / 2
                box = (left - pad, bottom - pad, left + label.width + pad, bottom + label.height + pad)
                if not obstacles.free(box):
                    continue
                end = (
                    min(max(anchor[0], left), left + label.width),
                    min(max(anchor[1], bottom), bottom + label.height),
                )
                far = math.dist(anchor, end) > NEAR * scale
                if far and obstacles.crosses(anchor, end):
                    continue
                obstacles.boxes.append(box)
                if far:
                    obstacles.add_line([anchor, end])
                return (left, bottom), anchor, end if far else None
    return None
