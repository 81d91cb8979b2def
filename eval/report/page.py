"""From a run folder to ``report.html``: one file, nothing loaded from anywhere, everything escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vlm_prune.eval.paired import LEVEL
from vlm_prune.eval.report.charts import TONES, Chart, Point, front_of, page_svg
from vlm_prune.eval.report.exhibits import Exhibit, Table, slug, write_exhibits
from vlm_prune.eval.report.looks import DASHES, HUES, Look
from vlm_prune.eval.report.results import KV, TIME, Entry, Measure, Results, budget_text, read_results
from vlm_prune.eval.report.samples import Browser, browse
from vlm_prune.eval.runs.folder import RunFolder, write_whole
from vlm_prune.eval.runs.standings import Standings, standings

TOKENS = "tokens"
SAMPLES = 40
"""Samples of each task that a report shows, unless told otherwise."""


WIDE, TALL, SMALL = (7.6, 5.2), (3.5, 4.0), (3.7, 2.5)
"""Inches of the large chart on a desk and on a phone, and of the small ones."""


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
    judged = standings(folder, results.rows)
    config = folder.path / "config.yaml"
    page = {
        "title": f"{folder.path.resolve().name}: visual-token pruning",
        "facts": _facts(results),
        "browser": browser.payload() | {"looks": {name: _look(look) for name, look in results.looks.items()}},
        "config": config.read_text(encoding="utf-8") if config.exists() else "",
        **figures_context(results),
        **table_context(results, judged),
        **_remarks(results, browser),
        **_samples_context(results, browser),
    }
    write_whole(out, render("report.html", page))
    return out


def export_report(folder: RunFolder, out: Path) -> list[Path]:
    """Write every chart and table of the report of a run folder as files for a paper, into the folder ``out``."""
    results = read_results(folder)
    charts = [
        Exhibit(panel["slug"], panel["title"], panel["chart"])
        for row in chart_rows(results)
        for panel in row["panels"]
    ]
    return write_exhibits([*charts, *tables(results, standings(folder, results.rows))], out)


def render(template: str, page: dict[str, Any]) -> str:
    """A template of this package with ``page`` filled in."""
    jinja = Environment(
        loader=PackageLoader("vlm_prune.eval.report"),
        autoescape=lambda name: name is None or name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    colours = {"hue": HUES, "tone": TONES}
    text: str = jinja.get_template(template).render(version=version("vlm-prune"), colours=colours, **page)
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


def _look(look: Look) -> dict[str, str]:
    """How a page draws a policy: the marker's path, its colour, and the strokes of its line."""
    dash = " ".join(f"{length:g}" for length in DASHES[look.dash])
    return {"path": look.path, "colour": look.variable, "dash": dash}


# --- figures ---


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
        "policies": [{"name": name, **_look(results.looks[name])} for name in results.policies],
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
            **_look(results.looks[points[i].label]),
        }
        for i in chart.front()
    ]
    return {"chart": chart, "front": front}


def _shown(entry: Entry, measure: Measure) -> str:
    return f"{measure.title} {measure.shown(entry.values[measure.key])}"


def _priced(cost: Measure, paid: float) -> str:
    return f"{cost.shown(paid)} {cost.unit or 'tokens'}"


# --- the table ---

ARROWS = {"higher": "↑", "lower": "↓", "": ""}
STANDING = "beats / ties / loses"


