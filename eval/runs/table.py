"""The rows of a run put side by side: one line a model, policy and budget, all tasks in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

Line = dict[str, Any]

NAMES = {
    "recall": "chair_recall",
    "precision": "chair_precision",
    "f1": "chair_f1",
    "length": "caption_length",
    "repetition": "caption_repetition",
}
"""What CHAIR's metrics are called in a line."""

COUNTS = {"pope": "n_questions", "chair": "n_captions"}

Task = tuple[str, str]
"""Label and kind."""

USUAL: tuple[Task, ...] = (("pope", "pope"), ("chair", "chair"), ("speed", "speed"))


def joined(rows: Sequence[Line], times: Mapping[str, Line], seed: int) -> list[Line]:
    """Lines from rows and times: model, policy, stages, budget, ratio, tokens, seed, and the metrics of all tasks.

    A metric is called ``<task>_<metric>`` (``pope_f1``), its interval ``<task>_<metric>_interval``, their number
    ``n_<task>``. Tasks without a label of their own have the usual names: ``chair_s``, ``caption_length``,
    ``n_questions``, ``n_captions``, and for speed no prefix. ``ratio`` is the budget as a share: 1 unpruned,
    ``None`` where it was given in tokens or not at all.
    """
    lines: dict[tuple[str, str, str], Line] = {}
    for row in rows:
        key = (row["model"], row["policy"], json.dumps(row["budget"]))
        line = lines.setdefault(
            key,
            {
                "model": row["model"],
                "policy": row["policy"],
                "stages": ", ".join(row["stages"]),
                "budget": row["budget"],
                "ratio": 1.0 if row["policy"] == "none" else row["budget"].get("ratio"),
                "tokens": row["tokens"],
                "seed": seed,
            },
        )
        task, kind = row["task"], row["kind"]
        for metric, value in row["metrics"].items():
            name = _name(task, kind, metric)
            line[name] = value
            if metric in row["intervals"]:
                line[f"{name}_interval"] = row["intervals"][metric]
        if kind == "speed":
            dense = row["metrics"]["kv_bytes_dense"]
            spent = {
                "kv_ratio": row["metrics"]["kv_bytes"] / dense if dense else 1.0,
                **times.get(row["cell"], {}),
            }
            line |= {_name(task, kind, name): value for name, value in spent.items()}
        else:
            line[COUNTS[kind] if task == kind in COUNTS else f"n_{task}"] = row["n"]
            if row.get("skipped"):
                line[f"skipped_{task}"] = row["skipped"]
    return list(lines.values())


def _name(task: str, kind: str, metric: str) -> str:
    if task != kind:
        return f"{task}_{metric}"
    if kind == "chair":
        return NAMES.get(metric, metric)
    return metric if kind == "speed" else f"{task}_{metric}"


def tasks_of(rows: Sequence[Line]) -> list[Task]:
    """The tasks that rows are of."""
    return list(dict.fromkeys((row["task"], row["kind"]) for row in rows))


def markdown(lines: Sequence[Line], tasks: Sequence[Task] = USUAL) -> str:
    """One table a model. Rates in per cent; prefill time and KV bytes as shares of the unpruned model's."""
    text = []
    for model, group in groupby(lines, key=lambda line: line["model"]):
        some = list(group)
        columns = {"policy": _policy, "stage": _stage, "ratio": _budget, "tokens": _tokens}
        shown = [*columns.items(), *(column for task in tasks for column in _columns(task, some))]
        text += [
            f"## {_escaped(model)}",
            "",
            "| " + " | ".join(_escaped(head) for head, _ in shown) + " |",
            "| --- | --- " + "| ---: " * (len(shown) - 2) + "|",
        ]
        text += ["| " + " | ".join(_escaped(cell(line)) for _, cell in shown) + " |" for line in some]
        counts = [count for task in tasks if (count := _count(task, some[0]))]
        if counts:
            text += [
                "",
                f"{_escaped(' and '.join(counts))} a row, seed {some[0]['seed']}; intervals by bootstrap over images.",
            ]
        text += [""]
    return "\n".join(text)


def _escaped(text: str) -> str:
    """One line that splits no row: labels may hold bars and line ends."""
    return re.sub(r"([\\|])", r"\\\1", " ".join(text.splitlines()))


def _columns(task: Task, lines: Sequence[Line]) -> list[tuple[str, Callable[[Line], str]]]:
    """Headings of a task, and what stands below them; only what some line has."""
    label, kind = task
    before = "" if label == kind else f"{label} "
    shown = {
        "pope": (
            ("POPE F1", "f1", _rate), ("95 %", "f1_interval", _interval), ("adv. acc.", "adversarial_accuracy", _rate),
        ),
        "chair": (
            ("CHAIRs", "chair_s", _rate), ("95 %", "chair_s_interval", _interval), ("CHAIRi", "chair_i", _rate),
            ("recall", "recall", _rate), ("95 %", "recall_interval", _interval),
            ("length", "length", "{:.1f}".format), ("repeats", "repetition", _rate),
        ),
        "vqa": (("accuracy", "accuracy", _rate), ("95 %", "accuracy_interval", _interval)),
        "speed": (("prefill", "prefill_ratio", "{:.2f}".format), ("KV", "kv_ratio", "{:.2f}".format)),
    }[kind]  # fmt: skip
    found = []
    for head, metric, form in shown:
        stem = metric.removesuffix("_interval")
        name = _name(label, kind, stem) + metric[len(stem) :]
        if any(name in line for line in lines):
            found.append((before + head if head != "95 %" else head, _cell(name, form)))
    return found


def _cell(name: str, form: Callable[[Any], str]) -> Callable[[Line], str]:
    return lambda line: form(line[name]) if name in line else ""


def _count(task: Task, line: Line) -> str:
    label, kind = task
    what = {"pope": "questions", "chair": "captions", "vqa": "questions"}.get(kind)
    count = line.get(COUNTS.get(kind, "") if label == kind and kind in COUNTS else f"n_{label}")
    if what is None or count is None:
        return ""
    splits = [
        name.split("_")[1] for name in line if re.fullmatch(rf"{re.escape(label)}_[^_]+_accuracy", name)
    ]
    skipped = [f"{line[f'skipped_{label}']} skipped"] if f"skipped_{label}" in line else []
    notes = ", ".join([*splits, *skipped])
    return f"{count} {what}" + (f" ({notes})" if notes else "")


def _policy(line: Line) -> str:
    return str(line["policy"])


def _stage(line: Line) -> str:
    return str(line["stages"])


def _budget(line: Line) -> str:
    budget = line.get("budget", {})
    of = " per image" if budget.get("per") == "image" else ""
    if tokens := budget.get("tokens"):
        return f"{tokens} tokens{of}"
    return "" if line["ratio"] is None else f"{line['ratio']:.4g}{of}"


def _tokens(line: Line) -> str:
    return f"{line['tokens']:.0f}"


def _rate(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(pair: Sequence[float]) -> str:
    return f"{100 * pair[0]:.0f}-{100 * pair[1]:.0f}"


def publish(lines: Sequence[Line], page: Path, tasks: Sequence[Task] = USUAL) -> None:
    """Put the tables between ``<!-- results -->`` and ``<!-- end -->`` of a page, and the lines beside it as JSON.

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
        head + begin + "\n" + markdown(lines, tasks) + "\n" + end + tail.split(end, 1)[1], encoding="utf-8"
    )
    page.with_suffix(".json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
