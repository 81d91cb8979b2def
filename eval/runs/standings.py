"""Policies of a run compared on the same samples: which beats, ties with or loses to which, and which did not act.

Policies are compared at equal model, task and budget, and each with the unpruned model; `holm` corrects over all pairs
of one such family. Everything is read from the records, so any run folder can be compared again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import combinations

import numpy as np

from vlm_prune.contract.stages import Stages
from vlm_prune.eval.paired import (
    DRAWS,
    Floats,
    Verdict,
    difference,
    holm,
    mcnemar,
    ratio,
    ratio_draws,
    twins,
    verdict,
)
from vlm_prune.eval.runs.folder import Record, RunFolder, count_lines

Key = tuple[str, str, str]
"""Model, policy, and budget as JSON: the key of a line of the results."""

Side = tuple[str, str]
"""Policy, and budget as JSON: one of a pair."""


@dataclass(frozen=True)
class Judged:
    """A figure that policies are compared by: a ratio of sums over samples.

    Attributes:
        name: of the metric in a row.
        title: its name in tables.
        better: 1 if more of it is better, otherwise -1.
        counts: returns numerator and denominator of a record.
    """

    name: str
    title: str
    better: int
    counts: Callable[[Record], tuple[float, float]]


def _object_f1(record: Record) -> tuple[float, float]:
    """2 P R / (P + R) of summed counts is twice the objects found over those mentioned and those there."""
    mentions = record["scores"]["mentions"]
    said = {m["object"] for m in mentions}
    wrong = {m["object"] for m in mentions if m["hallucinated"]}
    return 2.0 * len(said - wrong), float(len(said) + len(set(record["label"])))


def _hallucinates(record: Record) -> tuple[float, float]:
    return float(any(m["hallucinated"] for m in record["scores"]["mentions"])), 1.0


def _correct(record: Record) -> tuple[float, float]:
    return float(record["scores"]["correct"]), 1.0


JUDGED: dict[str, tuple[Judged, ...]] = {
    "pope": (Judged("accuracy", "accuracy", 1, _correct),),
    "chair": (Judged("f1", "object F1", 1, _object_f1), Judged("chair_s", "CHAIRs", -1, _hallucinates)),
    "vqa": (Judged("accuracy", "accuracy", 1, lambda r: (float(r["scores"]["accuracy"]), 1.0)),),
    "amber_g": (
        Judged(
            "chair",
            "CHAIR",
            -1,
            lambda r: (float(len(r["scores"]["hallucinated"])), float(len(r["scores"]["nouns"]))),
        ),
        Judged(
            "cover",
            "cover",
            1,
            lambda r: (float(len(r["scores"]["covered"])), float(len(set(r["label"]["truth"])))),
        ),
    ),
    "amber_d": (Judged("accuracy", "accuracy", 1, _correct),),
    "judged": (
        Judged("rating", "rating", 1, lambda r: (r["scores"]["rating"], 1.0)),
        Judged("bad", "bad answers", -1, lambda r: (float(r["scores"]["rating"] < r["scores"]["good"]), 1.0)),
    ),
    # answers to one question are not independent: its image is drawn as a whole
    "choice": (
        Judged(
            "answers",
            "right answers",
            1,
            lambda r: (r["scores"]["correct"] / r["scores"]["orders"], 1 / r["scores"]["orders"]),
        ),
    ),
    "mme": (Judged("accuracy", "accuracy", 1, _correct),),
}
"""By kind of task."""

TURNED: dict[str, Verdict] = {"beats": "loses", "ties": "ties", "loses": "beats"}
"""The verdict from the other side."""


@dataclass(frozen=True)
class Pair:
    """Two policies on one task.

    Attributes:
        first: policy and budget as JSON; ``second`` alike.
        wins: samples on which the first is better; ``losses`` where the second is.
        value: the first's figure minus the second's, with its 95 % interval ``low`` to ``high``.
        test: "McNemar" if each sample is right or wrong, otherwise "bootstrap".
        p: of no difference; ``adjusted`` by Holm over the family.
        verdict: "beats", "ties" or "loses", of the first.
    """

    model: str
    task: str
    metric: str
    first: Side
    second: Side
    n: int
    wins: int
    losses: int
    value: float
    low: float
    high: float
    test: str
    p: float
    adjusted: float
    verdict: Verdict


@dataclass(frozen=True)
class Standings:
    """All pairs of a run.

    Attributes:
        idle: (model, policy, budget) -> the policy and budget with the same answers and kept tokens, of those that
            do not act or act alike.
        stock: policy and budget of unpruned models.
    """

    pairs: list[Pair] = field(default_factory=list)
    idle: dict[Key, Side] = field(default_factory=dict)
    stock: set[Side] = field(default_factory=set)

    def met(self, model: str, task: str, metric: str, side: Side) -> dict[Side, Verdict]:
        """The opponents of a policy at a budget, with its verdict on each."""
        found: dict[Side, Verdict] = {}
        for pair in self.pairs:
            if (pair.model, pair.task, pair.metric) == (model, task, metric):
                if side == pair.first:
                    found[pair.second] = pair.verdict
                elif side == pair.second:
                    found[pair.first] = TURNED[pair.verdict]
        return found

    def records(self) -> list[Record]:
        """The pairs as JSON objects, for ``paired.json``."""
        return [
            asdict(pair) | {"first": _named(pair.first), "second": _named(pair.second)} for pair in self.pairs
        ]


def _named(side: Side) -> Record:
    return {"policy": side[0], "budget": json.loads(side[1])}


def key_of(row: Record) -> Key:
    """What a row is of."""
    return row["model"], row["policy"], json.dumps(row["budget"])


def is_unpruned(row: Record) -> bool:
    """Whether it answers as the stock model does: no budget, every token kept, nothing edited."""
    return not row["budget"] and row["tokens"] == row["visual_tokens"] and not Stages(row["stages"]).inside


def standings(folder: RunFolder, rows: Sequence[Record]) -> Standings:
    """Compare the finished cells of a run; cells with damaged or different samples are left out."""
    there = [row for row in rows if row["kind"] in JUDGED and _whole(folder, row)]
    # the gate names the first that is equal: the unpruned model, if it is that
    scored = sorted(there, key=lambda row: not is_unpruned(row))
    pairs: list[Pair] = []
    behaviour: dict[str, dict[Key, list[Side]]] = {}
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in scored):
        mine = [Played.read(folder, r) for r in scored if (r["model"], r["task"]) == (model, task)]
        played = [one for one in mine if one.ids == mine[0].ids]
        for one in played:
            behaviour.setdefault(model, {}).setdefault(one.key, []).append((task, one.shown))
        for members in families(played):
            pairs += judge(model, task, members)
    idle: dict[Key, Side] = {}
    for shown in behaviour.values():
        found = twins({key: tuple(told) for key, told in shown.items()})
        idle |= {key: other[1:] for key, other in found.items()}
    return Standings(pairs, idle, {key_of(row)[1:] for row in scored if is_unpruned(row)})


def _whole(folder: RunFolder, row: Record) -> bool:
    path = folder.cell(row["cell"]) / "samples.jsonl"
    return path.exists() and count_lines(path) == row["n"]


@dataclass(frozen=True)
class Played:
    """What is needed of a cell's records to compare it.

    Attributes:
        ids: of the samples.
        counts: metric -> ``(samples, 2)``.
        images: per sample, the number of its image.
        shown: a digest of all answers and kept tokens.
    """

    row: Record
    key: Key
    ids: list[str]
    counts: dict[str, Floats]
    images: Floats
    shown: str

    @classmethod
    def read(cls, folder: RunFolder, row: Record) -> Played:
        """From the samples of a cell."""
        records = folder.samples(row["cell"])
        numbers: dict[str, int] = {}
        return cls(
            row,
            key_of(row),
            [record["id"] for record in records],
            {j.name: np.array([j.counts(r) for r in records], float) for j in JUDGED[row["kind"]]},
            np.array([numbers.setdefault(r["image"]["path"], len(numbers)) for r in records]),
            _digest(records),
        )

    @property
    def side(self) -> Side:
        """Policy and budget."""
        return self.key[1:]

    def by_image(self, metric: str) -> Floats:
        """``(images, 2)``: counts summed over the samples of each image, which are not independent."""
        counts = self.counts[metric]
        return np.stack([np.bincount(self.images, counts[:, i]) for i in range(2)], -1)


def _digest(records: Sequence[Record]) -> str:
    shown = sha256()
    for record in records:
        kept = [[_all(tile["kept"], tile), _all(tile.get("last"), tile)] for tile in record["tiles"]]
        shown.update(json.dumps([record["answer"], record["tokens"], kept]).encode())
    return shown.hexdigest()


def _all(units: Sequence[int] | None, tile: Record) -> Sequence[int] | None:
    """A set of units, ``None`` if it is all of them, so that both ways to write that are equal."""
    return None if units is None or len(units) == tile["grid"][0] * tile["grid"][1] else units


def families(played: Sequence[Played]) -> list[list[Played]]:
    """The cells of a task that are compared: those of equal budget, always with the unpruned model."""
    stock = [one for one in played if is_unpruned(one.row)][:1]
    budgets = dict.fromkeys(one.key[2] for one in played)
    found = [
        stock + [one for one in played if one.key[2] == budget and one not in stock] for budget in budgets
    ]
    return [family for family in found if len(family) > 1]


def judge(model: str, task: str, members: Sequence[Played]) -> list[Pair]:
    """All pairs among cells of one task with the same samples, as one family."""
    pairs: list[Pair] = []
    couples = list(combinations(range(len(members)), 2))
    draws = max(
        DRAWS, 80 * len(couples)
    )  # so that the smallest p-value is small enough after Holm's correction
    for judged in JUDGED[members[0].row["kind"]]:
        counts = [one.counts[judged.name] for one in members]
        images = np.stack([one.by_image(judged.name) for one in members])
        drawn, values = ratio_draws(images, draws), ratio(images)
        binary = all(set(np.unique(c[:, 0])) <= {0.0, 1.0} and (c[:, 1] == 1).all() for c in counts)
        found = []
        for a, b in couples:
            moved = int((images[a] != images[b]).any(-1).sum())
            gap = difference(float(values[a] - values[b]), drawn[a], drawn[b], moved)
            ahead = judged.better * (_rate(counts[a]) - _rate(counts[b]))
            wins, losses = int((ahead > 0).sum()), int((ahead < 0).sum())
            found.append((a, b, gap, wins, losses, mcnemar(wins, losses) if binary else gap.p))
        for (a, b, gap, wins, losses, p), adjusted in zip(found, holm([f[-1] for f in found]), strict=True):
            pairs.append(
                Pair(
                    model=model, task=task, metric=judged.name, first=members[a].side, second=members[b].side,
                    n=len(counts[a]), wins=wins, losses=losses, value=gap.value, low=gap.low, high=gap.high,
                    test="McNemar" if binary else "bootstrap", p=p, adjusted=adjusted,
                    verdict=verdict(judged.better * gap.value, adjusted),
                )
            )  # fmt: skip
    return pairs


def _rate(counts: Floats) -> Floats:
    part, whole = counts.T
    found: Floats = np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)
    return found