def table_context(results: Results, judged: Standings) -> dict[str, Any]:
    """Headings and rows of the table of all cells."""
    fixed = {"policy": False, "model": False, "acts in": False, "budget": True, "tokens": True}
    columns = [
        {"title": name, "figure": figure, "down": False, "unit": "", "group": ""}
        for name, figure in fixed.items()
    ]
    shown = _shown_measures(results, judged)
    for measure, standing in shown:
        columns.append(
            {
                "title": STANDING
                if standing
                else f"{measure.title} {ARROWS[measure.better] if measure.task else ''}".strip(),
                "figure": True,
                "down": standing or measure.better == "higher",
                "unit": measure.unit,
                "group": measure.task or "cost",
            }
        )
    groups: dict[str, int] = {}
    for measure, _ in shown:
        groups[measure.task or "cost"] = groups.get(measure.task or "cost", 0) + 1
    drawn = [first for task in results.tasks if (first := results.drawn(task)) is not None]
    best = {measure.key: _on_front(results, measure) for measure in drawn}
    rows: list[dict[str, Any]] = []
    before = ""
    for entry in results.entries:
        stages = ", ".join(entry.acts)
        twin = judged.idle.get(entry.key)
        rows.append(
            {
                "policy": entry.policy,
                "look": _look(results.looks[entry.policy]),
                "twin": "" if twin is None else results.side_name(entry.model, twin),
                "model": entry.model,
                "stages": stages,
                "budget": entry.budget,
                "share": entry.tokens / entry.dense if entry.dense else "",
                "tokens": entry.tokens,
                "tokens_text": f"{entry.tokens:.0f}",
                "words": " ".join([entry.model, entry.policy, stages, entry.budget]),
                "first": bool(rows) and entry.model != before,
                "cells": [
                    _standing(entry, measure, results, judged)
                    if standing
                    else _figure(entry, measure, entry.number in best.get(measure.key, ()))
                    for measure, standing in shown
                ],
            }
        )
        before = entry.model
    return {
        "columns": columns,
        "models": len(results.models),
        "groups": list(groups.items()),
        "rows": rows,
        "judged": bool(judged.pairs),
        "level": f"{LEVEL:.0%}",
        "idle": any(row["twin"] for row in rows),
        "table_links": [
            {"title": table.title, "links": table.links("csv", "tex")} for table in tables(results, judged)
        ],
    }


def _shown_measures(results: Results, judged: Standings) -> list[tuple[Measure, bool]]:
    """The measures in order, each that is drawn once more, for the verdicts on it."""
    known = {(pair.task, pair.metric) for pair in judged.pairs}
    drawn = {measure.key for task in results.tasks if (measure := results.drawn(task)) is not None}
    return [
        (measure, standing)
        for measure in results.measures
        for standing in (False, True)
        if not standing or (measure.key in drawn and (measure.task, measure.metric) in known)
    ]


def _standing(entry: Entry, measure: Measure, results: Results, judged: Standings) -> dict[str, Any]:
    met = judged.met(entry.model, measure.task, measure.metric, entry.key[1:])
    if not met:
        return {"value": "", "text": "", "best": False, "interval": "", "hint": ""}
    said = {
        word: [results.side_name(entry.model, who) for who, how in met.items() if how == word]
        for word in ("beats", "ties", "loses")
    }
    counts = [len(who) for who in said.values()]
    stock = next((how for who, how in met.items() if who in judged.stock), None)
    hints = [
        f"{'loses to' if word == 'loses' else word} {', '.join(who)}"
        for word, who in said.items()
        if who and word != "ties"
    ]
    return {
        "value": counts[0] - counts[2],
        "text": " / ".join(map(str, counts)),
        "best": False,
        "interval": ""
        if stock is None
        else {"ties": "ties unpruned", "beats": "beats unpruned", "loses": "loses to unpruned"}[stock],
        "hint": "; ".join(hints),
    }


