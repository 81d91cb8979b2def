"""Charts of a run: costs to the right, figures up, each policy in its own look, the Pareto front behind them.

matplotlib draws a chart in the colours of white paper. For a paper it is saved as it is, as PDF or SVG with a legend;
in a page, where text stays text, its colours become the page's own, light or dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator

from vlm_prune.eval.report.labels import Label, Obstacles, place
from vlm_prune.eval.report.looks import DASHES, HUES, INK, SHAPES, Look, looks
from vlm_prune.eval.report.pareto import pareto_front

MUTED, FAINT, BAND = "#66635c", "#c9c6bd", "#ebe8de"
TEXT_SHARE = 0.55
"""How much of a label's colour is its policy's; the rest is ink, so that thin letters keep their contrast."""


def _toned(hue: str, ink: str) -> str:
    mixed = TEXT_SHARE * np.array(to_rgb(hue)) + (1 - TEXT_SHARE) * np.array(to_rgb(ink))
    return to_hex(mixed.tolist())


TONES = tuple((_toned(light, INK[0]), _toned(dark, INK[1])) for light, dark in HUES)
"""The colours of labels by hue, on light and on dark paper."""

INKS = {
    INK[0]: "var(--ink)",
    MUTED: "var(--muted)",
    FAINT: "var(--faint)",
    BAND: "var(--band)",
    **{light: f"var(--hue-{i})" for i, (light, _) in enumerate(HUES)},
    **{light: f"var(--tone-{i})" for i, (light, _) in enumerate(TONES)},
}
"""Colours on paper, and the CSS variables that take their place in a page."""

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vlm_prune",
    "pdf.fonttype": 42,  # letters as letters: journals refuse type 3
    "font.size": 8,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.labelcolor": INK[0],
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK[0],
}
LEGEND = 1.75
"""Inches that a legend takes."""

LONGEST = 26
"""Letters of a label in a chart; the whole of it is in legends, tables and titles."""


@dataclass(frozen=True)
class Point:
    """One entry in a chart.

    Attributes:
        series: number of its policy in the report; its points are joined by a line.
        label: the policy's name.
        title: what a pointer that rests on it is told.
        hollow: drawn as an outline.
    """

    series: int
    label: str
    cost: float
    value: float
    title: str
    hollow: bool = False


@dataclass(frozen=True)
class Chart:
    """What is drawn.

    Attributes:
        points: at least one.
        across: what the cost is, with its unit.
        up: what the value is.
        log: whether costs are spaced by ratio.
        higher: whether more of the value is better.
        reference: the value without pruning, drawn as a level line.
        look: of each label; default: `looks` of the labels that there are.
    """

    points: Sequence[Point]
    across: str
    up: str
    log: bool = False
    higher: bool = True
    reference: float | None = None
    look: dict[str, Look] | None = None

    @property
    def looks(self) -> dict[str, Look]:
        """A look for each label."""
        return self.look or looks(point.label for point in self.points)

    def front(self) -> list[int]:
        """Numbers of the points on the front, cheapest first."""
        return front_of(self.points, self.higher)


def front_of(points: Sequence[Point], higher: bool = True) -> list[int]:
    """Numbers of the points on the front, cheapest first."""
    sign = 1 if higher else -1
    return pareto_front([p.cost for p in points], [sign * p.value for p in points])


def page_svg(chart: Chart, name: str, size: tuple[float, float] = (3.7, 2.7)) -> str:
    """A chart as inline SVG; ``name`` is a prefix, unique on the page, for the ids inside; ``size`` is in inches."""
    with matplotlib.rc_context(STYLE):
        text = saved(_drawn(chart, size), "svg").decode()
    return _for_page(text, name, chart.points)


def papers(chart: Chart, kinds: Sequence[str], width: float = 5.5) -> dict[str, bytes]:
    """A chart with its legend as files, of ``kinds`` "pdf" and "svg"; ``width`` in inches."""
    names = list(dict.fromkeys(point.label for point in chart.points))
    height = max(0.6 * width, 0.155 * len(names) + 0.4)
    with matplotlib.rc_context(STYLE):
        figure = _drawn(chart, (width, height), legend=names)
        return {kind: saved(figure, kind) for kind in kinds}


def saved(figure: Figure, kind: str) -> bytes:
    """A figure as a "pdf" or "svg", the same bytes each time."""
    out = io.BytesIO()
    stamp = "Date" if kind == "svg" else "CreationDate"
    figure.savefig(out, format=kind, transparent=True, metadata={"Creator": None, stamp: None})
    return out.getvalue()


def marker(look: Look) -> Outline:
    """A policy's marker, as matplotlib takes it."""
    corners = SHAPES[look.shape]
    return Outline([*corners, corners[0]], closed=True)


def _drawn(chart: Chart, size: tuple[float, float], legend: Sequence[str] = ()) -> Figure:
    wide, high = size
    figure = Figure(figsize=size)
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    beside = LEGEND if legend else 0.1
    figure.subplots_adjust(0.52 / wide, 0.42 / high, 1 - beside / wide, 1 - 0.1 / high)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(width=0.6, length=3)
    axis.set_xlabel(chart.across, parse_math=False)
    axis.set_ylabel(chart.up, parse_math=False)
    if chart.log:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.margins(0.1, 0.1)
    front = _front(axis, chart)
    _series(axis, chart)
    if legend:
        _legend(figure, chart, legend)
    _labels(axis, chart, front, canvas)
    return figure


