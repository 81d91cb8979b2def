"""The charts of a report: for each model and task a measure against tokens, prefill time and KV bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from vlm_prune.eval.report.charts import Chart, Point, page_svg
from vlm_prune.eval.report.exhibits import Exhibit, slug
from vlm_prune.eval.report.looks import look_context
from vlm_prune.eval.report.results import KV, TIME, Entry, Measure, Results

TOKENS = "tokens"

WIDE, TALL, SMALL = (7.6, 5.2), (3.5, 4.0), (3.7, 2.5)
"""Inches of the large chart on a desk and on a phone, and of the small ones."""


def figures_context(results: Results) -> dict[str, Any]:
    """One row of panels for each model and task: against tokens, prefill time and KV bytes."""
    figures: list[dict[str, Any]] = []
    for row in chart_rows(results):
        panels = []
        for number, panel in enumerate(row["panels"]):
            name = f"f{len(figures)}-{number}"
            sizes = {"wide": WIDE, "tall": TALL} if number == 0 else {"small": SMALL}
            svgs = {
                size: Markup(page_svg(panel["chart"], f"{name}-{size}", inches))
                for size, inches in sizes.items()
            }
            links = Exhibit(panel["slug"], panel["title"], panel["chart"]).links("pdf", "csv")
            panels.append({**panel, "svgs": svgs, "links": links})
        figures.append({"title": row["title"], "panels": panels})
    timed = any(TIME in entry.values or KV in entry.values for entry in results.entries)
    return {
        "figures": figures,
        "policies": [{"name": name, **look_context(results.looks[name])} for name in results.policies],
        "hollow": any(entry.inside for entry in results.entries),
        "untimed": not timed,
    }


def chart_rows(results: Results) -> list[dict[str, Any]]:
    """The charts of a run, a row for each model and task: its ``title``, and ``panels`` of ``chart, title, slug,
    caption, front``.
    """
    costs = [
        (Measure(TOKENS, "", "visual tokens that enter", "lower", 0), True, "Front by tokens"),
        (Measure(TIME, "", "prefill", "lower", 1, 1.0, "ms"), False, "Front by prefill time"),
        (Measure(KV, "", "KV cache", "lower", 2, 2**-20, "MiB"), True, "Front by KV cache"),
    ]
    rows: list[dict[str, Any]] = []
    for model in results.models:
        for task in results.tasks:
            measure = results.drawn(task)
            mine = [e for e in results.entries if e.model == model and measure and measure.key in e.values]
            if measure is None or not mine:
                continue
            panels = []
            for cost, log, caption in costs:
                if any(_cost(entry, cost) is not None for entry in mine):
                    name = slug(f"{len(rows) + 1}", model, task, measure.title, "by", cost.title)
                    title = f"{model}: {task} {measure.title} by {cost.title}"
                    panels.append(
                        _panel(mine, results, measure, cost, log)
                        | {"slug": name, "title": title, "caption": caption}
                    )
            rows.append({"title": f"{model}: {task} {measure.title}", "panels": panels})
    return rows


def _cost(entry: Entry, cost: Measure) -> float | None:
    return entry.tokens if cost.key == TOKENS else entry.values.get(cost.key)


def _panel(
    entries: Sequence[Entry], results: Results, measure: Measure, cost: Measure, log: bool
) -> dict[str, Any]:
    """The chart of a figure against a cost, and its front in words."""
    shown = [(entry, paid) for entry in entries if (paid := _cost(entry, cost)) is not None]
    points = [
        Point(
            series=results.policies.index(entry.policy),
            label=entry.policy,
            cost=paid * cost.scale,
            value=entry.values[measure.key],
            title=f"{entry.name}: {_shown(entry, measure)} at {_priced(cost, paid)}",
            hollow=entry.inside,
        )
        for entry, paid in shown
    ]
    chart = Chart(
        points,
        across=f"{cost.title}, {cost.unit}" if cost.unit else cost.title,
        up=measure.title,
        log=log,
        higher=measure.better != "lower",
        reference=next((entry.values[measure.key] for entry, _ in shown if entry.unpruned), None),
        look=results.looks,
    )
    front = [
        {
            "name": shown[i][0].name,
            "text": f"{measure.shown(points[i].value)} at {_priced(cost, shown[i][1])}",
            **look_context(results.looks[points[i].label]),
        }
        for i in chart.front()
    ]
    return {"chart": chart, "front": front}


def _shown(entry: Entry, measure: Measure) -> str:
    return f"{measure.title} {measure.shown(entry.values[measure.key])}"


def _priced(cost: Measure, paid: float) -> str:
    return f"{cost.shown(paid)} {cost.unit or 'tokens'}"
