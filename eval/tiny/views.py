"""What a vision tower sees of a scene, and what is true of it.

A view is one tower input of 128 x 128 pixels: the whole scene (LLaVA), or one InternVL tile or thumbnail.
Pixels equal those of the stock image processors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from ..scenes import COLORS, PATCH, SHAPES, Bar, Glyph, Part, Scene, SceneObject, coverage
from ..scenes.desk import CHARACTERS

SIDE = 128
"""Side of a tower input in pixels."""

GRID = SIDE // PATCH
"""Patches along a side."""

IGNORE = -100

PART_CLASSES = len(SHAPES) + len(CHARACTERS) + 1
"""Classes of a patch: shapes, characters, bar. Background is one past the last."""

PRESENT_LABELS = len(SHAPES) + len(COLORS) + len(SHAPES) * len(COLORS) + len(CHARACTERS)
"""Labels of a view: shapes, colours, (shape, colour) pairs, characters."""

SIZES = ((128, 128), (256, 128), (128, 256), (256, 256), (384, 128), (128, 384))
"""Scene sizes InternVL trains on: 1, 3, 3, 5, 4 and 4 tiles, thumbnail included."""


@dataclass(frozen=True)
class View:
    """One tower input.

    Attributes:
        pixels: uint8 `(3, 128, 128)`.
        index_map: int8 `(128, 128)`, as in `Scene`.
        scene: the scene it shows.
        offset: position in the scene of the view's left top corner, in scene pixels.
        zoom: view pixels per scene pixel, along x and y.
    """

    pixels: torch.Tensor
    index_map: np.ndarray
    scene: Scene
    offset: tuple[float, float] = (0.0, 0.0)
    zoom: tuple[float, float] = (1.0, 1.0)


def views(scene: Scene) -> list[View]:
    """The tiles of a scene, row by row, and after them its thumbnail when there is more than one tile.

    Sides must be multiples of 128 pixels: then cutting needs no resizing and only the thumbnail does.
    """
    width, height = scene.image.size
    if width % SIDE or height % SIDE:
        raise ValueError(f"views need sides that are multiples of {SIDE} pixels, got {width} x {height}")
    pixels = torch.from_numpy(np.asarray(scene.image).copy()).permute(2, 0, 1).contiguous()
    tiles = [
        View(
            pixels[:, top : top + SIDE, left : left + SIDE],
            scene.index_map[top : top + SIDE, left : left + SIDE],
            scene,
            (float(left), float(top)),
        )
        for top in range(0, height, SIDE)
        for left in range(0, width, SIDE)
    ]
    if len(tiles) > 1:
        small = resize(pixels, [SIDE, SIDE], interpolation=InterpolationMode.BICUBIC, antialias=True)
        labels = np.asarray(
            Image.fromarray(scene.index_map.view(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        )
        tiles.append(View(small, labels.view(np.int8), scene, zoom=(SIDE / width, SIDE / height)))
    return tiles


def normalize(pixels: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """uint8 `(..., 3, height, width)` to what the stock image processors return, float32."""
    shape = (3, 1, 1)
    return (pixels.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def part_class(part: Part) -> int:
    """Which of the `PART_CLASSES` a part is."""
    if isinstance(part, SceneObject):
        return SHAPES.index(part.shape)
    if isinstance(part, Glyph):
        return len(SHAPES) + CHARACTERS.index(part.character)
    return PART_CLASSES - 1


def patch_labels(view: View) -> dict[str, np.ndarray]:
    """Dense targets per patch, in row order.

    Returns:
        `shape` and `color` int64 `(256,)`: class, one past the last for background, -100 where undecided;
            characters have no colour.
        `geometry` float32 `(256, 3)`: offset to the centre and log radius of the part, in 16 pixels.
        `object` int64 `(256,)`: the part, -1 where there is none.
    """
    parts = view.scene.parts
    share = coverage(view.index_map, len(parts)).reshape(len(parts), -1)
    owner = share.argmax(0)
    seen, empty = share.max(0) >= 0.25, share.sum(0) <= 0.03
    classes = np.array([part_class(part) for part in parts])
    names = list(COLORS)
    colors = np.array([IGNORE if isinstance(part, Glyph) else names.index(part.color) for part in parts])
    centers = (np.array([(part.x, part.y) for part in parts]) - view.offset) * view.zoom
    radii = np.array([part.radius for part in parts]) * np.mean(view.zoom)
    rows, columns = np.divmod(np.arange(GRID * GRID), GRID)
    here = np.stack([(columns + 0.5) * PATCH, (rows + 0.5) * PATCH], 1)
    geometry = np.concatenate([(centers[owner] - here) / 16, np.log(radii[owner] / 16)[:, None]], 1)
    return {
        "shape": np.where(seen, classes[owner], np.where(empty, PART_CLASSES, IGNORE)),
        "color": np.where(seen, colors[owner], np.where(empty, len(COLORS), IGNORE)),
        "geometry": geometry.astype(np.float32),
        "object": np.where(seen, owner, -1),
    }


def present_labels(part: Part) -> list[int]:
    """The labels of a view that a part makes true; a bar none."""
    if isinstance(part, Bar):
        return []
    if isinstance(part, Glyph):
        return [PRESENT_LABELS - len(CHARACTERS) + CHARACTERS.index(part.character)]
    shape, color = SHAPES.index(part.shape), list(COLORS).index(part.color)
    return [shape, len(SHAPES) + color, len(SHAPES) + len(COLORS) + shape * len(COLORS) + color]


def image_labels(view: View) -> dict[str, np.ndarray]:
    """Multi-label targets of a whole view; parts less than 40 % inside are left out of the loss.

    Returns:
        `present` float32 `(PRESENT_LABELS,)`: 1 where present.
        `counted` float32, same shape: 0 where a cut part makes the truth undecided.
        `count` int64 scalar: number of objects, -100 where undecided.
    """
    parts = view.scene.parts
    sizes = np.bincount(view.scene.index_map.ravel() + 1, minlength=len(parts) + 1)[1:]
    inside = np.bincount(view.index_map.ravel() + 1, minlength=len(parts) + 1)[1:]
    inside = inside / (np.prod(view.zoom) * np.maximum(sizes, 1))
    present = np.zeros(PRESENT_LABELS, np.float32)
    cut = np.zeros_like(present)
    for share, part in zip(inside, parts, strict=True):
        if share >= 0.4:
            present[present_labels(part)] = 1
        elif share > 0:
            cut[present_labels(part)] = 1
    inside = inside[: len(view.scene.objects)]
    undecided = bool(((inside > 0) & (inside < 0.4)).any())
    return {
        "present": present,
        "counted": 1 - cut * (1 - present),
        "count": np.array(IGNORE if undecided else int((inside >= 0.4).sum())),
    }
