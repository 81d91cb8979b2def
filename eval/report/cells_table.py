"""The table of a report: a row for each setting, with its figures, its verdicts and its place on the Pareto front."""

from __future__ import annotations

from typing import Any

from vlm_prune.eval.paired import LEVEL
from vlm_prune.eval.report.charts import Point, front_of
from vlm_prune.eval.report.exhibits import Exhibit, Table, slug
from vlm_prune.eval.report.looks import look_context
from vlm_prune.eval.report.results import Entry, Measure, Results
from vlm_prune.eval.runs.standings import Standings

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
                "look": look_context(results.looks[entry.policy]),
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
