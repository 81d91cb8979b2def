"""From a run folder to ``report.html``: one file, nothing loaded from anywhere, everything escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vlm_prune.eval.report.cells_table import table_context, tables
from vlm_prune.eval.report.charts import TONES
from vlm_prune.eval.report.exhibits import Exhibit, write_exhibits
from vlm_prune.eval.report.looks import HUES, look_context
from vlm_prune.eval.report.panels import chart_rows, figures_context
from vlm_prune.eval.report.results import Results, budget_text, read_results
from vlm_prune.eval.report.samples import Browser, browse
from vlm_prune.eval.runs.folder import RunFolder, write_whole
from vlm_prune.eval.runs.standings import standings

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
    judged = standings(folder, results.rows)
    config = folder.path / "config.yaml"
    page = {
        "title": f"{folder.path.resolve().name}: visual-token pruning",
        "facts": _facts(results),
        "browser": browser.payload()
        | {"looks": {name: look_context(look) for name, look in results.looks.items()}},
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
