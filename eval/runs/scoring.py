"""From answers to scores, of each record and of a cell. Everything is computed from records, without the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlm_prune.eval.amber import (
    AmberResult,
    Words,
    nltk_nouns,
    read_description,
    read_words,
    read_yes_no,
    score_descriptions,
    score_questions,
)
from vlm_prune.eval.chair import CaptionReader, score_captions
from vlm_prune.eval.choice import circular_accuracy, read_choice
from vlm_prune.eval.mme import mme_scores, read_answer
from vlm_prune.eval.pope import RATES, mean_rates, parse_answer, score_pope
from vlm_prune.eval.runs.folder import Record
from vlm_prune.eval.runs.samples import caption_reader
from vlm_prune.eval.runs.tasks import (
    AmberGenerativeTask,
    AmberQuestionsTask,
    ChairTask,
    ChoiceTask,
    JudgedTask,
    MmeTask,
    PopeTask,
    SpeedTask,
    Task,
    VqaTask,
)
from vlm_prune.eval.tiny.metrics import bootstrap
from vlm_prune.eval.vqa import METRICS, normalised
from vlm_prune.registry import load_entry

WORDS = {True: "yes", False: "no", None: None}
SPEED = ("kv_bytes", "kv_bytes_dense", "flops", "flops_dense")


class Scorer:
    """Scores the records of one task."""

    def __init__(self, task: Task):
        self.task = task
        self._reader: CaptionReader | None = caption_reader(task) if isinstance(task, ChairTask) else None
        self._words: Words | None = None
        if isinstance(task, AmberGenerativeTask):
            nouns = nltk_nouns() if task.nouns == "nltk" else None
            self._words = read_words(task.relations, task.safe, nouns)

    def judge(self, record: Record) -> Record:
        """The record with the scores of its answer."""
        task, answer, label = self.task, record["answer"], record["label"]
        scores: dict[str, Any] = record["scores"]
        if isinstance(task, PopeTask):
            said = WORDS[parse_answer(answer, task.parser)]
            scores = {"said": said, "correct": said == label}
        elif isinstance(task, ChairTask):
            scores = self._caption(answer, label)
        elif isinstance(task, VqaTask):
            plain = task.metric in ("exact", "vqa")
            read = normalised(answer) if plain else " ".join(answer.split())
            scores = {"accuracy": METRICS[task.metric](answer, label), "read": read}
        elif self._words is not None:
            found = read_description(answer, label["truth"], label["hallu"], self._words)
            scores = {
                "nouns": found.nouns,
                "hallucinated": found.hallucinated,
                "covered": sorted(found.covered),
                "imagined": sorted(found.imagined),
            }
        elif isinstance(task, AmberQuestionsTask):
            said = read_yes_no(answer, task.parser)
            scores = {"said": said, "correct": said == label.capitalize()}
        elif isinstance(task, ChoiceTask):
            said = read_choice(answer, label["options"])
            scores = {"said": said, "correct": said == label["letter"], "orders": len(label["options"])}
            scores["orders"] = scores["orders"] if task.circular else 1
        elif isinstance(task, JudgedTask):
            scores = {"rating": self._rating(task, record), "good": task.good}
        elif isinstance(task, MmeTask):
            said = read_answer(answer)
            scores = {"said": said, "correct": said == label}
        return {**record, "scores": scores}

    def _rating(self, task: JudgedTask, record: Record) -> float:
        """What the judge says.

        Raises:
            ValueError: that is not a number.
        """
        rate = load_entry(task.judge)
        rating = rate(question=record["question"], answer=record["answer"], reference=record["label"])
        if isinstance(rating, bool) or not isinstance(rating, int | float) or not math.isfinite(rating):
            raise ValueError(f"{task.judge} rated sample {record['id']} {rating!r}: a number is needed")
        return float(rating)

    def _caption(self, caption: str, objects: list[str]) -> dict[str, Any]:
        (score,) = score_captions([(0, caption)], {0: objects}, self._reader, samples=0).captions
        wrong = set(score.hallucinated)
        mentions = [
            {"word": m.word, "object": m.object, "span": list(span), "hallucinated": m in wrong}
            for m, span in zip(score.mentions, score.spans(score.mentions), strict=True)
        ]
        return {"mentions": mentions, **score.metrics()}

    def row(self, records: Sequence[Record]) -> dict[str, Any]:
        """The part of a cell's row that is computed from its records: metrics, intervals, warnings, tokens kept."""
        task = self.task
        if isinstance(task, PopeTask):
            scored = _pope(task, records)
        elif isinstance(task, ChairTask):
            scored = self._chair(records)
        elif isinstance(task, VqaTask):
            scored = _vqa(records)
        elif self._words is not None:
            scored = _amber_descriptions(records, self._words)
        elif isinstance(task, AmberQuestionsTask):
            scored = _amber_questions(records)
        elif isinstance(task, MmeTask):
            scored = _mme(records)
        elif isinstance(task, ChoiceTask):
            scored = _choice(records)
        elif isinstance(task, JudgedTask):
            scored = _judged(records)
        else:
            assert isinstance(task, SpeedTask)
            scored = {"metrics": {name: _mean(r["scores"][name] for r in records) for name in SPEED}}
        return {
            "n": len(records),
            "tokens": _mean(record["tokens"] for record in records),
            "visual_tokens": _mean(record["visual_tokens"] for record in records),
            "metrics": {},
            "intervals": {},
            "undefined": [],
            "warnings": [],
            **scored,
        }

    def _chair(self, records: Sequence[Record]) -> dict[str, Any]:
        captions = [(record["id"], record["answer"]) for record in records]
        result = score_captions(captions, {record["id"]: record["label"] for record in records}, self._reader)
        return {
            "metrics": result.metrics,
            "intervals": {name: list(pair) for name, pair in result.intervals.items()},
            "undefined": result.undefined,
        }


