"""Pictures of the kept patches: the image as the tower saw it, with dropped patches faded out.

Everything is drawn from a receipt, so a picture shows what ran. Images that a model cuts into tiles are put together
again, with the thumbnail (the last tile, where there are several) next to them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from .call.receipt import Receipt

Pixels = npt.NDArray[np.uint8]
"""``(height, width, 3)``, or ``(tiles, height, width, 3)``."""

PAPER = 236
"""Grey that dropped patches fade to."""


@dataclass(frozen=True)
class Panel:
    """One image and what was kept of it.

    Attributes:
        tiles: ``(tiles, height, width, 3)``, the tower's input in 0..255.
        kept: per tile, the raster numbers of the visual tokens that were kept.
        grid: rows and columns of visual tokens per tile.
        layout: rows and columns of tiles that the image was cut into, its thumbnail not counted.
        text: written below the picture, such as the model's caption.
    """

    tiles: Pixels
    kept: list[list[int]]
    grid: tuple[int, int]
    layout: tuple[int, int] = (1, 1)
    text: str = ""

    @classmethod
    def from_receipt(
        cls, receipt: Receipt, inputs: Any, image_processor: Any, image_size: tuple[int, int], text: str = ""
    ) -> Panel:
        """The picture of a call with one image.

        Args:
            receipt: of the call.
            inputs: what the processor returned for it.
            image_processor: knows how pixels were normalised.
            image_size: width and height of the image before it was cut.
            text: see the class.
        """
        tiles = denormalise(inputs["pixel_values"], image_processor.image_mean, image_processor.image_std)
        return cls(tiles, receipt.kept, receipt.grid, tile_layout(len(tiles), *image_size), text)

    @property
    def title(self) -> str:
        """How many tokens were kept, such as ``"64 of 256"``."""
        return f"{sum(map(len, self.kept))} of {len(self.kept) * self.grid[0] * self.grid[1]}"

    def picture(self) -> Pixels:
        """The tiles, faded where tokens were dropped, in their places."""
        faded = np.stack(
            [fade(tile, kept, self.grid) for tile, kept in zip(self.tiles, self.kept, strict=True)]
        )
        return mosaic(faded, self.layout)


def denormalise(pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """Normalised ``(tiles, 3, height, width)`` back to ``(tiles, height, width, 3)`` in 0..255."""
    shape = (3, 1, 1)
    pixels = pixel_values.detach().float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(
        shape
    )
    found: Pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return found


def tile_layout(tiles: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of the tiles of an image: of all ways to lay them out, the one nearest to its shape.

    Several tiles end with a thumbnail, which is not counted, as the processors of InternVL make them.
    """
    cut = tiles - 1 if tiles > 1 else 1
    ways = [(rows, cut // rows) for rows in range(1, cut + 1) if cut % rows == 0]
    return min(ways, key=lambda way: abs(way[1] / way[0] - width / height))


def fade(tile: Pixels, kept: Sequence[int], grid: tuple[int, int]) -> Pixels:
    """``tile`` ``(height, width, 3)`` with the cells of a ``(rows, columns)`` grid faded that are not in ``kept``."""
    rows, columns = grid
    lit = np.zeros(rows * columns, bool)
    lit[list(kept)] = True
    down = np.arange(tile.shape[0]) * rows // tile.shape[0]
    right = np.arange(tile.shape[1]) * columns // tile.shape[1]
    mask = lit.reshape(rows, columns)[down][:, right][..., None]
    faint = 0.12 * tile.mean(-1, keepdims=True) + 0.88 * PAPER
    return np.where(mask, tile, faint).astype(np.uint8)


def mosaic(tiles: Pixels, layout: tuple[int, int], gap: int = 4) -> Pixels:
    """Tiles ``(tiles, height, width, 3)`` in rows and columns on white; one more than fit is put to the right."""
    rows, columns = layout
    count, height, width, _ = tiles.shape
    if count - rows * columns not in (0, 1):
        raise ValueError(f"{count} tiles do not fill {rows} rows of {columns}, with or without a thumbnail")
    full = rows * (height + gap) - gap
    across = columns * (width + gap) - gap
    beside = 3 * gap + width if count > rows * columns else 0
    canvas = np.full((full, across + beside, 3), 255, np.uint8)
    for i in range(rows * columns):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = tiles[i]
    if beside:
        top = (full - height) // 2
        canvas[top : top + height, across + 3 * gap :] = tiles[-1]
    return canvas


def kept_figure(rows: Sequence[tuple[str, Sequence[Panel]]], column_inches: float = 2.0) -> Figure:
    """A figure with one titled row of panels per entry, for instance several budgets of one policy side by side."""
    pictures = [[panel.picture() for panel in panels] for _, panels in rows]
    lines = [max((len(_wrapped(panel.text)) for panel in panels), default=0) for _, panels in rows]
    heights = [
        column_inches * max(p.shape[0] / p.shape[1] for p in row) + 0.3 + 0.11 * count
        for row, count in zip(pictures, lines, strict=True)
    ]
    columns = max(map(len, pictures))
    figure = Figure(figsize=(columns * column_inches + 0.4, sum(heights)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for (label, panels), row, drawn in zip(rows, axes, pictures, strict=True):
        for axis in row:
            axis.set_axis_off()
        for axis, panel, picture in zip(row, panels, drawn, strict=False):
            axis.imshow(picture, interpolation="nearest")
            axis.set_anchor("N")
            axis.set_title(panel.title, fontsize=8, pad=3)
            text = "\n".join(_wrapped(panel.text))
            axis.text(0.5, -0.02, text, transform=axis.transAxes, ha="center", va="top", fontsize=6)
        row[0].text(
            -0.06, 0.5, label, transform=row[0].transAxes, rotation=90, ha="right", va="center", fontsize=8
        )  # fmt: skip
    return figure


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 38, max_lines=5, placeholder=" ...")


def save_kept(rows: Sequence[tuple[str, Sequence[Panel]]], path: Path | str, dpi: int = 110) -> Path:
    """Write `kept_figure` as a PNG of 256 colours (a third of the size); folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(kept_figure(rows))
    canvas.figure.set_dpi(dpi)
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    drawn.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path
