"""Which part of an image each tile shows, measured with the model's processor.

Processors resize, crop, pad and cut in different ways. An image whose colours are its coordinates (red: how far right,
green: how far down) is sent through the processor, and the part that a tile shows is read from its colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm_prune.eval.measure import prompt_text

Box = list[int]
"""Left, top, right, bottom, in pixels of the original image; right within a pixel or two."""

_MARK = 255


@dataclass
class Tiles:
    """The tiles that a processor makes of images, by image size."""

    processor: Any
    _known: dict[tuple[int, int], list[Box]] = field(default_factory=dict)

    def boxes(self, size: tuple[int, int]) -> list[Box]:
        """The box of each tile of an image of ``size`` (width, height)."""
        if size not in self._known:
            self._known[size] = self._ask(size)
        return self._known[size]

    def _ask(self, size: tuple[int, int]) -> list[Box]:
        width, height = size
        image, text = _coordinates(width, height), prompt_text(self.processor, "?")
        values = (
            self.processor(images=[image], text=[text], return_tensors="pt")["pixel_values"].double().numpy()
        )
        if values.ndim == 2:  # patches in a row, of the whole image at its own shape
            return [[0, 0, width, height]]
        tiles = values.reshape(-1, *values.shape[-3:])
        normalised = self.processor.image_processor
        mean, std = (np.array(getattr(normalised, k)).reshape(3, 1, 1) for k in ("image_mean", "image_std"))
        return [_box(tile * std + mean, width, height) for tile in tiles]


def boxes_of_grids(boxes: list[Box], grids: Sequence[tuple[int, int]], size: tuple[int, int]) -> list[Box]:
    """The box of each grid that a receipt has of one image, whose tiles have ``boxes``; ``grids`` begin with its own.

    LLaVA-OneVision resizes the grid of all tiles together where they are many: what is left is the grid of the
    thumbnail, which comes first, and another one of the whole image.
    """
    resized = len(boxes) > 1 and len(grids) > 1 and grids[1] != grids[0]
    return [boxes[0], [0, 0, *size]] if resized else boxes


def _coordinates(width: int, height: int) -> Image.Image:
    right = (np.arange(width) + 0.5) / width * 255
    down = (np.arange(height) + 0.5) / height * 255
    pixels = np.full((height, width, 3), _MARK, np.uint8)
    pixels[..., 0] = right.round()[None, :]
    pixels[..., 1] = down.round()[:, None]
    return Image.fromarray(pixels)


def _box(tile: npt.NDArray[np.float64], width: int, height: int) -> Box:
    """The box of a tile ``(3, height, width)`` in 0..1, by a linear fit of its coordinates. Padding is not blue."""
    shown = tile[2] > 0.9
    if not shown.any():
        return [0, 0, 0, 0]
    left, right = _ends(tile[0], shown, axis=1)
    top, bottom = _ends(tile[1], shown, axis=0)
    return [_pixel(left, width), _pixel(top, height), _pixel(right, width), _pixel(bottom, height)]


def _pixel(share: float, side: int) -> int:
    """In pixels; what is nearly the border of the image is the border."""
    at = share * side
    return next((border for border in (0, side) if abs(at - border) <= max(1.0, side / 100)), round(at))


def _ends(values: npt.NDArray[np.float64], shown: npt.NDArray[np.bool_], axis: int) -> tuple[float, float]:
    """Value at the first and at the last edge of the tile along ``axis``."""
    at = np.nonzero(shown)[axis] + 0.5
    inside = values[shown]
    # near the borders of the image resizing repeats the last pixel, so the line is fitted to the middle
    middle = (inside > 0.02) & (inside < 0.98)
    if np.ptp(at[middle]) < 2 if middle.any() else True:
        middle = np.ones_like(middle)
    slope, start = np.polyfit(at[middle], inside[middle], 1) if np.ptp(at[middle]) else (0.0, inside.mean())
    length = values.shape[axis]
    return float(start), float(start + slope * length)
