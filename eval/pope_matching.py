"""Which answer belongs to which POPE question, and whether what an answer repeats says the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vlm_prune.eval.coco import image_id
from vlm_prune.eval.records import whole

Row = Mapping[str, Any]
Pair = tuple[Row, str | None]

QUESTION_IDS = ("question_id", "questionId", "qid", "text_id")
"""Names of a question's id in question and answer files. Plain ``id`` counts too, if these are missing."""

ANSWERS = (
    "filtered_resps",
    "response",
    "responses",
    "prediction",
    "pred",
    "output",
    "resps",
    "answer",
    "text",
)
"""Where an answer's text may be. Rows that repeat the question have its label under ``answer``, so that comes late."""

QUESTIONS = ("prompt", "question", "query", "input", "instruction", "text")
"""Where an answer may repeat what was asked, unless that is where its text is."""

LABELS = ("label", "target", "ground_truth", "gt_answer", "gt", "answer")
IMAGES = ("image", "image_source", "image_id", "image_path", "image_file", "file_name")
SPLITS = ("category", "split")


class Matched(NamedTuple):
    """All questions in order with the text of the answer (None: there is none), and how they were matched."""

    pairs: list[Pair]
    by: str
    warnings: list[str]


def match_answers(questions: Sequence[Row], answers: Sequence[Row]) -> Matched:
    """Match by ``question_id`` (with the category, where an id is of several), lmms-eval's ``doc_id``, or by order.

    Answer files often repeat the question, its image or its label. Where these are not those of the question that the
    answer is matched to, a warning says so: the ids, or the order, are then those of another list of questions.

    Args:
        questions: rows with ``question_id`` or ``id``, ``text`` or ``question``, and perhaps ``image``.
        answers: rows with one of :data:`ANSWERS`; questions beyond the last answer stay without one. Those in which
            lmms-eval repeats the row of the data set as ``doc`` have its columns, too.

    Raises:
        ValueError: ids are missing in some rows, repeated or unknown, there are more answers than questions, or
            no question has one.
    """
    answers = [{**row["doc"], **row} if isinstance(row.get("doc"), Mapping) else row for row in answers]
    places, by, warnings = _places(questions, answers)
    texts = [answer_text(row, number) for number, row in enumerate(answers, 1)]
    text_of = dict(zip(places, texts, strict=True))
    pairs = [(question, text_of.get(place)) for place, question in enumerate(questions)]
    if not text_of:
        raise ValueError(f"none of the {len(pairs)} questions has an answer")
    asked = [(questions[place], answer) for place, answer in zip(places, answers, strict=True)]
    return Matched(pairs, by, [*warnings, *_contradictions(asked)])


def question_text(question: Row) -> str:
    """What is asked: ``text``, or ``question`` as the data set on the hub calls it."""
    return str(question.get("text") or question.get("question") or "")


def answer_text(row: Row, number: int) -> str:
    """The text of an answer; ``number`` is the row's, for the error.

    lmms-eval's ``filtered_resps`` are lists with one text in them.
    """
    key = _answer_key(row)
    answer = row.get(key)
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, str):
        found = f"{key} is {str(answer)[:60]!r}" if key else f"it has {', '.join(map(repr, row))}"
        raise ValueError(
            f"answer {number}: no text under 'answer' or 'text' (nor {', '.join(map(repr, ANSWERS[:-2]))}); {found}"
        )
    return answer


def _answer_key(row: Row) -> str:
    """Which column has the answer; empty if none has."""
    return next((key for key in ANSWERS if key in row), "")


# --- places ---


def _places(questions: Sequence[Row], answers: Sequence[Row]) -> tuple[list[int], str, list[str]]:
    """For each answer the place of its question; what they were matched by; warnings."""
    for names, certain in ((QUESTION_IDS, True), (("id",), False)):
        given = _ids(answers, names, "answers")
        if not given:
            continue
        known = _ids(questions, names, "questions") or _ids(questions, (*QUESTION_IDS, "id"), "questions")
        if not known and certain:
            raise ValueError(
                f"the answers have a {names[0]!r}, and no question has one: add them to the questions, or take them "
                "out of the answers to go by order"
            )
        if certain or set(given) & set(known):
            return _by_id(questions, answers, known, given)
        places, by, _ = _by_order(questions, answers)
        return (
            places,
            by,
            [f"none of the answers' ids, such as {given[0]!r}, is a question's: matched by order"],
        )
    if answers and all("doc_id" in row for row in answers):
        return _by_row(questions, answers)
    return _by_order(questions, answers)


def _by_order(questions: Sequence[Row], answers: Sequence[Row]) -> tuple[list[int], str, list[str]]:
    if len(answers) > len(questions):
        raise ValueError(f"{len(answers)} answers without question_id for {len(questions)} questions")
    return list(range(len(answers))), "order", []


