"""What the demo leaves behind: a table on the terminal, ``results.json``, ``kept.png``, and the run folder ``run``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vlm_prune import viz
from vlm_prune.eval.demo import DemoSettings
from vlm_prune.eval.runs import RunFolder
from vlm_prune.eval.runs.folder import Record, write_json
from vlm_prune.eval.runs.processes import Processes
from vlm_prune.eval.runs.run import Run, watch

Row = dict[str, Any]
"""A line of `vlm_prune.eval.runs.table.joined`."""

COLUMNS = {
    "policy": "{policy}",
    "kept\n%": "{percent:.3g}",
    "visual\ntokens": "{tokens:.0f}",
    "POPE\nacc": "{pope_accuracy:.3f}",
    "POPE\nF1": "{pope_f1:.3f}",
    "CHAIR\ns": "{chair_s:.3f}",
    "CHAIR\ni": "{chair_i:.3f}",
    "object\nrecall": "{chair_recall:.3f}",
    "length": "{caption_length:.1f}",
    "answer\nms": "{answer_ms:.1f}",
    "prefill\nms": "{prefill_ms:.1f}",
    "KV\nKiB": "{kib:.0f}",
}
"""Heading of each column of the table, and what stands in it."""


def cells(row: Row) -> list[str]:
    """The row's entries under `COLUMNS`."""
    return [
        form.format(**row, percent=100 * row["ratio"], kib=row["kv_bytes"] / 1024)
        for form in COLUMNS.values()
    ]


def demo(settings: DemoSettings, folder: Path, console: Console) -> list[Row]:
    """Run, show progress and table, write ``results.json``, ``kept.png`` and the run folder ``run`` to ``folder``.

    Raises:
        RuntimeError: some of it could not be measured.
    """
    kept_run = folder / "run"
    if (kept_run / "results.json").exists():
        shutil.rmtree(kept_run)  # of an earlier demo; this one must measure, not remember
    run = Run(settings.config(kept_run), Processes())
    watch(run, console)
    if run.failed:
        raise RuntimeError("\n".join(f"{name}: {problem['error']}" for name, problem in run.failed.items()))
    rows = [{**line, "ratio": 1.0 if line["ratio"] is None else line["ratio"]} for line in run.lines()]
    write_json(folder / "results.json", rows)
    picture = viz.save_kept(kept_rows(run.folder), folder / "kept.png")
    for shown in tables(rows):
        console.print(shown)
    console.print(
        f"{rows[0]['n_questions']} questions and {rows[0]['n_captions']} captions a row, procedural scenes of seed "
        f"{settings.seed}. A POPE F1 is known to about ±{uncertainty(rows):.2f} (95 %); nearer rows are a tie.\n"
        "POPE F1 and recall: higher is better; CHAIRs and CHAIRi (hallucinated objects): lower is better."
    )
    for path in (folder / "results.json", picture, kept_run):
        console.print(f"wrote {path}", soft_wrap=True)
    return rows


def uncertainty(rows: Sequence[Row]) -> float:
    """Half the widest 95 % interval of POPE's F1."""
    return max(high - low for low, high in (row["pope_f1_interval"] for row in rows)) / 2


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """The rows for a terminal of 80 columns: one table a model, a line between policies."""
    for model in dict.fromkeys(row["model"] for row in rows):
        shown = Table(title=model, box=SIMPLE_HEAD, padding=0, title_style="bold", title_justify="left")
        for heading in COLUMNS:
            shown.add_column(heading, justify="left" if heading == "policy" else "right")
        mine = [row for row in rows if row["model"] == model]
        for row, after in zip(mine, [*mine[1:], mine[-1]], strict=True):
            shown.add_row(*cells(row), end_section=row["policy"] != after["policy"])
        yield shown


def markdown(rows: Sequence[Row]) -> str:
    """Policies side by side at equal budgets, for a README: a line for each model and budget.

    Times and bytes are those of the first policy.
    """
    found = {(row["model"], row["policy"], row["ratio"]): row for row in rows}
    names = [name for name in dict.fromkeys(row["policy"] for row in rows) if name != "none"]
    figures = {"POPE F1": "pope_f1", "recall": "chair_recall", "CHAIRi": "chair_i"}
    heads = ["model", "kept", "tokens", *(f"{title} {name}" for title in figures for name in names)]
    lines = [[*heads, "tower ms", "prefill ms", "KV KiB"], ["---"] + ["---:"] * (len(heads) + 2)]
    for (model, policy, ratio), row in found.items():
        if policy != names[0] or any((model, name, ratio) not in found for name in names):
            continue
        beside = [f"{found[model, name, ratio][field]:.3f}" for field in figures.values() for name in names]
        costs = [f"{row['tower_ms']:.1f}", f"{row['prefill_ms']:.1f}", f"{row['kv_bytes'] / 1024:.0f}"]
        lines.append([model, f"{100 * ratio:.3g} %", f"{row['tokens']:.0f}", *beside, *costs])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def kept_rows(folder: RunFolder) -> list[tuple[str, list[viz.Panel]]]:
    """Panels of each model's first scene with four different objects: budgets side by side, with captions."""
    captioned = [row for row in folder.rows() if row["kind"] == "chair" and row["policy"] != "none"]
    rows: dict[str, list[viz.Panel]] = {}
    for row in captioned:
        records = folder.samples(row["cell"])
        record = next((record for record in records if len(record["label"]) == 4), records[0])
        rows.setdefault(f"{row['model']}\n{row['policy']}", []).append(panel(record, folder.image(record)))
    return list(rows.items())


def panel(record: Record, image: Image.Image) -> viz.Panel:
    """What was kept of a record's image, and its caption."""
    tiles, side = record["tiles"], 16
    rows, columns = tiles[0]["grid"]
    crops = [image.crop(tile["box"]).resize((columns * side, rows * side)) for tile in tiles]
    kept = [list(range(rows * columns)) if tile["kept"] is None else tile["kept"] for tile in tiles]
    layout = viz.tile_layout(len(tiles), *record["image"]["size"])
    return viz.Panel(
        np.stack([np.asarray(crop) for crop in crops]), kept, (rows, columns), layout, record["answer"]
    )