def _pope(task: PopeTask, records: Sequence[Record]) -> dict[str, Any]:
    results = {}
    for split in dict.fromkeys(record["split"] for record in records):
        mine = [record for record in records if record["split"] == split]
        questions = [{"question_id": r["id"], "label": r["label"]} for r in mine]
        answers = [{"question_id": r["id"], "answer": r["answer"]} for r in mine]
        results[split] = score_pope(questions, answers, task.parser)
    metrics = mean_rates(results)
    if len(results) > 1:
        metrics |= {f"{split}_{name}": r.rates[name] for split, r in results.items() for name in RATES}
    named = {f"{split}: " if split else "": result for split, result in results.items()}
    counts = _by_image(records, _pope_counts)
    return {
        "metrics": metrics,
        "intervals": {
            "f1": list(bootstrap(counts, lambda t: 2 * t[0] / max(1, 2 * t[0] + t[1] + t[2]))),
            "accuracy": list(bootstrap(counts, lambda t: t[3] / t[4])),
        },
        "undefined": [f"{name}{rate}" for name, result in named.items() for rate in result.undefined],
        "warnings": [f"{name}{warning}" for name, result in named.items() for warning in result.warnings],
    }


def _pope_counts(record: Record) -> list[float]:
    """True and false positives, misses, right ones, 1."""
    yes, true = record["scores"]["said"] == "yes", record["label"] == "yes"
    return [yes and true, yes and not true, true and not yes, record["scores"]["correct"], 1]


def _amber_descriptions(records: Sequence[Record], words: Words) -> dict[str, Any]:
    result = score_descriptions([{"response": r["answer"], **r["label"]} for r in records], words)
    counts = _by_image(
        records,
        lambda r: [
            *(len(r["scores"][name]) for name in ("hallucinated", "nouns", "covered")),
            len(set(r["label"]["truth"])),
        ],
    )
    intervals = {
        "chair": list(bootstrap(counts, lambda t: t[0] / max(1, t[1]))),
        "cover": list(bootstrap(counts, lambda t: t[2] / max(1, t[3]))),
    }
    return {"metrics": result.rates, "intervals": intervals, "undefined": result.undefined}


