"""What a run folder says, as the report shows it: an entry for each model, policy and budget, tasks side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_prune.contract.stages import Stages
from vlm_prune.eval.records import read_json
from vlm_prune.eval.report.looks import Look, looks
from vlm_prune.eval.runs.folder import Record, RunFolder
from vlm_prune.eval.runs.standings import key_of

TIME, KV = "prefill_ms", "kv_bytes"


@dataclass(frozen=True)
class Measure:
    """A column of figures.

    Attributes:
        key: its place in `Entry.values`: ``<task>/<metric>``, or the name of a cost.
        task: what it belongs to; ``""`` for costs.
        title: heading.
        better: "higher", "lower", or "" where neither is.
        digits: after the decimal point.
        scale: factor from the stored value to the shown one.
        unit: of the shown value.
    """

    key: str
    task: str
    title: str
    better: str = "higher"
    digits: int = 3
    scale: float = 1.0
    unit: str = ""

    @property
    def metric(self) -> str:
        """Its name without the task."""
        return self.key.rpartition("/")[2]

    def shown(self, value: float) -> str:
        """The figure as text, without its unit."""
        return f"{value * self.scale:,.{self.digits}f}"


METRICS: dict[str, dict[str, tuple[str, str, int]]] = {
    "pope": {
        "accuracy": ("accuracy", "higher", 3),
        "f1": ("F1", "higher", 3),
        "yes_ratio": ("yes ratio", "", 3),
    },
    "chair": {
        "f1": ("object F1", "higher", 3),
        "recall": ("recall", "higher", 3),
        "chair_s": ("CHAIRs", "lower", 3),
        "chair_i": ("CHAIRi", "lower", 3),
        "length": ("length", "", 1),
    },
    "vqa": {"accuracy": ("accuracy", "higher", 3)},
    "amber_g": {
        "chair": ("CHAIR", "lower", 3),
        "cover": ("cover", "higher", 3),
        "hal": ("hal", "lower", 3),
        "cog": ("cog", "lower", 3),
    },
    "amber_d": {"accuracy": ("accuracy", "higher", 3), "f1": ("F1 of no", "higher", 3)},
    "judged": {"rating": ("rating", "higher", 2), "bad": ("bad answers", "lower", 3)},
    "choice": {"accuracy": ("accuracy", "higher", 3), "answers": ("right answers", "higher", 3)},
    "mme": {
        "accuracy": ("accuracy", "higher", 3),
        "perception": ("perception", "higher", 0),
        "cognition": ("cognition", "higher", 0),
    },
}
"""By kind of task, metric -> (heading, better, digits). The first one is drawn."""

COSTS = (
    Measure(TIME, "", "prefill", "lower", 1, 1.0, "ms"),
    Measure("prefill_ratio", "", "of unpruned", "lower", 2),
    Measure(KV, "", "KV cache", "lower", 2, 2**-20, "MiB"),
)


@dataclass(frozen=True)
class Entry:
    """A model under a policy at a budget.

    Attributes:
        number: its place in the report.
        tokens: visual tokens that entered the language model, mean per sample; ``dense`` without pruning.
        values: figures by `Measure.key`; what was not measured is missing.
        intervals: 95 % intervals of some of them.
        cells: task -> folder of the cell; ``samples`` how many it has.
        warnings: what the scoring had to say, by task.
        key: model, policy and budget as `standings.key_of` has them.
    """

    number: int
    model: str
    policy: str
    budget: str
    acts: Stages
    tokens: float
    dense: float
    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    cells: dict[str, str] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)

    key: tuple[str, str, str] = ("", "", "")

    @property
    def unpruned(self) -> bool:
        """Whether it answers as the stock model does: every token kept, nothing edited."""
        return self.tokens == self.dense and not self.acts.inside

    @property
    def has_budget(self) -> bool:
        """Whether it was told how much to keep."""
        return self.budget != budget_text({})

    @property
    def name(self) -> str:
        """The policy with its budget, if it has one."""
        return f"{self.policy} {self.budget}" if self.has_budget else self.policy

    @property
    def inside(self) -> bool:
        """Whether tokens are dropped inside the language model, where `tokens` does not show it."""
        return self.acts.cuts or self.acts.evicts


@dataclass(frozen=True)
class Results:
    """All of a run.

    Attributes:
        tasks: name -> kind, those with answers to score.
        measures: columns that some entry has, tasks first.
        failed: cells that did not finish, as ``failed.json`` tells.
        rows: of the finished cells, as ``results.json`` has them.
    """

    entries: list[Entry]
    tasks: dict[str, str]
    measures: list[Measure]
    failed: list[Record]
    rows: list[Record]

    @property
    def looks(self) -> dict[str, Look]:
        """How each policy is drawn."""
        return looks(self.policies)

    def side_name(self, model: str, side: tuple[str, str]) -> str:
        """A policy and its budget, as `standings` knows them, in words."""
        entry = next(entry for entry in self.entries if entry.key == (model, *side))
        return entry.name

    @property
    def models(self) -> list[str]:
        """In the order of the run."""
        return list(dict.fromkeys(entry.model for entry in self.entries))

    @property
    def policies(self) -> list[str]:
        """In the order of the run."""
        return list(dict.fromkeys(entry.policy for entry in self.entries))

    def drawn(self, task: str) -> Measure | None:
        """The measure that stands for a task in figures."""
        return next((measure for measure in self.measures if measure.task == task), None)


def budget_text(budget: dict[str, Any]) -> str:
    """A budget as people write it: "25 %", "64 tokens", "64 tokens per image", or a dash if there is none."""
    share = f"{100 * budget['ratio']:.3g} %" if "ratio" in budget else ""
    count = f"{budget['tokens']} tokens" if "tokens" in budget else ""
    per = f"per {budget['per']}" if "per" in budget else ""
    return " ".join(filter(None, (share, count, per))) or "–"  # noqa: RUF001


def read_results(folder: RunFolder) -> Results:
    """Join the cells of a run folder.

    Raises:
        ValueError: the folder holds no finished cell.
    """
    rows = folder.rows()
    times = folder.times() if (folder.path / "times.json").exists() else {}
    if not rows:
        raise ValueError(
            f"{folder.path} holds no finished cell yet: run it first, `vlm-prune run config.yaml`."
        )
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["policy"], budget_text(row["budget"])), []).append(row)
    entries = [_entry(number, key, group, times) for number, (key, group) in enumerate(groups.items())]
    tasks = {row["task"]: row["kind"] for row in rows if row["kind"] in METRICS}
    measures = [
        Measure(f"{task}/{name}", task, title, better, digits)
        for task, kind in tasks.items()
        for name, (title, better, digits) in METRICS[kind].items()
    ]
    known = {key for entry in entries for key in entry.values}
    return Results(
        entries,
        tasks,
        [m for m in (*measures, *COSTS) if m.key in known],
        _failures(folder.path / "failed.json"),
        rows,
    )


def _failures(path: Path) -> list[Record]:
    return read_json(path) if path.exists() else []


def _entry(number: int, key: tuple[str, str, str], rows: Sequence[Record], times: dict[str, Record]) -> Entry:
    scored = [row for row in rows if row["kind"] in METRICS]
    first = (scored or rows)[0]
    entry = Entry(
        number, *key, Stages(first["stages"]), first["tokens"], first["visual_tokens"], key=key_of(first)
    )
    for row in scored:
        task = row["task"]
        entry.cells[task], entry.samples[task] = row["cell"], row["n"]
        entry.values.update({f"{task}/{name}": value for name, value in row["metrics"].items()})
        entry.intervals.update({f"{task}/{name}": tuple(pair) for name, pair in row["intervals"].items()})
        if notes := list(row["warnings"]) + [f"{name} has nothing to divide by" for name in row["undefined"]]:
            entry.warnings[task] = notes
    for row in rows:
        if row["kind"] == "speed":
            entry.values.update({name: row["metrics"][name] for name in (KV,) if name in row["metrics"]})
            entry.values.update(times.get(row["cell"], {}))
    return entry