def _front(axis: Axes, chart: Chart) -> list[int]:
    front = chart.front()
    costs, values = [chart.points[i].cost for i in front], [chart.points[i].value for i in front]
    axis.step(
        costs, values, where="post", color=BAND, linewidth=5, solid_joinstyle="round", zorder=0, gid="front"
    )
    if chart.reference is not None:
        axis.axhline(chart.reference, color=MUTED, linewidth=0.6, dashes=(4, 3), zorder=0.5, gid="reference")
    return front


def _series(axis: Axes, chart: Chart) -> None:
    for series in dict.fromkeys(p.series for p in chart.points):
        some = [(number, p) for number, p in enumerate(chart.points) if p.series == series]
        look = chart.looks[some[0][1].label]
        mine = sorted((p.cost, p.value) for _, p in some)
        line = axis.plot(*zip(*mine, strict=True), color=look.light, linewidth=0.8, alpha=0.55, zorder=1)
        line[0].set_gid(f"series-{series}")
        if dash := DASHES[look.dash]:
            line[0].set_dashes(dash)
        for number, point in some:
            dot = axis.plot(point.cost, point.value, linestyle="none", zorder=2, **_face(look, point.hollow))
            dot[0].set_gid(f"point-{number}")


def _face(look: Look, hollow: bool) -> dict[str, Any]:
    face = "none" if hollow else look.light
    return {
        "marker": marker(look), "markersize": 6.2, "markerfacecolor": face, "markeredgecolor": look.light,
        "markeredgewidth": 0.9 if hollow else 0.3,
    }  # fmt: skip


def _legend(figure: Figure, chart: Chart, names: Sequence[str]) -> None:
    """Names beside the chart, best last value on top: the order in which lines end."""
    last = {p.label: p.value for p in sorted(chart.points, key=lambda p: p.cost)}
    hollow = {p.label: p.hollow for p in chart.points}
    ordered = sorted(names, key=lambda name: (last[name] if not chart.higher else -last[name], name))
    lines = []
    for name in ordered:
        look = chart.looks[name]
        line = Line2D([], [], color=look.light, linewidth=0.8, **_face(look, hollow[name]))
        if dash := DASHES[look.dash]:
            line.set_dashes(dash)
        lines.append(line)
    left = 1 - (LEGEND - 0.08) / figure.get_figwidth()
    texts = figure.legend(
        lines, [shortened(name) for name in ordered], loc="upper left", bbox_to_anchor=(left, 1),
        borderpad=0.2, borderaxespad=0.3, frameon=False, fontsize=7,
        handlelength=2.6, labelspacing=0.35,
    ).get_texts()  # fmt: skip
    for text in texts:
        text.set_parse_math(False)


def shortened(name: str) -> str:
    """A name as charts show it."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _labels(axis: Axes, chart: Chart, front: Sequence[int], canvas: FigureCanvasAgg) -> None:
    """Name each policy once beside one of its points, those on the front first, wherever there is room for it."""
    figure = canvas.figure
    axis.get_xlim(), axis.get_ylim()  # the limits follow the data only when they are asked for
    frame = axis.get_window_extent()
    at = axis.transData.transform([(p.cost, p.value) for p in chart.points])
    obstacles = Obstacles((frame.x0, frame.y0, frame.x1, frame.y1), figure.dpi / 72)
    for line in axis.get_lines():
        drawn = line.get_gid() or ""
        if drawn.startswith(("series", "reference")):
            obstacles.add_line(line.get_transform().transform_path(line.get_path()).vertices)
    for dot in at:
        obstacles.add_dot(*dot)
    turns = [*front, *sorted(range(len(chart.points)), key=lambda i: -chart.points[i].cost)]
    ordered = list(dict.fromkeys(chart.points[i].series for i in turns))
    wanted = []
    for series in ordered:
        mine = [i for i in turns if chart.points[i].series == series]
        name = shortened(chart.points[mine[0]].label)
        look = chart.looks[chart.points[mine[0]].label]
        text = figure.text(0, 0, name, fontsize=7, parse_math=False)
        box = text.get_window_extent(canvas.get_renderer())
        text.remove()
        wanted.append(
            (series, look, Label(name, box.width, box.height, [tuple(at[i]) for i in dict.fromkeys(mine)]))
        )
    across, up = figure.bbox.width, figure.bbox.height
    for series, look, label in wanted:
        if (found := place(label, obstacles)) is None:
            continue
        (x, y), (x0, y0), end = found
        figure.text(
            x / across, y / up, label.text, fontsize=7, color=TONES[look.hue][0] if look.hue >= 0 else INK[0],
            ha="left", va="bottom", parse_math=False, zorder=5, gid=f"label-{series}",
        )  # fmt: skip
        if end is not None:
            figure.add_artist(
                Line2D(
                    [x0 / across, end[0] / across], [y0 / up, end[1] / up], color=look.light, linewidth=0.5,
                    alpha=0.7, zorder=1.5, gid=f"leader-{series}",
                )
            )  # fmt: skip


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
        if kind == "point":
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = points[int(number)].title
            element.insert(0, title)
            number = str(points[int(number)].series)
        if kind in ("point", "series", "label", "leader"):
            element.set("class", f"{kind} s{number}")
        if own:
            element.set("id", f"{name}-{own}")
        for attribute in ("clip-path", f"{{{XLINK}}}href", "href", "style"):
            if (value := element.get(attribute)) is not None:
                value = re.sub(r"(url\(#|^#)", rf"\g<1>{name}-", value)
                if attribute == "style":
                    value = re.sub(r"#[0-9a-f]{6}", lambda colour: INKS.get(colour[0], colour[0]), value)
                element.set(attribute, value)
    for attribute in ("width", "height"):
        root.attrib.pop(attribute, None)
    root.set("aria-hidden", "true")  # the caption says in words what is drawn
    return ElementTree.tostring(root, encoding="unicode")