def _by_row(questions: Sequence[Row], answers: Sequence[Row]) -> tuple[list[int], str, list[str]]:
    """lmms-eval numbers the rows of its data set from 0, and writes samples as they are finished."""
    rows = [whole(row["doc_id"]) for row in answers]
    if bad := [row for row in rows if not isinstance(row, int) or not 0 <= row < len(questions)]:
        raise ValueError(f"doc_id {bad[0]!r} of an answer: it numbers the {len(questions)} questions from 0")
    _refuse_repeats("doc_id", rows, "answers")
    return rows, "doc_id", []


def _by_id(
    questions: Sequence[Row], answers: Sequence[Row], known: list[str], given: list[str]
) -> tuple[list[int], str, list[str]]:
    by, keys, wanted = "question_id", list[Any](known), list[Any](given)
    splits, named = _column(questions, SPLITS), _column(answers, SPLITS)
    if len(set(keys)) < len(keys) and splits and named:
        # the data set on the hub holds three splits, each with ids of its own
        by, keys, wanted = (
            "category and question_id",
            list(zip(splits, known, strict=True)),
            list(zip(named, given, strict=True)),
        )
    _refuse_repeats("question_id", keys, "questions")
    _refuse_repeats("question_id", wanted, "answers")
    place = {key: number for number, key in enumerate(keys)}
    if unknown := sorted(set(wanted) - place.keys()):
        raise ValueError(
            f"{len(unknown)} of {len(wanted)} answers have a question_id that no question has, first "
            f"{unknown[0]!r}"
        )
    return [place[key] for key in wanted], by, []


def _ids(rows: Sequence[Row], names: Sequence[str], what: str) -> list[str]:
    """The ids of all rows, or none."""
    found = [next((row[name] for name in names if name in row), None) for row in rows]
    ids = [str(whole(value)) for value in found if value is not None]
    if len(ids) not in (0, len(rows)):
        raise ValueError(
            f"{len(rows) - len(ids)} of {len(rows)} {what} have no {names[0]!r}; give it to all or none"
        )
    return ids


def _column(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """A column that every row has, or none."""
    found = [next((str(row[name]) for name in names if row.get(name)), "") for row in rows]
    return found if all(found) else []


def _refuse_repeats(name: str, values: Sequence[Any], what: str) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(
            f"{name} {twice[0]!r} stands in several {what} ({len(twice)} such ids); give each split as a file of its "
            "own, or a 'category' to questions and answers"
        )


# --- what answers repeat ---


def _contradictions(asked: Sequence[tuple[Row, Row]]) -> list[str]:
    """A warning for each thing that answers repeat otherwise than their questions have it."""
    found = []
    for what, differs in (("question", _other_question), ("image", _other_image), ("label", _other_label)):
        problems = [
            (number, pair) for number, (q, a) in enumerate(asked, 1) if (pair := differs(q, a)) is not None
        ]
        if problems:
            number, (theirs, ours) = problems[0]
            found.append(
                f"{len(problems)} of {len(asked)} answers repeat another {what} than the one in their place, first "
                f"answer {number}: {theirs!r} where the question file has {ours!r}; are they for another version of "
                "the questions?"
            )
    return found


def _other_question(question: Row, answer: Row) -> tuple[str, str] | None:
    repeated = [key for key in QUESTIONS if key != _answer_key(answer)]
    ours, theirs = question_text(question), _first(answer, repeated)
    if not _plain(ours) or theirs is None or _plain(ours) in _plain(str(theirs)):
        return None
    return str(theirs)[:80], ours


def _plain(text: str) -> str:
    """Words in lower case, without "imange", the slip of older copies of POPE's files."""
    return " ".join(re.findall(r"[^\W_]+", text.lower().replace("imange", "image")))


def _other_image(question: Row, answer: Row) -> tuple[str, str] | None:
    ours, theirs = _first(question, IMAGES), _first(answer, IMAGES)
    if ours is None or theirs is None or image_id(ours) == image_id(theirs) or _stem(ours) == _stem(theirs):
        return None
    return str(theirs), str(ours)


def _stem(path: str | int) -> str:
    """The name of an image file without folders and ending."""
    return re.sub(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", "", re.split(r"[/\\]", str(path))[-1].lower())


def _other_label(question: Row, answer: Row) -> tuple[str, str] | None:
    text = _answer_key(answer)
    ours = _word(question.get("label", question.get("answer")))
    theirs = next((word for key in LABELS if key != text and (word := _word(answer.get(key)))), "")
    return (theirs, ours) if ours and theirs and ours != theirs else None


def _word(label: Any) -> str:
    """yes, no, or nothing."""
    word = label.strip().lower() if isinstance(label, str) else ""
    return word if word in ("yes", "no") else ""


def _first(row: Row, names: Sequence[str]) -> str | int | None:
    """The first of these columns that holds a text or a number: images may be held as bytes."""
    return next((v for name in names if (v := row.get(name)) and type(v) in (str, int)), None)
