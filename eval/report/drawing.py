"""An inspection as one PNG: the picture of each set of layers, a line of text below each."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from vlm_prune.eval.report.inspection import Inspection
from vlm_prune.eval.report.overlay import Box, outside, plates
from vlm_prune.viz import PAPER, Pixels

Places = npt.NDArray[np.floating[Any]]
COLUMNS, SIDE = 4, 300
STRIPE = 150
"""Grey of the stripes over what the processor cut off."""


def picture(
    image: Image.Image,
    boxes: Sequence[Box],
    grids: Sequence[tuple[int, int]],
    kept: Sequence[Collection[int]],
) -> Pixels:
    """``(height, width, 3)``: the image, faded where it is dropped, striped where the processor cut it off; thumbnails
    stand to the right.
    """
    parts = []
    for plate in plates(boxes, image.size):
        left, top, right, bottom = plate.view
        scale = SIDE / (1 + plate.thumbnail) / max(right - left, bottom - top)
        # of an image a thousand times as wide as high, a line of pixels is left
        x = left + (np.arange(max(1, round((right - left) * scale))) + 0.5) / scale
        y = top + (np.arange(max(1, round((bottom - top) * scale))) + 0.5) / scale
        lit, seen = np.zeros((2, len(y), len(x)), bool)
        for number in plate.tiles:
            (x0, y0, x1, y1), (rows, columns) = boxes[number], grids[number]
            down, along = np.nonzero((y >= y0) & (y < y1))[0], np.nonzero((x >= x0) & (x < x1))[0]
            alive = np.zeros(rows * columns, bool)
            alive[list(kept[number])] = True
            row = ((y[down] - y0) * rows / (y1 - y0)).astype(int)
            column = ((x[along] - x0) * columns / (x1 - x0)).astype(int)
            lit[np.ix_(down, along)] |= alive.reshape(rows, columns)[row][:, column]
            seen[np.ix_(down, along)] = True
        pixels, beyond = _resampled(image, x, y)
        faint = 0.12 * pixels.mean(-1, keepdims=True) + 0.88 * PAPER
        faint = np.where((_stripes(len(y), len(x)) & ~seen)[..., None], STRIPE, faint)
        faint = np.where(beyond[..., None], 255, faint)  # padding stays white
        parts.append(np.where(lit[..., None], pixels, faint).astype(np.uint8))
    return _beside(parts)


def _stripes(height: int, width: int) -> npt.NDArray[np.bool_]:
    """What marks a part that the processor cut off: a third of it, in diagonals."""
    found: npt.NDArray[np.bool_] = (np.arange(height)[:, None] + np.arange(width)) % 9 < 3
    return found


def _resampled(image: Image.Image, x: Places, y: Places) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """Pixels at the places ``x``, ``y`` of the image, white beyond it; and where that is."""
    pixels = np.asarray(image.convert("RGB"))
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    found = pixels[row.clip(0, image.height - 1)][:, column.clip(0, image.width - 1)]
    beyond = ((row < 0) | (row >= image.height))[:, None] | ((column < 0) | (column >= image.width))[None]
    return np.where(beyond[..., None], 255, found).astype(np.uint8), beyond


def _beside(parts: Sequence[Pixels], gap: int = 8) -> Pixels:
    height, width = max(p.shape[0] for p in parts), sum(p.shape[1] + gap for p in parts) - gap
    canvas, left = np.full((height, width, 3), 255, np.uint8), 0
    for part in parts:
        canvas[: part.shape[0], left : left + part.shape[1]] = part
        left += part.shape[1] + gap
    return canvas


def write_picture(found: Inspection, out: Path, dpi: int = 120) -> Path:
    """The inspection as a PNG; folders are made."""
    drawn = [picture(found.image, stage.boxes, stage.grids, stage.units) for stage in found.stages]
    columns = min(COLUMNS, len(drawn))
    rows = -(-len(drawn) // columns)
    lines = [f"Prompt: {found.prompt}", f"Unpruned: {found.before}", f"{found.receipt.policy}: {found.after}"]
    told = ["Faded: dropped by the policy. Striped: cut off by the processor, never seen by the model."]
    cropped = any(outside(s.boxes, p.view) for s in found.stages for p in plates(s.boxes, found.image.size))
    lines = [
        line
        for text in (*lines, *(told if cropped else []), *found.remarks)
        for line in textwrap.wrap(text, 36 * max(columns, 2))
    ]
    wide = 2.3 * max(columns, 2)
    each = 2.3 * drawn[0].shape[0] / drawn[0].shape[1] + 0.3
    head, foot = 0.4, 0.165 * len(lines) + 0.2
    height = rows * each + head + foot
    layout = ConstrainedLayoutEngine(rect=(0, foot / height, 1, 1 - (head + foot) / height))
    figure = Figure(figsize=(wide, height), dpi=dpi, layout=layout)
    figure.text(0.01, 1 - 0.1 / height, found.title, va="top", fontsize=9, weight="bold", parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes:
        axis.set_axis_off()
    for axis, pixels, stage in zip(figure.axes, drawn, found.stages, strict=False):
        axis.imshow(pixels, interpolation="antialiased")
        axis.set_anchor("NW")
        axis.set_title(f"{stage.count}: {stage.where}", fontsize=7, pad=3, loc="left")
    figure.text(
        0.01, 0.1 / height, "\n".join(lines), fontsize=7.5, va="bottom", linespacing=1.5, parse_math=False
    )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(out, optimize=True)
    return out
