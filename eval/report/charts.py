"""Figures of the report as inline SVG: text stays text, and colours are the page's own, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from vlm_prune.eval.report.pareto import pareto_front

INKS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--faint)",
    "#040404": "var(--accent)",
}
"""Colours that matplotlib is told to use, and the CSS variables that take their place."""
INK, MUTED, FAINT, ACCENT = INKS

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vlm_prune",
    "font.size": 8,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
}


@dataclass(frozen=True)
class Point:
    """One entry in a figure.

    Attributes:
        series: number of its policy in the report; its points are joined by a line.
        label: the policy's name.
        title: what a pointer that rests on it is told.
        hollow: drawn as a ring.
    """

    series: int
    label: str
    cost: float
    value: float
    title: str
    hollow: bool = False


def pareto_svg(
    points: Sequence[Point], name: str, across: str, up: str, log: bool = False, higher: bool = True
) -> str:
    """A figure of costs (to the right) and values (up), the front of the best drawn in the accent colour.

    Args:
        points: at least one.
        name: a prefix, unique on the page, for the ids inside.
        across: what the cost is, with its unit.
        up: what the value is.
        log: whether costs are spaced by ratio.
        higher: whether more of the value is better.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.5, 2.75), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axis = figure.subplots()
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(width=0.6, length=3)
        axis.set_xlabel(across, parse_math=False)
        axis.set_ylabel(up, parse_math=False)
        if log:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.margins(0.08, 0.1)
        _series(axis, points)
        front = _front(axis, points, higher)
        canvas.draw()  # labels are placed by what is where
        _labels(axis, points, front, canvas.get_renderer())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(text.getvalue(), name, points)


def front_of(points: Sequence[Point], higher: bool = True) -> list[int]:
    """Numbers of the points on the front, cheapest first."""
    sign = 1 if higher else -1
    return pareto_front([p.cost for p in points], [sign * p.value for p in points])


def _series(axis: Axes, points: Sequence[Point]) -> None:
    for series in dict.fromkeys(p.series for p in points):
        mine = sorted((p.cost, p.value) for p in points if p.series == series)
        line = axis.plot(*zip(*mine, strict=True), color=FAINT, linewidth=0.8, zorder=1)
        line[0].set_gid(f"series-{series}")
    for number, point in enumerate(points):
        face = "none" if point.hollow else MUTED
        dot = axis.plot(
            point.cost, point.value, "o", markersize=3.6, markerfacecolor=face, markeredgecolor=MUTED,
            markeredgewidth=0.8, zorder=2,
        )  # fmt: skip
        dot[0].set_gid(f"point-{number}")


def _front(axis: Axes, points: Sequence[Point], higher: bool) -> list[int]:
    front = front_of(points, higher)
    costs, values = [points[i].cost for i in front], [points[i].value for i in front]
    axis.step(costs, values, where="post", color=ACCENT, linewidth=1.3, zorder=3, gid="front")
    for number in front:
        point = points[number]
        face = "none" if point.hollow else ACCENT
        axis.plot(
            point.cost, point.value, "o", markersize=4.6, markerfacecolor=face, markeredgecolor=ACCENT,
            zorder=4, gid=f"best-{number}",
        )  # fmt: skip
    return front


def _labels(axis: Axes, points: Sequence[Point], front: Sequence[int], renderer: RendererAgg) -> None:
    """Name the policy wherever the front passes from one to another, if there is room."""
    frame = axis.get_window_extent(renderer)
    places = axis.transData.transform([(p.cost, p.value) for p in points])
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in places]
    before = -1
    for number in front:
        point = points[number]
        if point.series == before:
            continue
        for dx, dy, across, up in ((-4, 5, "right", "bottom"), (5, -5, "left", "top"), (4, 5, "left", "bottom"),
                                   (-5, -5, "right", "top")):  # fmt: skip
            text = axis.annotate(
                point.label, (point.cost, point.value), (dx, dy), textcoords="offset points", ha=across, va=up,
                fontsize=7.5, color=ACCENT, parse_math=False, zorder=5,
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            inside = (
                frame.x0 <= box.x0
                and box.x1 <= frame.x1 + 12
                and frame.y0 <= box.y0
                and box.y1 <= frame.y1 + 8
            )
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                before = point.series
                break
            text.remove()


def _for_page(svg: str, name: str, points: Sequence[Point]) -> str:
    """matplotlib's SVG for use inside a page: ids of its own, the page's colours, a title on each point."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        own = element.get("id", "")
        kind, _, number = own.rpartition("-")
        if kind in ("point", "best"):
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = points[int(number)].title
            element.insert(0, title)
            number = str(points[int(number)].series)
        if kind in ("point", "best", "series"):
            element.set("class", f"{kind} s{number}")
        if own:
            element.set("id", f"{name}-{own}")
        for attribute in ("clip-path", f"{{{XLINK}}}href", "href", "style"):
            if (value := element.get(attribute)) is not None:
                element.set(attribute, re.sub(r"(url\(#|^#)", rf"\g<1>{name}-", value))
    for attribute in ("width", "height"):
        root.attrib.pop(attribute, None)
    root.set("aria-hidden", "true")  # the caption says in words what is drawn
    text = ElementTree.tostring(root, encoding="unicode")
    for ink, variable in INKS.items():
        text = text.replace(ink, variable)
    return text
