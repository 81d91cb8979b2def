"""What the demo leaves behind: a table on the terminal, ``results.json`` and ``kept.png``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vlm_prune import pruned, viz
from vlm_prune.eval.demo import CAPTION_TOKENS, DemoRow, DemoSettings, Stage, run
from vlm_prune.eval.measure import Setting, answer, prompt_text, receipt_of

COLUMNS = {
    "policy": "{row.policy}",
    "kept\n%": "{percent:.3g}",
    "visual\ntokens": "{row.tokens:.0f}",
    "POPE\nacc": "{row.pope_accuracy:.3f}",
    "POPE\nF1": "{row.pope_f1:.3f}",
    "CHAIR\ns": "{row.chair_s:.3f}",
    "CHAIR\ni": "{row.chair_i:.3f}",
    "object\nrecall": "{row.chair_recall:.3f}",
    "length": "{row.caption_length:.1f}",
    "answer\nms": "{row.answer_ms:.1f}",
    "prefill\nms": "{row.prefill_ms:.1f}",
    "KV\nKiB": "{kib:.0f}",
}
"""Heading of each column of the table, and what stands in it."""


def cells(row: DemoRow) -> list[str]:
    """The row's entries under `COLUMNS`."""
    return [
        form.format(row=row, percent=100 * row.ratio, kib=row.kv_bytes / 1024) for form in COLUMNS.values()
    ]


def demo(settings: DemoSettings, folder: Path, console: Console) -> list[DemoRow]:
    """Run, show progress and table, write ``results.json`` and ``kept.png`` to ``folder``."""
    rows: list[DemoRow] = []
    bar = Progress(
        TextColumn("{task.description:<32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("loading", total=settings.prompts)
        for row in run(settings, lambda what, done: bar.update(task, description=what, advance=done)):
            rows.append(row)
            write_results(rows, folder / "results.json")
        bar.update(task, description="drawing kept patches")
        picture = viz.save_kept(kept_rows(settings), folder / "kept.png")
    for shown in tables(rows):
        console.print(shown)
    console.print(
        f"{rows[0].n_questions} questions and {rows[0].n_captions} captions a row, procedural scenes of seed "
        f"{settings.seed}. A POPE F1 is known to about ±{uncertainty(rows):.2f} (95 %); nearer rows are a tie.\n"
        "POPE F1 and recall: higher is better; CHAIRs and CHAIRi (hallucinated objects): lower is better."
    )
    for path in (folder / "results.json", picture):
        console.print(f"wrote {path}", soft_wrap=True)
    return rows


def uncertainty(rows: Sequence[DemoRow]) -> float:
    """Half the widest 95 % interval of POPE's F1."""
    return max(high - low for low, high in (row.pope_f1_interval for row in rows)) / 2


def write_results(rows: Sequence[DemoRow], path: Path) -> None:
    """A list with one JSON object a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def tables(rows: Sequence[DemoRow]) -> Iterator[Table]:
    """The rows for a terminal of 80 columns: one table a model, a line between policies."""
    for model in dict.fromkeys(row.model for row in rows):
        shown = Table(title=model, box=SIMPLE_HEAD, padding=0, title_style="bold", title_justify="left")
        for heading in COLUMNS:
            shown.add_column(heading, justify="left" if heading == "policy" else "right")
        mine = [row for row in rows if row.model == model]
        for row, after in zip(mine, [*mine[1:], mine[-1]], strict=True):
            shown.add_row(*cells(row), end_section=row.policy != after.policy)
        yield shown


def markdown(rows: Sequence[DemoRow]) -> str:
    """Policies side by side at equal budgets, for a README: a line for each model and budget.

    Times and bytes are those of the first policy.
    """
    found = {(row.model, row.policy, row.ratio): row for row in rows}
    names = [name for name in dict.fromkeys(row.policy for row in rows) if name != "none"]
    figures = {"POPE F1": "pope_f1", "recall": "chair_recall", "CHAIRi": "chair_i"}
    heads = ["model", "kept", "tokens", *(f"{title} {name}" for title in figures for name in names)]
    lines = [[*heads, "tower ms", "prefill ms", "KV KiB"], ["---"] + ["---:"] * (len(heads) + 2)]
    for (model, policy, ratio), row in found.items():
        if policy != names[0] or any((model, name, ratio) not in found for name in names):
            continue
        beside = [
            f"{getattr(found[model, name, ratio], field):.3f}" for field in figures.values() for name in names
        ]
        costs = [f"{row.tower_ms:.1f}", f"{row.prefill_ms:.1f}", f"{row.kv_bytes / 1024:.0f}"]
        lines.append([model, f"{100 * ratio:.3g} %", f"{row.tokens:.0f}", *beside, *costs])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def kept_rows(settings: DemoSettings) -> list[tuple[str, list[viz.Panel]]]:
    """Panels of each model's first scene with four different objects: budgets side by side, with captions."""
    rows = []
    for name in settings.models:
        stage = Stage.build(name, settings)
        number = next((i for i, s in enumerate(stage.scenes) if len(s.objects) == len(s.names) == 4), 0)
        for policy in dict.fromkeys(cell.policy for cell in settings.cells() if cell.policy != "none"):
            mine = [cell for cell in settings.cells() if cell.policy == policy]
            rows.append((f"{name}\n{policy}", [kept_panel(stage, number, cell) for cell in mine]))
    return rows


def kept_panel(stage: Stage, number: int, cell: Setting) -> viz.Panel:
    """Scene ``number`` under one policy and budget."""
    processor = stage.processor
    image, question = stage.described[number]
    with pruned(stage.model, cell.policy, **cell.options):
        caption = answer(stage.model, processor, [(image, question)], CAPTION_TOKENS).texts[0]
        receipt = receipt_of(stage.model)
    inputs = processor(images=[image], text=[prompt_text(processor, question)], return_tensors="pt")
    return viz.Panel.from_receipt(receipt, inputs, processor.image_processor, image.size, caption)
