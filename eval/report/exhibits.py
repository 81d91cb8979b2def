"""What of a report can be taken away: every chart and every table, as files for a paper.

A chart is a PDF, an SVG and the CSV of its points; a table a CSV, a LaTeX tabular, a PDF and an SVG. `write_exhibits`
writes all of them. A page carries some inside, as data: addresses, and not as files beside it: a report is one file
that is mailed and moved, and its links still work then.
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vlm_prune.eval.report.charts import STYLE, Chart, marker, papers, saved
from vlm_prune.eval.report.looks import Look
from vlm_prune.eval.runs.folder import write_whole

MEDIA = {
    "pdf": "application/pdf",
    "svg": "image/svg+xml",
    "csv": "text/csv;charset=utf-8",
    "tex": "text/plain;charset=utf-8",
}
ROW, GAP, EDGE = 0.155, 0.14, 0.06
"""Inches: height of a row, space between columns, space around a table."""


@dataclass(frozen=True)
class Table:
    """A table as it is printed, and as data.

    Attributes:
        heads: of the printed columns; those in ``figures`` are set to the right.
        rows: printed cells.
        looks: per row, how its first cell's policy is drawn.
        data_heads: of the data, with ``data`` one row each, unrounded.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: Sequence[bool]
    looks: Sequence[Look | None]
    data_heads: Sequence[str]
    data: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Exhibit:
    """A chart or table of a report.

    Attributes:
        name: of its files, without an ending; unique in the report.
        title: one line.
    """

    name: str
    title: str
    shows: Chart | Table

    def files(self, *kinds: str) -> dict[str, bytes]:
        """Its files by ending; all there are, unless ``kinds`` names some."""
        shows = self.shows
        text: dict[str, Callable[[], str]]
        draw: Callable[[list[str]], dict[str, bytes]]
        if isinstance(shows, Chart):
            text, draw = {"csv": lambda: csv_of(*points_of(shows))}, lambda drawn: papers(shows, drawn)
        else:
            text = {"csv": lambda: csv_of(shows.data_heads, shows.data), "tex": lambda: latex(shows)}
            draw = lambda drawn: table_papers(shows, drawn)  # noqa: E731
        wanted = kinds or ("pdf", "svg", *text)
        drawn = [kind for kind in wanted if kind in ("pdf", "svg")]
        pictures = draw(drawn) if drawn else {}
        return {kind: pictures[kind] if kind in pictures else text[kind]().encode() for kind in wanted}

    def links(self, *kinds: str) -> list[dict[str, str]]:
        """For a page: name, ending, and the file itself as an address, so that the page needs no other file."""
        return [
            {
                "kind": kind,
                "name": f"{self.name}.{kind}",
                "href": f"data:{MEDIA[kind]};base64,{base64.b64encode(content).decode()}",
            }
            for kind, content in self.files(*kinds).items()
        ]


def write_exhibits(exhibits: Sequence[Exhibit], folder: Path) -> list[Path]:
    """All files of all exhibits; folders are made."""
    written = []
    for exhibit in exhibits:
        for kind, content in exhibit.files().items():
            path = folder / f"{exhibit.name}.{kind}"
            write_whole(path, content)
            written.append(path)
    return written


def slug(*parts: str) -> str:
    """A file name without an ending, of letters that every system takes."""
    cut = [re.sub(r"[^\w.+]+", "-", part).strip("-.")[:40] for part in parts]
    return "-".join(filter(None, cut)) or "exhibit"


def points_of(chart: Chart) -> tuple[list[str], list[list[object]]]:
    """The points of a chart as a table."""
    front = set(chart.front())
    heads = ["policy", "entry", chart.across, chart.up, "on_front", "drops_inside_the_language_model"]
    return heads, [
        [p.label, p.title.partition(":")[0], p.cost, p.value, int(i in front), int(p.hollow)]
        for i, p in enumerate(chart.points)
    ]


def csv_of(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """RFC 4180; nothing where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(heads)
    writer.writerows(rows)
    return text.getvalue()


SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"} | {  # noqa: RUF001
    letter: f"\\{letter}" for letter in "&%$#_{}"
}


def latex(table: Table) -> str:
    """A tabular with the rules of the package booktabs."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(SPECIAL.get(letter, letter) for letter in cell) for cell in cells) + r" \\"

    columns = "".join("r" if figure else "l" for figure in table.figures)
    body = [line(row) for row in table.rows]
    return "\n".join(
        [r"% \usepackage{booktabs}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(table.heads), r"\midrule",
         *body, r"\bottomrule", r"\end{tabular}", ""]
    )  # fmt: skip


def table_papers(table: Table, kinds: Sequence[str]) -> dict[str, bytes]:
    """A table with three rules, each policy with its marker, as wide as its cells need."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(dpi=72)
        renderer = FigureCanvasAgg(figure).get_renderer()

        def width(text: str, bold: bool) -> float:
            shown = figure.text(0, 0, text, fontsize=7, weight="bold" if bold else "normal", parse_math=False)
            found = float(shown.get_window_extent(renderer).width) / 72
            shown.remove()
            return found

        columns = list(zip(*table.rows, strict=True))
        widths = [
            max(width(head, True), width(max(cells, key=len), False) + (0.14 if i == 0 else 0))
            for i, (head, cells) in enumerate(zip(table.heads, columns, strict=True))
        ]
        wide = sum(widths) + GAP * (len(widths) - 1) + 2 * EDGE
        high = ROW * (len(table.rows) + 1) + 2 * EDGE + 0.08
        figure.set_size_inches(wide, high)

        def rule(y: float, weight: float) -> None:
            figure.add_artist(
                Line2D(
                    [EDGE / wide, 1 - EDGE / wide],
                    [y / high] * 2,
                    color=STYLE["text.color"],
                    linewidth=weight,
                )
            )

        top = high - EDGE
        rule(top, 0.9)
        rule(top - ROW - 0.04, 0.5)
        rule(EDGE, 0.9)
        for number, (cells, look) in enumerate(
            zip([table.heads, *table.rows], [None, *table.looks], strict=True)
        ):
            y, x = top - ROW * (number + 0.5) - (0.06 if number else 0.02), EDGE
            for i, (cell, each, right) in enumerate(zip(cells, widths, table.figures, strict=True)):
                indent = 0.14 if i == 0 and look is not None else 0.0
                figure.text(
                    (x + (each if right else indent)) / wide, y / high, cell, fontsize=7, va="center",
                    ha="right" if right else "left", weight="normal" if number else "bold", parse_math=False,
                )  # fmt: skip
                if indent and look is not None:
                    figure.add_artist(
                        Line2D(
                            [(x + 0.05) / wide],
                            [y / high],
                            marker=marker(look),
                            markersize=5,
                            color=look.light,
                            markeredgewidth=0,
                        )
                    )
                x += each + GAP
        return {kind: saved(figure, kind) for kind in kinds}
