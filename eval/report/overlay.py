"""Kept patches over an image, in the image's own coordinates: tiles, thumbnails, padding and crops in their places.

A tile is what docs/runs.md calls one: the part of the image that it shows, its grid of visual tokens, and which of
these were kept. Dropped cells become one SVG path, a veil that is laid over the picture.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from PIL import Image

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the original image."""

LONGEST, QUALITY = 512, 85
"""Side in pixels, and JPEG quality, of the pictures in a page."""


@dataclass(frozen=True)
class Plate:
    """Tiles that are drawn over one copy of the image.

    Attributes:
        view: the part of the plane that is shown: the image, and what tiles reach beyond it.
        tiles: numbers of the tiles, in the order of the model.
        thumbnail: whether this is the small copy of the whole image that the model sees beside the tiles.
    """

    view: Box
    tiles: list[int]
    thumbnail: bool = False


def plates(boxes: Sequence[Box], size: tuple[int, int]) -> list[Plate]:
    """The tiles of an image ``size`` (width, height) over one copy of it, and its thumbnails over a copy each."""
    whole = [i for i, box in enumerate(boxes) if len(boxes) > 1 and _covers(box, size)]
    rest = [i for i in range(len(boxes)) if i not in whole]
    if not rest:  # several frames, or several views, of all of it
        return [Plate(_union([boxes[i]], size), [i]) for i in whole]
    main = Plate(_union([boxes[i] for i in rest], size), rest)
    return [main, *(Plate(_union([boxes[i]], size), [i], thumbnail=True) for i in whole)]


def _covers(box: Box, size: tuple[int, int]) -> bool:
    slack = 0.01 * max(size)
    return box[0] <= slack and box[1] <= slack and box[2] >= size[0] - slack and box[3] >= size[1] - slack


def _union(boxes: Sequence[Box], size: tuple[int, int]) -> Box:
    left, top, right, bottom = zip((0.0, 0.0, float(size[0]), float(size[1])), *boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def veil(box: Box, grid: tuple[int, int], kept: Collection[int] | None) -> str:
    """An SVG path over all cells of a ``(rows, columns)`` grid in ``box`` that are not in ``kept`` (``None``: all are).

    Neighbours in a row are drawn as one rectangle.
    """
    if kept is None:
        return ""
    (rows, columns), (left, top, right, bottom) = grid, box
    width, height = (right - left) / columns, (bottom - top) / rows
    alive, path = set(kept), []
    for row in range(rows):
        start = None
        for column in range(columns + 1):
            dropped = column < columns and row * columns + column not in alive
            if dropped and start is None:
                start = column
            elif not dropped and start is not None:
                x, y = left + start * width, top + row * height
                path.append(f"M{x:.6g} {y:.6g}h{(column - start) * width:.6g}v{height:.6g}H{x:.6g}z")
                start = None
    return "".join(path)


def outside(boxes: Sequence[Box], view: Box) -> str:
    """An SVG path, to be filled by the even-odd rule, over what of ``view`` no tile shows."""
    left, top, right, bottom = zip(*boxes, strict=True)
    seen = min(left), min(top), max(right), max(bottom)
    return "" if seen == view else outline(view) + outline(seen)


def outline(box: Box) -> str:
    """An SVG path around a box."""
    left, top, right, bottom = box
    return f"M{left:.6g} {top:.6g}H{right:.6g}V{bottom:.6g}H{left:.6g}z"


def data_uri(image: Image.Image, longest: int = LONGEST) -> str:
    """An image as a ``data:`` address, PNG or JPEG, whichever is smaller; sides are at most ``longest`` pixels."""
    image = image.convert("RGB")
    if max(image.size) > longest:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    found = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": QUALITY, "subsampling": 0})):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        found.append((kind, stream.getvalue()))
    kind, data = min(found, key=lambda pair: len(pair[1]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
