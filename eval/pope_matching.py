"""Which answer belongs to which POPE question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vlm_prune.eval.records import whole

Row = Mapping[str, Any]


class Matched(NamedTuple):
    """All questions in order with the text of the answer (None: there is none), and how they were matched."""

    pairs: list[tuple[Row, str | None]]
    by: str
    warnings: list[str]


def match_answers(questions: Sequence[Row], answers: Sequence[Row]) -> Matched:
    """Match by ``question_id``, or by order if no answer has one.

    Args:
        questions: rows with ``question_id``.
        answers: rows with ``answer`` or ``text``; questions beyond the last answer stay without one.

    Raises:
        ValueError: ids are missing in some rows, repeated or unknown, there are more answers than questions, or
            no question has one.
    """
    found = _match(questions, answers)
    if all(answer is None for _, answer in found.pairs):
        raise ValueError(f"none of the {len(found.pairs)} questions has an answer")
    return found


def _match(questions: Sequence[Row], answers: Sequence[Row]) -> Matched:
    texts = [_answer_text(row, number) for number, row in enumerate(answers, 1)]
    if ids := _ids(answers, "answers"):
        known = _ids(questions, "questions")
        if not known:
            raise ValueError(
                "the answers have a 'question_id', and no question has one: add them to the questions, or take them "
                "out of the answers to go by order"
            )
        unknown = sorted(set(ids) - set(known))
        if unknown:
            raise ValueError(
                f"{len(unknown)} of {len(ids)} answers have a question_id that no question has, first "
                f"{unknown[0]!r}"
            )
        text_of = dict(zip(ids, texts, strict=True))
        pairs = [(row, text_of.get(key)) for row, key in zip(questions, known, strict=True)]
        return Matched(pairs, "question_id", [])
    if len(texts) > len(questions):
        raise ValueError(f"{len(texts)} answers without question_id for {len(questions)} questions")
    padded = [*texts, *[None] * (len(questions) - len(texts))]
    return Matched(list(zip(questions, padded, strict=True)), "order", _other_questions(questions, answers))


def _other_questions(questions: Sequence[Row], answers: Sequence[Row]) -> list[str]:
    """A warning if answers repeat a question that is not the one in their place."""
    other = [
        number
        for number, (asked, answer) in enumerate(zip(questions, answers, strict=False), 1)
        if answer.get("question") and str(asked.get("text", "")) not in str(answer["question"])
    ]
    if not other:
        return []
    return [
        f"{len(other)} answers repeat another question than the one in their place, first number {other[0]}"
    ]


def _answer_text(row: Row, number: int) -> str:
    answer = row.get("answer", row.get("text"))
    if not isinstance(answer, str):
        raise ValueError(
            f"answer {number}: no text under 'answer' or 'text'; it has {', '.join(map(repr, row))}"
        )
    return answer


def _ids(rows: Sequence[Row], what: str) -> list[str]:
    ids = [str(whole(row["question_id"])) for row in rows if "question_id" in row]
    if len(ids) not in (0, len(rows)):
        raise ValueError(
            f"{len(rows) - len(ids)} of {len(rows)} {what} have no 'question_id'; give it to all or none"
        )
    twice = [key for key, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(
            f"question_id {twice[0]!r} stands in several {what} ({len(twice)} such ids); give each split as "
            "a file of its own"
        )
    return ids
