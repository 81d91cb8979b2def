"""From a run folder to ``report.html``: one file, nothing loaded from anywhere, everything escaped."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vlm_prune.eval.report.charts import Point, front_of, pareto_svg
from vlm_prune.eval.report.results import KV, TIME, Entry, Measure, Results, budget_text, read_results
from vlm_prune.eval.report.samples import Browser, browse
from vlm_prune.eval.runs.folder import RunFolder, write_whole

TOKENS = "tokens"
SAMPLES = 40
"""Samples of each task that a report shows, unless told otherwise."""


def write_report(folder: RunFolder, out: Path | None = None, samples: int = SAMPLES) -> Path:
    """Write the report of a run folder.

    Args:
        folder: with ``results.json``, see docs/runs.md.
        out: default: ``report.html`` in the folder.
        samples: how many of each task can be browsed, spread evenly; each brings its image along.

    Raises:
        ValueError: the folder holds no finished cell, or ``samples`` is negative.
    """
    if samples < 0:
        raise ValueError(f"samples={samples}: choose 0 or more")
    out = out or folder.path / "report.html"
    results = read_results(folder)
    browser = browse(folder, results, samples) if samples else Browser()
    config = folder.path / "config.yaml"
    page = {
        "title": f"{folder.path.resolve().name}: visual-token pruning",
        "facts": _facts(results),
        "browser": browser.payload(),
        "config": config.read_text(encoding="utf-8") if config.exists() else "",
        **figures_context(results),
        **table_context(results),
        **_remarks(results, browser),
        **_samples_context(results, browser),
    }
    write_whole(out, render("report.html", page))
    return out


def render(template: str, page: dict[str, Any]) -> str:
    """A template of this package with ``page`` filled in."""
    jinja = Environment(
        loader=PackageLoader("vlm_prune.eval.report"),
        autoescape=lambda name: name is None or name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text: str = jinja.get_template(template).render(version=version("vlm-prune"), **page)
    return text


def _count(number: int, what: str) -> str:
    if number != 1:
        what = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{number} {what}"


def _facts(results: Results) -> str:
    parts = [
        _count(len(results.models), "model"),
        f"{_count(len(results.policies), 'policy')} at {_count(len(results.entries), 'setting')} in all",
    ]
    parts += [f"{name} ({kind})" if name != kind else name for name, kind in results.tasks.items()]
    return "; ".join([", ".join(parts[:2]), *parts[2:]]) + "."


# --- figures ---


def figures_context(results: Results) -> dict[str, Any]:
    """One row of panels for each model and task: against tokens, prefill time and KV bytes."""
    costs = [
        (Measure(TOKENS, "", "visual tokens that enter", "lower", 0), True, "Front by tokens"),
        (Measure(TIME, "", "prefill", "lower", 1, 1.0, "ms"), False, "Front by prefill time"),
        (Measure(KV, "", "KV cache", "lower", 2, 2**-20, "MiB"), True, "Front by KV cache"),
    ]
    figures: list[dict[str, Any]] = []
    for model in results.models:
        for task in results.tasks:
            measure = results.drawn(task)
            mine = [e for e in results.entries if e.model == model and measure and measure.key in e.values]
            if measure is None or not mine:
                continue
            panels = [
                _panel(mine, results.policies, measure, cost, log, caption, f"f{len(figures)}-{number}")
                for number, (cost, log, caption) in enumerate(costs)
                if any(_cost(entry, cost) is not None for entry in mine)
            ]
            figures.append({"title": f"{model}: {task} {measure.title}", "panels": panels})
    timed = any(TIME in entry.values or KV in entry.values for entry in results.entries)
    return {
        "figures": figures,
        "policies": results.policies,
        "hollow": any(entry.inside for entry in results.entries),
        "untimed": not timed,
    }


def _cost(entry: Entry, cost: Measure) -> float | None:
    return entry.tokens if cost.key == TOKENS else entry.values.get(cost.key)


def _name(entry: Entry) -> str:
    return entry.policy if entry.budget == budget_text({}) else f"{entry.policy} {entry.budget}"


def _panel(
    entries: Sequence[Entry], policies: Sequence[str], measure: Measure, cost: Measure, log: bool,
    caption: str, name: str,
) -> dict[str, Any]:  # fmt: skip
    shown = [(entry, paid) for entry in entries if (paid := _cost(entry, cost)) is not None]
    points = [
        Point(
            series=policies.index(entry.policy),
            label=entry.policy,
            cost=paid * cost.scale,
            value=entry.values[measure.key],
            title=f"{_name(entry)}: {_shown(entry, measure)} at {_priced(cost, paid)}",
            hollow=entry.inside,
        )
        for entry, paid in shown
    ]
    higher = measure.better != "lower"
    across = f"{cost.title}, {cost.unit}" if cost.unit else cost.title
    front = [
        {
            "name": _name(shown[i][0]),
            "text": f"{measure.shown(points[i].value)} at {_priced(cost, shown[i][1])}",
        }
        for i in front_of(points, higher)
    ]
    svg = Markup(pareto_svg(points, name, across, measure.title, log, higher))
    return {"svg": svg, "caption": caption, "front": front}


def _shown(entry: Entry, measure: Measure) -> str:
    return f"{measure.title} {measure.shown(entry.values[measure.key])}"


def _priced(cost: Measure, paid: float) -> str:
    return f"{cost.shown(paid)} {cost.unit or 'tokens'}"


# --- the table ---

ARROWS = {"higher": "↑", "lower": "↓", "": ""}


def table_context(results: Results) -> dict[str, Any]:
    """Headings and rows of the table of all cells."""
    fixed = {"policy": False, "model": False, "acts in": False, "budget": True, "tokens": True}
    columns = [{"title": name, "figure": figure, "down": False, "unit": ""} for name, figure in fixed.items()]
    columns += [
        {
            "title": f"{measure.title} {ARROWS[measure.better] if measure.task else ''}".strip(),
            "figure": True,
            "down": measure.better == "higher",
            "unit": measure.unit,
        }
        for measure in results.measures
    ]
    groups: dict[str, int] = {}
    for measure in results.measures:
        groups[measure.task or "cost"] = groups.get(measure.task or "cost", 0) + 1
    drawn = [first for task in results.tasks if (first := results.drawn(task)) is not None]
    best = {measure.key: _on_front(results, measure) for measure in drawn}
    rows: list[dict[str, Any]] = []
    before = ""
    for entry in results.entries:
        stages = ", ".join(entry.stages)
        rows.append(
            {
                "policy": entry.policy,
                "model": entry.model,
                "stages": stages,
                "budget": entry.budget,
                "share": entry.tokens / entry.dense if entry.dense else "",
                "tokens": entry.tokens,
                "tokens_text": f"{entry.tokens:.0f}",
                "words": " ".join([entry.model, entry.policy, stages, entry.budget]),
                "first": bool(rows) and entry.model != before,
                "cells": [_figure(entry, m, entry.number in best.get(m.key, ())) for m in results.measures],
            }
        )
        before = entry.model
    return {"columns": columns, "groups": list(groups.items()), "rows": rows}


def _on_front(results: Results, measure: Measure) -> set[int]:
    """Numbers of the entries on the front of their model, by tokens."""
    found: set[int] = set()
    for model in results.models:
        mine = [e for e in results.entries if e.model == model and measure.key in e.values]
        points = [Point(0, "", e.tokens, e.values[measure.key], "") for e in mine]
        found |= {mine[i].number for i in front_of(points, measure.better == "higher")}
    return found


def _figure(entry: Entry, measure: Measure, best: bool) -> dict[str, Any]:
    if (value := entry.values.get(measure.key)) is None:
        return {"value": "", "text": "", "best": False, "interval": ""}
    interval = ""
    if (pair := entry.intervals.get(measure.key)) is not None:
        low, high = (measure.shown(end) for end in pair)
        interval = f"{low}–{high}"  # noqa: RUF001
    return {"value": value, "text": measure.shown(value), "best": best, "interval": interval}


# --- the rest ---


def _remarks(results: Results, browser: Browser) -> dict[str, Any]:
    failed = [{**cell, "budget": budget_text(cell["budget"])} for cell in results.failed]
    warnings = [
        (f"{entry.model}, {_name(entry)}, {task}", notes)
        for entry in results.entries
        for task, notes in entry.warnings.items()
    ]
    missing = [image["missing"] for image in browser.images if image["missing"]]
    return {"failed": failed, "warnings": warnings, "missing": missing}


def _samples_context(results: Results, browser: Browser) -> dict[str, Any]:
    parts = [
        f"{len(task.samples)} of {_count(task.total, 'sample')} of {task.name}"
        if len(task.samples) < task.total
        else f"all {_count(task.total, 'sample')} of {task.name}"
        for task in browser.tasks
    ]
    return {
        "shown": f"Here are {', '.join(parts)}." if parts else "",
        "marked": any(task.kind == "chair" for task in browser.tasks),
        "stock": any(entry.unpruned for entry in results.entries),
    }
