"""The rows of a run as a table: one line per model, policy and budget, with all tasks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, cast

from vlm_prune.eval.paired import LEVEL
from vlm_prune.eval.runs.standings import JUDGED, Standings, key_of

Line = dict[str, Any]

NAMES = {
    "recall": "chair_recall",
    "precision": "chair_precision",
    "f1": "chair_f1",
    "length": "caption_length",
    "repetition": "caption_repetition",
}
"""Names of CHAIR's metrics in a line."""

COUNTS = {"pope": "n_questions", "chair": "n_captions"}

WHAT = {
    "speed": None,
    "chair": "captions",
    "amber_g": "descriptions",
    "choice": "answers",
    "judged": "answers",
}
"""Names for the samples of a kind of task, if not questions."""

VERDICTS: tuple[Literal["beats", "ties", "loses"], ...] = ("beats", "ties", "loses")
JUDGED_HOW = (
    "Beats / ties / loses: against each other policy at the same budget, and the unpruned model, on the same samples "
    f"(McNemar's exact test where a sample is right or wrong, else a paired bootstrap over images), at {LEVEL:.0%} "
    "after Holm's correction over all pairs of the model, task and budget."
)

Task = tuple[str, str]
"""Label and kind."""

USUAL: tuple[Task, ...] = (("pope", "pope"), ("chair", "chair"), ("speed", "speed"))


def joined(
    rows: Sequence[Line], times: Mapping[str, Line], seed: int, judged: Standings | None = None
) -> list[Line]:
    """Lines from rows and times: model, policy, stages, budget, ratio, tokens, seed, and the metrics of all tasks.

    A metric is called ``<task>_<metric>`` (``pope_f1``), its interval ``<task>_<metric>_interval``, their number
    ``n_<task>``. Tasks without a label of their own have the usual names: ``chair_s``, ``caption_length``,
    ``n_questions``, ``n_captions``, and for speed no prefix. ``ratio`` is the budget as a share: 1 unpruned,
    ``None`` where it was given in tokens or not at all. Of ``judged``, ``<task>_<metric>_standing`` counts how often
    a policy beats, ties and loses, ``<task>_<metric>_to_unpruned`` is its verdict over the unpruned model, and
    ``same_as`` names the policy that answers and keeps the same.
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
            if judged is not None:
                line |= _standing(row, judged)
    return list(lines.values())


def _standing(row: Line, judged: Standings) -> Line:
    """How a row's policy compares with the others."""
    model, *side = key_of(row)
    found: Line = {}
    for figure in JUDGED[row["kind"]]:
        name = _name(row["task"], row["kind"], figure.name)
        met = judged.met(model, row["task"], figure.name, (side[0], side[1]))
        if met:
            said = list(met.values())
            found[f"{name}_standing"] = {word: said.count(word) for word in VERDICTS}
        if (
            to_stock := next((said for other, said in met.items() if other in judged.stock), None)
        ) is not None:
            found[f"{name}_to_unpruned"] = to_stock
    if (twin := judged.idle.get(key_of(row))) is not None:
        found["same_as"] = {"policy": twin[0], "budget": json.loads(twin[1])}
    return found


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
        if any(name.endswith("_standing") for line in some for name in line):
            text += ["", JUDGED_HOW]
        if idle := [line for line in some if "same_as" in line]:
            text += ["", "Did not act, or not differently: the same answers and kept tokens.", ""]
            text += [f"- {_escaped(_full(line))} as {_escaped(_full(line['same_as']))}" for line in idle]
        text += [""]
    return "\n".join(text)


def _escaped(text: str) -> str:
    """Text that does not break a table row: labels may contain bars and line breaks."""
    return re.sub(r"([\\|])", r"\\\1", " ".join(text.splitlines()))


