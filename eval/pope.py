"""POPE: does a model say an object is there when it is not? (Li et al. 2023, arXiv 2305.10355)

Every question has the label yes or no, yes is the positive class:

    accuracy = (TP + TN) / n     precision = TP / (TP + FP)     recall = TP / (TP + FN)
    f1 = 2 precision recall / (precision + recall)              yes_ratio = answers read as yes / n

as in ``evaluate.py`` of RUCAIBox/POPE (LLaVA's eval_pope.py is the same). Where that divides by zero, the
rate is 0 here and named in ``undefined``. Answers are matched to questions by ``question_id``, in file order
only if the answers have none (the official script always goes by order, and silently leaves out questions
beyond the last answer). Answers that repeat another question, image or label, and answers that a parser reads
against what they say, are scored as ever and warned of.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_prune.eval.pope_matching import Matched, Row, match_answers, question_text
from vlm_prune.eval.records import choose, whole

Verdict = bool | None
"""True: yes; False: no; None: the parser takes the answer for neither."""

RATES = ("accuracy", "precision", "recall", "f1", "yes_ratio")
_REMEDY = "take special tokens and line ends off the answers, or choose parser 'strict'"
_YES_OR_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def _official(answer: str) -> Verdict:
    first_sentence = answer.split(".", 1)[0].replace(",", "")
    return {"No", "not", "no"}.isdisjoint(first_sentence.split(" "))


def _recorder(answer: str) -> Verdict:
    words = answer.replace(".", "").replace(",", "").split(" ")
    return not any(word in {"No", "not", "no", "NO"} or word.endswith("n't") for word in words)


def _strict(answer: str) -> Verdict:
    first_word = re.match(r"\W*(\w+)", answer)
    return {"yes": True, "no": False}.get(first_word[1].lower()) if first_word else None


def _lmms(answer: str) -> Verdict:
    return {"yes": True, "no": False}.get(answer.lower().strip())


PARSERS: dict[str, Callable[[str], Verdict]] = {
    "official": _official,
    "recorder": _recorder,
    "strict": _strict,
    "lmms": _lmms,
}
"""How an answer is read.

- ``official``: no if the text before the first period has the word No, no or not; everything else is yes, an
  empty answer too (RUCAIBox/POPE, LLaVA).
- ``recorder``: no if the whole answer has one of those words, NO, or a word ending in n't (OPERA, PAI).
- ``strict``: the first word must be yes or no, in any case. Anything else is wrong for accuracy and recall.
- ``lmms``: the whole answer must be yes or no, and "Yes." is neither; that lowers accuracy only (lmms-eval).
"""


def parse_answer(answer: str, parser: str = "official") -> Verdict:
    """Read one answer with one of :data:`PARSERS`."""
    return PARSERS[choose("POPE parser", parser, PARSERS)](answer)


@dataclass(frozen=True)
class PopeResult:
    """Scores of one set of questions.

    ``n_neither`` answers hold neither the word yes nor no; ``n_misread`` plainly say one and the parser reads
    something else, such as yes from "No</s>"; ``n_missing`` questions have no answer and are not scored.
    ``predictions`` are in the order of the questions that have an answer.
    """

    rates: dict[str, float]
    counts: dict[str, int]
    undefined: list[str]
    parser: str
    matched_by: str
    warnings: list[str] = field(default_factory=list)
    predictions: list[Verdict] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Everything but the predictions, ready for JSON."""
        about = {"parser": self.parser, "matched_by": self.matched_by}
        return {**self.rates, **self.counts, **about, "undefined": self.undefined, "warnings": self.warnings}


def pope_rates(
    verdicts: Sequence[Verdict], labels: Sequence[bool], neither_is_missed: bool = True
) -> tuple[dict[str, float], dict[str, int], list[str]]:
    """Rates, counts and the names of the rates with nothing to divide by (they are 0).

    Args:
        verdicts: what was answered; None counts as wrong, and as neither yes nor no.
        labels: what is true, as many.
        neither_is_missed: count None for a true yes in recall's denominator too.
    """
    seen = Counter(zip(verdicts, labels, strict=True))
    tp, fp, tn, fn = seen[True, True], seen[True, False], seen[False, False], seen[False, True]
    missed = fn + (seen[None, True] if neither_is_missed else 0)
    n, undefined = len(labels), []

    def share(name: str, part: float, whole: float) -> float:
        if not whole:
            undefined.append(name)
        return part / whole if whole else 0.0

    precision, recall = share("precision", tp, tp + fp), share("recall", tp, tp + missed)
    rates = {
        "accuracy": share("accuracy", tp + tn, n),
        "precision": precision,
        "recall": recall,
        "f1": share("f1", 2 * precision * recall, precision + recall),
        "yes_ratio": share("yes_ratio", tp + fp, n),
        "label_yes_ratio": share("label_yes_ratio", sum(labels), n),
    }
    return rates, {"tp": tp, "fp": fp, "tn": tn, "fn": fn, "n": n}, undefined


def score_pope(questions: Sequence[Row], answers: Sequence[Row], parser: str = "official") -> PopeResult:
    """Score answers, all together.

    Args:
        questions: rows with ``label`` (yes or no), ``question_id`` and ``text``, or the hub's columns.
        answers: rows with ``answer`` or ``text``, and ``question_id`` (all of them or none); see
            `match_answers` for other names.
        parser: one of :data:`PARSERS`.

    Raises:
        ValueError: a label is neither yes nor no, an id is missing, unknown or repeated, nothing can be
            matched.
    """
    choose("POPE parser", parser, PARSERS)
    return _score(match_answers(questions, answers), parser)


