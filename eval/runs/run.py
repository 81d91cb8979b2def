"""Run a YAML file: a finished cell is on disk at once, and a later start goes on where this one stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlm_prune.errors import PruningError
from vlm_prune.eval.measure import Setting, latencies
from vlm_prune.eval.runs.cells import Cell, Exam, cells, measure, stages_of
from vlm_prune.eval.runs.config import RunConfig
from vlm_prune.eval.runs.table import markdown, publish

TIMED_SCENES = 2


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows that a folder holds already, by cell key."""
    path = folder / "cells.jsonl"
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return {row["key"]: row for row in rows}


def run(config: RunConfig, console: Console, retime: bool = False, page: Path | None = None) -> int:
    """Measure what is missing, write ``results.json`` and ``results.md``; returns how many cells failed.

    ``retime`` takes the times of all cells again, say because the machine was busy before. ``page`` is a Markdown file
    that gets the tables too, see `table.publish`.
    """
    folder = config.output
    folder.mkdir(parents=True, exist_ok=True)
    todo, done = cells(config), finished(folder)
    missing = [cell for cell in todo if cell.key(config) not in done]
    console.print(f"{len(todo)} cells, {len(todo) - len(missing)} of them finished already: {folder}")
    failed: list[tuple[Cell, Exception]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, (folder / "cells.jsonl").open("a") as file:
        per_cell = config.scenes * (6 * len(config.splits) + 1)
        task = progress.add_task("prompts", total=len(missing) * per_cell)
        exam, loaded = None, ""
        for cell in missing:
            progress.update(task, description=f"{cell.model}: {cell.entry.name} {cell.ratio or ''}")
            if exam is None or loaded != cell.model:
                exam, loaded = Exam.build(cell.model, config), cell.model
            try:
                row = measure(exam, cell, config, lambda n: progress.advance(task, n)) | times(
                    exam, cell, config
                )
            except (PruningError, RuntimeError, ValueError, OSError) as error:
                failed.append((cell, error))
                continue
            stages = stages_of(cell.entry.policy)
            named = {"model": cell.model, "policy": cell.entry.name, "stages": stages, "ratio": cell.ratio}
            done[cell.key(config)] = row = {**named, **row, "seed": config.seed, "key": cell.key(config)}
            file.write(json.dumps(row) + "\n")
            file.flush()
    if retime:
        for cell in todo:
            if (known := done.get(cell.key(config))) is not None:
                if exam is None or loaded != cell.model:
                    exam, loaded = Exam.build(cell.model, config), cell.model
                known.update(times(exam, cell, config))
                with (folder / "cells.jsonl").open("a") as file:
                    file.write(json.dumps(known) + "\n")
    rows = [done[cell.key(config)] for cell in todo if cell.key(config) in done]
    (folder / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(markdown(rows, config), encoding="utf-8")
    if page is not None:
        publish(rows, config, page)
    for cell, problem in failed:
        console.print(
            f"[red]{cell.model} {cell.entry.name} {cell.ratio}: {type(problem).__name__}: {problem}"
        )
    console.print(
        f"{len(rows)} rows in {folder / 'results.json'} and {folder / 'results.md'}, {len(failed)} failed"
    )
    return len(failed)


def times(exam: Exam, cell: Cell, config: RunConfig) -> dict[str, Any]:
    """Prefill time and KV bytes as shares of the unpruned model's, timed in turn with it."""
    first = next(iter(exam.questions.values()))
    prompts = [(exam.scenes[q["image"]].image, q["text"]) for q in first[: 6 * TIMED_SCENES : 6]]
    ours, dense = Setting(cell.entry.policy, cell.ratio, cell.settings), Setting("none", None)
    timed = latencies(exam.model, exam.processor, [dense, ours], prompts, config.rounds)
    return {
        "prefill_ms": timed[ours].prefill_ms,
        "prefill_ratio": timed[ours].prefill_ms / timed[dense].prefill_ms,
        "tower_ratio": timed[ours].tower_ms / timed[dense].tower_ms,
        "kv_bytes": timed[ours].kv_bytes,
        "kv_ratio": timed[ours].kv_bytes / timed[dense].kv_bytes,
    }
