"""POPE and CHAIR as tasks of lmms-eval, scored by `vlm_prune.eval.pope` and `vlm_prune.eval.chair`.

The functions that the YAML files in ``tasks/`` name. Rows of data may have the columns of the hub's data sets or of
the benchmarks' own files:

    POPE   image, question_id, question or text, answer or label
    CHAIR  image, image_id or question_id, objects or gt_object, and vocabulary (a table file) if not COCO's
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from vlm_prune.eval.chair import CaptionReader, Vocabulary, image_id, score_captions
from vlm_prune.eval.pope import RATES, parse_answer, score_pope

Doc = Mapping[str, Any]
Record = Mapping[str, Any]

CHAIR_RATES = ("chair_s", "chair_i", "recall", "precision", "f1", "length", "repetition")


def image(doc: Doc) -> list[Any]:
    """The image of a row, or its path."""
    return [doc["image"]]


def pope_text(doc: Doc, kwargs: Mapping[str, str] | None = None) -> str:
    """The question between the task's ``pre_prompt`` and ``post_prompt``."""
    kwargs = kwargs or {}
    return f"{kwargs.get('pre_prompt', '')}{_column(doc, 'question', 'text').strip()}{kwargs.get('post_prompt', '')}"


def pope_target(doc: Doc) -> str:
    """The label, yes or no."""
    return str(_column(doc, "answer", "label")).strip().lower()


def pope_results(doc: Doc, results: Sequence[str]) -> dict[str, Record]:
    """What the rates are made of. Only ``accuracy`` is a mean over questions, so only it has a ``score``."""
    row = {"question_id": doc["question_id"], "label": pope_target(doc), "answer": results[0]}
    score = float(parse_answer(results[0]) == (row["label"] == "yes"))
    return {rate: {**row, "score": score} if rate == "accuracy" else row for rate in RATES}


def _pope_rate(rate: str) -> Callable[[Sequence[Record]], float]:
    def aggregate(records: Sequence[Record]) -> float:
        result = score_pope(
            records, [{"question_id": r["question_id"], "answer": r["answer"]} for r in records]
        )
        if rate == "accuracy":  # once for all rates
            for warning in result.warnings:
                logging.getLogger(__name__).warning("POPE: %s", warning)
        return result.rates[rate]

    return aggregate


pope_accuracy, pope_precision, pope_recall, pope_f1, pope_yes_ratio = map(_pope_rate, RATES)


def chair_text(doc: Doc, kwargs: Mapping[str, str] | None = None) -> str:
    """The task's ``prompt``."""
    return (kwargs or {}).get("prompt", "Please describe this image in detail.")


def chair_target(doc: Doc) -> str:
    """The objects of the image."""
    return ", ".join(_objects(doc))


def chair_results(doc: Doc, results: Sequence[str]) -> dict[str, Record]:
    """What the rates are made of."""
    row = {
        "image_id": image_id(_column(doc, "image_id", "question_id")),
        "caption": results[0],
        "objects": _objects(doc),
        "vocabulary": doc.get("vocabulary"),
    }
    return dict.fromkeys(CHAIR_RATES, row)


def _chair_rate(rate: str) -> Callable[[Sequence[Record]], float]:
    def aggregate(records: Sequence[Record]) -> float:
        vocabularies = {record["vocabulary"] for record in records}
        if len(vocabularies) > 1:
            raise ValueError(
                f"rows name different vocabularies, {sorted(map(str, vocabularies))}: one is needed"
            )
        captions = [(record["image_id"], record["caption"]) for record in records]
        truth = {record["image_id"]: record["objects"] for record in records}
        return score_captions(captions, truth, _reader(*vocabularies), samples=0).metrics[rate]

    return aggregate


@cache
def _reader(vocabulary: str | None) -> CaptionReader:
    return CaptionReader(Vocabulary.read(vocabulary) if vocabulary else None)


chair_s, chair_i, chair_recall, chair_precision, chair_f1, chair_length, chair_repetition = map(
    _chair_rate, CHAIR_RATES
)


def _column(doc: Doc, *names: str) -> Any:
    for name in names:
        if doc.get(name) is not None:
            return doc[name]
    raise ValueError(f"a row needs the column {' or '.join(names)}; it has {', '.join(doc)}")


def _objects(doc: Doc) -> list[str]:
    objects = _column(doc, "objects", "gt_object")
    if isinstance(objects, str):
        objects = json.loads(objects) if objects.startswith("[") else objects.split(",")
    return [str(name).strip() for name in objects if str(name).strip()]