def _amber_questions(records: Sequence[Record]) -> dict[str, Any]:
    kinds = {"existence": "discriminative-hallucination", "attribute": "discriminative-attribute-state"}
    rows = [
        {
            "response": r["scores"]["said"],
            "truth": r["label"],
            "type": kinds.get(r["split"], "discriminative-relation"),
        }
        for r in records
    ]
    results: dict[str, AmberResult] = score_questions(rows)
    whole = results.pop("all")
    metrics = dict(whole.rates)
    if len(results) > 1:
        metrics |= {f"{name}_{rate}": x for name, one in results.items() for rate, x in one.rates.items()}
    counts = _by_image(records, lambda record: [record["scores"]["correct"], 1])
    return {
        "metrics": metrics,
        "intervals": {"accuracy": list(bootstrap(counts, lambda t: t[0] / t[1]))},
        "undefined": whole.undefined,
    }


def _mme(records: Sequence[Record]) -> dict[str, Any]:
    rows = [
        {
            "category": r["split"],
            "image": r["image"]["path"],
            "label": r["label"],
            "answer": r["answer"],
        }
        for r in records
    ]
    counts = _by_image(records, lambda record: [record["scores"]["correct"], 1])
    return {
        "metrics": {**mme_scores(rows), "accuracy": _mean(r["scores"]["correct"] for r in records)},
        "intervals": {"accuracy": list(bootstrap(counts, lambda t: t[0] / t[1]))},
    }


def _choice(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy of questions, and of answers; intervals are over images, with all answers to a question together."""
    right: dict[str, dict[str, list[bool]]] = {}
    for record in records:
        question = record["id"].rpartition("#")[0]
        right.setdefault(record["split"], {}).setdefault(question, []).append(record["scores"]["correct"])
    every = {name: answers for questions in right.values() for name, answers in questions.items()}
    metrics = {
        "accuracy": circular_accuracy(every),
        "answers": _mean(r["scores"]["correct"] for r in records),
    }
    if len(right) > 1:
        metrics |= {f"{split}_accuracy": circular_accuracy(questions) for split, questions in right.items()}
    whole = {name: all(answers) for name, answers in every.items()}
    first = [record for record in records if record["id"].endswith("#0")]
    counts = _by_image(first, lambda record: [whole[record["id"].rpartition("#")[0]], 1])
    return {"metrics": metrics, "intervals": {"accuracy": list(bootstrap(counts, lambda t: t[0] / t[1]))}}


def _judged(records: Sequence[Record]) -> dict[str, Any]:
    splits: dict[str, list[float]] = {}
    for record in records:
        splits.setdefault(record["split"], []).append(record["scores"]["rating"])
    bad = _mean(r["scores"]["rating"] < r["scores"]["good"] for r in records)
    metrics = {"rating": _mean(r["scores"]["rating"] for r in records), "bad": bad}
    if len(splits) > 1:
        metrics |= {f"{split}_rating": _mean(ratings) for split, ratings in splits.items()}
    counts = _by_image(
        records, lambda r: [r["scores"]["rating"], r["scores"]["rating"] < r["scores"]["good"], 1]
    )
    intervals = {
        "rating": list(bootstrap(counts, lambda t: t[0] / t[2])),
        "bad": list(bootstrap(counts, lambda t: t[1] / t[2])),
    }
    return {"metrics": metrics, "intervals": intervals}


def _vqa(records: Sequence[Record]) -> dict[str, Any]:
    splits = {}
    for split in dict.fromkeys(record["split"] for record in records):
        splits[split] = _mean(r["scores"]["accuracy"] for r in records if r["split"] == split)
    metrics = {"accuracy": _mean(splits.values())}
    if len(splits) > 1:
        metrics |= {f"{split}_accuracy": value for split, value in splits.items()}
    counts = _by_image(records, lambda record: [record["scores"]["accuracy"], 1])
    return {"metrics": metrics, "intervals": {"accuracy": list(bootstrap(counts, lambda t: t[0] / t[1]))}}


def _by_image(records: Sequence[Record], count: Callable[[Record], Sequence[float]]) -> np.ndarray:
    """Sums of ``count`` over the records of each image: images, not questions, are drawn for an interval."""
    sums: dict[str, np.ndarray] = {}
    for record in records:
        path = record["image"]["path"]
        sums[path] = sums.get(path, 0) + np.array(count(record), dtype=float)
    return np.array(list(sums.values()))


def _mean(values: Any) -> float:
    listed = list(values)
    return float(sum(listed) / len(listed))
