"""The parts of a small figure: a picture, bars per layer, a map of layers, side by side in one PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from vlm_prune import viz

Drawing = Callable[[Axes], None]
"""Draws one part into the axes that it is given."""


def image(pixels: viz.Pixels, title: str) -> Drawing:
    """A picture without axes."""

    def draw_it(axis: Axes) -> None:
        axis.imshow(pixels, interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(title, fontsize=7, pad=3)

    return draw_it


def bars(counts: Sequence[int], title: str) -> Drawing:
    """A horizontal bar per layer, layer 0 on top."""

    def draw_it(axis: Axes) -> None:
        axis.barh(range(len(counts)), counts, color="#4a6fa5")
        axis.set_ylim(len(counts) - 0.4, -0.6)
        axis.bar_label(axis.containers[0], fontsize=6, padding=2)  # type: ignore[arg-type]
        axis.set_xlim(0, 1.25 * max(counts))
        axis.spines[["top", "right"]].set_visible(False)
        _labels(axis, "", title)

    return draw_it


def pairs(first: Sequence[float], second: Sequence[float], names: Sequence[str], title: str) -> Drawing:
    """Two bars a name on a logarithmic axis, the first one light, the second one dark."""

    def draw_it(axis: Axes) -> None:
        places = range(len(names))
        axis.barh([place - 0.2 for place in places], first, 0.4, color="#a9bfdd")
        axis.barh([place + 0.2 for place in places], second, 0.4, color="#2c4a7c")
        axis.set_yticks(list(places), names, fontsize=6)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlim(1e-5, 1)
        axis.spines[["top", "right"]].set_visible(False)
        _labels(axis, "probability", title)
        axis.set_ylabel("")

    return draw_it


def heat(
    values: Any, across: str, title: str, limit: float | None = None, names: dict[int, str] | None = None
) -> Drawing:
    """A map ``(layers, columns)``; ``names`` labels some of the columns, ``limit`` is the darkest value."""

    def draw_it(axis: Axes) -> None:
        top = limit or float(values.max()) or 1.0
        axis.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
        if names:
            axis.set_xticks(list(names), list(names.values()), rotation=90)
        _labels(axis, across, f"{title}\n(white 0, dark {top:.2g})")

    return draw_it


def _labels(axis: Axes, across: str, title: str) -> None:
    axis.tick_params(labelsize=6)
    axis.set_xlabel(across, fontsize=6)
    axis.set_ylabel("layer", fontsize=6)
    axis.set_title(title, fontsize=7, pad=3)


def save(drawings: Sequence[Drawing], path: Path, dpi: int = 96) -> Path:
    """The drawings side by side as a PNG of at most 128 colours; folders are made."""
    figure = Figure(figsize=(1.9 * len(drawings), 2.1), dpi=dpi, layout="constrained")
    for drawing, axis in zip(drawings, figure.subplots(1, len(drawings), squeeze=False)[0], strict=True):
        drawing(axis)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    drawn.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    return path
