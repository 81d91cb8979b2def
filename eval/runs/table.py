"""The rows of a run as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from vlm_prune.eval.runs.config import RunConfig

HEAD = [
    "policy", "stage", "ratio", "tokens", "POPE F1", "95 %", "adv. acc.", "CHAIRs", "95 %", "CHAIRi", "recall",
    "95 %", "length", "repeats", "prefill", "KV",
]  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]], config: RunConfig) -> str:
    """One table a model. Rates in per cent; prefill time and KV bytes as shares of the unpruned model's."""
    lines = []
    for model, group in groupby(rows, key=lambda row: row["model"]):
        some = list(group)
        lines += [
            f"## {model}",
            "",
            "| " + " | ".join(HEAD) + " |",
            "| --- | --- " + "| ---: " * (len(HEAD) - 2) + "|",
        ]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in some]
        asked = f"{some[0]['n_questions']} questions ({', '.join(config.splits)})"
        note = f"{asked} and {some[0]['n_captions']} captions a row, seed {config.seed}; intervals by bootstrap over"
        lines += ["", f"{note} scenes.", ""]
    return "\n".join(lines)


def publish(rows: Sequence[dict[str, Any]], config: RunConfig, page: Path) -> None:
    """Put the tables between ``<!-- results -->`` and ``<!-- end -->`` of a page, and the rows beside it as JSON.

    Raises:
        ValueError: the page has no such markers.
    """
    begin, end = "<!-- results -->\n", "<!-- end -->"
    text = page.read_text(encoding="utf-8")
    if begin not in text or end not in text.split(begin, 1)[1]:
        raise ValueError(
            f"{page}: there is no place for the tables: write {begin.strip()} and {end} on lines of their own."
        )
    head, tail = text.split(begin, 1)
    page.write_text(
        head + begin + "\n" + markdown(rows, config) + "\n" + end + tail.split(end, 1)[1], encoding="utf-8"
    )
    page.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _cells(row: dict[str, Any]) -> list[str]:
    accuracy = row.get("pope_adversarial_accuracy")
    return [
        row["policy"],
        row["stages"],
        "" if row["ratio"] is None else f"{row['ratio']:.4g}",
        f"{row['tokens']:.0f}",
        _rate(row["pope_f1"]),
        _interval(row["pope_f1_interval"]),
        "" if accuracy is None else _rate(accuracy),
        _rate(row["chair_s"]),
        _interval(row["chair_s_interval"]),
        _rate(row["chair_i"]),
        _rate(row["caption_recall"]),
        _interval(row["recall_interval"]),
        f"{row['caption_length']:.1f}",
        _rate(row["caption_repetition"]),
        f"{row['prefill_ratio']:.2f}",
        f"{row['kv_ratio']:.2f}",
    ]


def _rate(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(pair: Sequence[float]) -> str:
    return f"{100 * pair[0]:.0f}-{100 * pair[1]:.0f}"