def score_splits(
    questions: Sequence[Row], answers: Sequence[Row], parser: str = "official"
) -> dict[str, PopeResult]:
    """As :func:`score_pope`, one result for each ``category`` (or ``split``) of the questions, else "all"."""
    choose("POPE parser", parser, PARSERS)
    matched = match_answers(questions, answers)
    found: dict[str, list[tuple[Row, str | None]]] = {}
    for question, answer in matched.pairs:
        name = str(question.get("category", question.get("split", "all")))
        found.setdefault(name, []).append((question, answer))
    answered = {name: pairs for name, pairs in found.items() if any(text is not None for _, text in pairs)}
    warnings = [
        f"no question of {name!r} has an answer: its {len(pairs)} questions are not scored"
        for name, pairs in found.items()
        if name not in answered
    ]
    return {
        name: _score(Matched(pairs, matched.by, [*matched.warnings, *warnings]), parser)
        for name, pairs in answered.items()
    }


def relabelled(
    questions: Sequence[Row], answers: Sequence[Row], labels: Sequence[Row]
) -> tuple[list[Row], list[Row]]:
    """Questions with other labels, and their answers: RePOPE's (Neuhaus and Hein 2025, arXiv 2504.15707).

    RePOPE corrects labels of POPE and leaves ambiguous questions out; so do answers that were made for all of them.

    Args:
        questions: rows with ``question_id``.
        answers: rows with ``question_id``.
        labels: rows with ``question_id`` and ``label``; where they repeat the question's ``text``, it has to be that.

    Raises:
        ValueError: a row has no id, or a label is of a question that is not there or asks something else.
    """
    for what, rows in {"a question": questions, "an answer": answers, "a label": labels}.items():
        if not all("question_id" in row for row in rows):
            raise ValueError(f"{what} has no question_id: other labels can only be matched by it")
    known = {str(whole(row["question_id"])): row for row in questions}
    label_of: dict[str, Any] = {}
    for row in labels:
        name = str(whole(row["question_id"]))
        if name not in known:
            raise ValueError(f"question {name} of the labels is not among the {len(known)} questions")
        ours, theirs = question_text(known[name]), question_text(row)
        if ours and theirs and ours != theirs:
            raise ValueError(f"question {name}: the labels are of {theirs!r}, the questions have {ours!r}")
        label_of[name] = row["label"]
    kept: list[Row] = [{**row, "label": label_of[name]} for name, row in known.items() if name in label_of]
    return kept, [row for row in answers if str(whole(row["question_id"])) in label_of]


def mean_rates(results: Mapping[str, PopeResult]) -> dict[str, float]:
    """Mean over the splits of each rate: how papers report "POPE" as one number."""
    return {name: sum(result.rates[name] for result in results.values()) / len(results) for name in RATES}


def _score(matched: Matched, parser: str) -> PopeResult:
    answered = [(question, answer) for question, answer in matched.pairs if answer is not None]
    missing = len(matched.pairs) - len(answered)
    verdicts = [PARSERS[parser](answer) for _, answer in answered]
    labels = [_label(question) for question, _ in answered]
    rates, counts, undefined = pope_rates(verdicts, labels, neither_is_missed=parser != "lmms")
    neither = [at for at, (_, answer) in enumerate(answered) if not _YES_OR_NO.search(answer)]
    misread = [
        at
        for at, (_, answer) in enumerate(answered)
        if (plain := _plainly(answer)) is not None and plain is not verdicts[at]
    ]
    warnings = list(matched.warnings)
    if missing:
        warnings.append(f"{missing} of {len(matched.pairs)} questions have no answer and are not scored")
    for problem, places, remedy in (
        ("hold neither 'yes' nor 'no'", neither, ""),
        ("are read otherwise than they say", misread, f": {_REMEDY}"),
    ):
        if places:
            read_as = Counter(verdicts[at] for at in places)
            question, answer = answered[places[0]]
            warnings.append(
                f"{len(places)} of {len(answered)} answers {problem}, first {answer[:60]!r} "
                f"to question {question.get('question_id', places[0] + 1)}; parser {parser!r} reads "
                f"{read_as[True]} of them as yes, {read_as[False]} as no, {read_as[None]} as wrong{remedy}"
            )
    if undefined:
        warnings.append(f"{', '.join(undefined)} set to 0: nothing to divide by (the official script stops)")
    counts |= {"n_neither": len(neither), "n_misread": len(misread), "n_missing": missing}
    return PopeResult(rates, counts, undefined, parser, matched.by, warnings, verdicts)


def _plainly(answer: str) -> Verdict:
    """What a reader takes the answer for: its first word, or the one word of the two that it holds."""
    first = _strict(answer)
    said = {word.lower() for word in _YES_OR_NO.findall(answer)}
    return said == {"yes"} if first is None and len(said) == 1 else first


def _label(question: Row) -> bool:
    label = question.get("label", question.get("answer"))
    if not isinstance(label, str) or label.strip().lower() not in {"yes", "no"}:
        raise ValueError(
            f"question {question.get('question_id')}: label {label!r}, 'yes' or 'no' is needed "
            "(POPE's labels are in the coco_pope_*.json files)"
        )
    return label.strip().lower() == "yes"
