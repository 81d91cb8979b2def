"""The picture of `vlm-prune bench-serving`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {"dense": "#8a8a8a", "pruned": "#1b6ca8"}
MARKERS = {"dense": "o", "pruned": "s"}


def draw(found: dict[str, Any], path: Path) -> None:
    """Times against the arrival rate, requests per second at saturation, and images per GiB, as a PNG."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 4, width_ratios=[3, 3, 2, 2])
    for axis, kind, title in (
        (axes[0], "to_first", "time to first token, s"),
        (axes[1], "per_token", "time per further token, s"),
    ):
        for name, colour in COLOURS.items():
            points = [point for point in found[name]["points"] if point["rate"] is not None]
            rates = [point["rate"] for point in points]
            for percentile, style in ((50, "-"), (99, ":")):
                times = [point[kind][percentile] for point in points]
                label = f"{name}, median" if percentile == 50 else f"{name}, 99 %"
                axis.plot(rates, times, style, color=colour, marker=MARKERS[name], label=label)
        axis.set(title=title, xlabel="requests arriving per second", ylim=(0, None))
        axis.legend(fontsize=7)
    bars: tuple[tuple[Any, str, Callable[[dict[str, Any]], float]], ...] = (
        (axes[2], "requests/s at saturation", lambda side: side["points"][-1]["per_second"]),
        (axes[3], "images per GiB of KV cache", lambda side: side["images_per_gib"]),
    )
    for axis, title, value in bars:
        heights = [value(found[name]) for name in COLOURS]
        drawn = axis.bar([*COLOURS], heights, color=[*COLOURS.values()])
        axis.bar_label(drawn, fmt="%.3g")
        axis.set(title=title)
    for axis in axes:
        axis.title.set_fontsize(9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