def _columns(task: Task, lines: Sequence[Line]) -> list[tuple[str, Callable[[Line], str]]]:
    """Headings of a task's columns and their cells; only columns that some line fills."""
    label, kind = task
    before = "" if label == kind else f"{label} "
    shown = {
        "pope": (
            ("POPE F1", "f1", _rate), ("95 %", "f1_interval", _interval), ("adv. acc.", "adversarial_accuracy", _rate),
            *_verdicts("accuracy", "accuracy"),
        ),
        "chair": (
            ("CHAIRs", "chair_s", _rate), ("95 %", "chair_s_interval", _interval), ("CHAIRi", "chair_i", _rate),
            ("recall", "recall", _rate), ("95 %", "recall_interval", _interval),
            ("length", "length", "{:.1f}".format), ("repeats", "repetition", _rate),
            *_verdicts("f1", "object F1"),
        ),
        "vqa": (
            ("accuracy", "accuracy", _rate), ("95 %", "accuracy_interval", _interval),
            *_verdicts("accuracy", "accuracy"),
        ),
        "amber_g": (
            ("CHAIR", "chair", _rate), ("95 %", "chair_interval", _interval), ("cover", "cover", _rate),
            ("95 %", "cover_interval", _interval), ("hal", "hal", _rate), ("cog", "cog", _rate),
            *_verdicts("chair", "CHAIR"), *_verdicts("cover", "cover"),
        ),
        "amber_d": (
            ("accuracy", "accuracy", _rate), ("95 %", "accuracy_interval", _interval), ("F1 of no", "f1", _rate),
            *_verdicts("accuracy", "accuracy"),
        ),
        "choice": (
            ("accuracy", "accuracy", _rate), ("95 %", "accuracy_interval", _interval), ("answers", "answers", _rate),
            *_verdicts("answers", "answers"),
        ),
        "judged": (
            ("rating", "rating", "{:.2f}".format), ("bad", "bad", _rate), ("95 %", "bad_interval", _interval),
            *_verdicts("rating", "rating"),
        ),
        "mme": (
            ("perception", "perception", "{:.0f}".format), ("cognition", "cognition", "{:.0f}".format),
            ("accuracy", "accuracy", _rate), ("95 %", "accuracy_interval", _interval),
            *_verdicts("accuracy", "accuracy"),
        ),
        "speed": (("prefill", "prefill_ratio", "{:.2f}".format), ("KV", "kv_ratio", "{:.2f}".format)),
    }[kind]  # fmt: skip
    found = []
    for head, metric, form in shown:
        stem = re.sub("_(interval|standing|to_unpruned)$", "", metric)
        name = _name(label, kind, stem) + metric[len(stem) :]
        if any(name in line for line in lines):
            found.append(
                (before + head if head != "95 %" else head, _cell(name, cast(Callable[[Any], str], form)))
            )
    return found


def _verdicts(metric: str, title: str) -> tuple[tuple[str, str, Callable[[Any], str]], ...]:
    """Columns of a metric's standing."""
    return (
        (
            f"{title}: beats / ties / loses",
            f"{metric}_standing",
            lambda said: " / ".join(map(str, said.values())),
        ),
        ("to unpruned", f"{metric}_to_unpruned", str),
    )


def _cell(name: str, form: Callable[[Any], str]) -> Callable[[Line], str]:
    return lambda line: form(line[name]) if name in line else ""


def _count(task: Task, line: Line) -> str:
    label, kind = task
    what = WHAT.get(kind, "questions")
    count = line.get(COUNTS.get(kind, "") if label == kind and kind in COUNTS else f"n_{label}")
    if what is None or count is None:
        return ""
    splits = [
        name.split("_")[1] for name in line if re.fullmatch(rf"{re.escape(label)}_[^_]+_accuracy", name)
    ]
    skipped = [f"{line[f'skipped_{label}']} skipped"] if f"skipped_{label}" in line else []
    notes = ", ".join([*splits, *skipped])
    return f"{count} {what}" + (f" ({notes})" if notes else "")


def _full(line: Line) -> str:
    budget = _budget({"ratio": line["budget"].get("ratio"), **line})
    return " ".join(filter(None, (line["policy"], "" if line["policy"] == "none" else budget)))


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