def tables(results: Results, judged: Standings) -> list[Exhibit]:
    """The tables of a run as exhibits: the cells of each model, and all pairs of policies."""
    shown = _shown_measures(results, judged)
    found = []
    for number, model in enumerate(results.models, 1):
        mine = [entry for entry in results.entries if entry.model == model]
        printed, data = [], []
        for entry in mine:
            cells = [
                _standing(entry, m, results, judged) if standing else _figure(entry, m, False)
                for m, standing in shown
            ]
            printed.append(
                [entry.policy, entry.budget, f"{entry.tokens:.0f}", *(cell["text"] for cell in cells)]
            )
            numbers: list[object] = []
            for (measure, standing), cell in zip(shown, cells, strict=True):
                numbers += (
                    [cell["text"]]
                    if standing
                    else [cell["value"], *entry.intervals.get(measure.key, ("", ""))]
                )
            data.append(
                [entry.model, entry.policy, ", ".join(entry.acts), entry.budget, entry.tokens, *numbers]
            )
        heads = [
            " ".join(filter(None, (m.task, STANDING if standing else m.title, m.unit)))
            for m, standing in shown
        ]
        data_heads = ["model", "policy", "acts_in", "budget", "tokens"]
        for measure, standing in shown:
            name = f"{measure.task}_{measure.metric}".strip("_")
            data_heads += [f"{name}_beats_ties_loses"] if standing else [name, f"{name}_low", f"{name}_high"]
        table = Table(
            ["policy", "budget", "tokens", *heads], printed, [False, *[True] * (len(heads) + 2)],
            [results.looks[entry.policy] for entry in mine], data_heads, data,
        )  # fmt: skip
        found.append(Exhibit(slug("cells", f"{number}", model), f"{model}: all cells", table))
    if judged.pairs:
        found.append(Exhibit("pairs", "Policies against each other", _pairs(results, judged)))
    return found


def _pairs(results: Results, judged: Standings) -> Table:
    """Pairs that differ, as a table; all of them as data."""
    told = [
        (p, results.side_name(p.model, p.first), results.side_name(p.model, p.second)) for p in judged.pairs
    ]
    heads = [
        "model", "task", "metric", "first", "verdict", "second", "samples", "wins", "losses", "difference", "low",
        "high", "test", "p", "p_holm",
    ]  # fmt: skip
    data = [
        [p.model, p.task, p.metric, first, p.verdict, second, p.n, p.wins, p.losses, p.value, p.low, p.high, p.test,
         p.p, p.adjusted] for p, first, second in told
    ]  # fmt: skip
    printed = [
        [p.model, p.task, p.metric, first, p.verdict, second, f"{p.wins}", f"{p.losses}", f"{p.value:+.3f}",
         f"{p.low:+.3f} to {p.high:+.3f}", f"{p.adjusted:.2g}"] for p, first, second in told if p.verdict != "ties"
    ]  # fmt: skip
    return Table(
        ["model", "task", "metric", "first", "verdict", "second", "wins", "losses", "difference", "95 %", "p (Holm)"],
        printed, [False] * 6 + [True] * 5, [None] * len(printed), heads, data,
    )  # fmt: skip


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
        return {"value": "", "text": "", "best": False, "interval": "", "hint": ""}
    interval = ""
    if (pair := entry.intervals.get(measure.key)) is not None:
        low, high = (measure.shown(end) for end in pair)
        interval = f"{low}–{high}"  # noqa: RUF001
    return {"value": value, "text": measure.shown(value), "best": best, "interval": interval, "hint": ""}


# --- the rest ---


def _remarks(results: Results, browser: Browser) -> dict[str, Any]:
    failed = [{**cell, "budget": budget_text(cell["budget"])} for cell in results.failed]
    warnings = [
        (f"{entry.model}, {entry.name}, {task}", note)
        for entry in results.entries
        for task, notes in entry.warnings.items()
        for note in notes
    ]
    missing = [image["missing"] for image in browser.images if image["missing"]]
    return {"failed": failed, "warnings": grouped(warnings), "missing": missing}


NUMBER = re.compile(r"\d+(?:\.\d+)?")


def grouped(warnings: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Warnings of cells, those that differ in nothing but numbers told once, with the range of these.

    Args:
        warnings: cell and warning.

    Returns:
        For each kind its ``text``, and ``cells`` with their own words.
    """
    kinds: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for cell, note in warnings:
        kinds.setdefault(tuple(NUMBER.split(note)), []).append((cell, note))
    found = []
    for told in kinds.values():
        numbers = zip(*([float(n) for n in NUMBER.findall(note)] for _, note in told), strict=True)
        ranges = iter(
            f"{min(some):g}" if min(some) == max(some) else f"{min(some):g} to {max(some):g}"
            for some in numbers
        )
        text = NUMBER.sub(lambda _, ranges=ranges: next(ranges), told[0][1])  # type: ignore[misc]
        found.append({"text": text, "cells": told})
    return found


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
