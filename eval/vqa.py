"""VQA accuracy: short answers against accepted ones.

``exact``: 1 if the answer equals an accepted one. ``vqa``: VQAv2's (Antol et al. 2015, arXiv 1505.00468): with ten
annotators, the mean over every nine of them of min(number that gave this answer / 3, 1); the same formula for any
number of them. Both compare answers in a plain form, see `normalised`.

``relaxed``: ChartQA's (Masry et al. 2022, arXiv 2203.10244): numbers may be off by 5 %, all else has to be equal.
``anls``: that of DocVQA and other readings of text (Biten et al. 2019, arXiv 1905.13648): by how much of an accepted
answer is spelt alike. These two keep articles and punctuation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_BETWEEN_DIGITS = re.compile(r"(?<=\d)[,](?=\d)")
_MARKS = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w\s.']|_")


def normalised(answer: str) -> str:
    """On one line in lower case, without articles and punctuation, numbers to ten as digits.

    The steps are those of VQAv2's evaluation, save its table of misspelt contractions ("dont" stays "dont"); and they
    are always taken, where the original leaves answers as they are if all annotators agree.

    >>> normalised("The two dogs."), normalised("1,000"), normalised("2.5 m")
    ('2 dogs', '1000', '2.5 m')
    """
    text = _MARKS.sub(" ", _BETWEEN_DIGITS.sub("", answer.lower()))
    return " ".join(_DIGITS.get(word, word) for word in text.split() if word not in _ARTICLES)


def exact_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """1 if ``answer`` is one of the ``accepted`` ones, else 0."""
    return float(normalised(answer) in map(normalised, accepted))


def relaxed_accuracy(answer: str, accepted: Sequence[str], tolerance: float = 0.05) -> float:
    """1 if ``answer`` is one of the ``accepted`` ones but for its case, or a number within ``tolerance`` of one.

    "5%" is the number 0.05. To 0, only 0 is near.

    >>> relaxed_accuracy("104", ["100"]), relaxed_accuracy("106", ["100"]), relaxed_accuracy("Red", ["red"])
    (1.0, 0.0, 1.0)
    """
    return float(any(_near(answer.strip(), one.strip(), tolerance) for one in accepted))


def _near(answer: str, accepted: str, tolerance: float) -> bool:
    said, true = _number(answer), _number(accepted)
    if said is None or true is None:
        return answer.lower() == accepted.lower()
    return abs(said - true) <= tolerance * abs(true)


def _number(text: str) -> float | None:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def anls(answer: str, accepted: Sequence[str], threshold: float = 0.5) -> float:
    """The greatest likeness to an ``accepted`` answer, 0 below ``threshold``.

    The likeness of two texts is 1 - edits / length of the longer one, in lower case with single spaces. A likeness of
    just the threshold counts, as in the benchmark's script; in the paper's formula it does not.

    >>> anls("flowcut", ["flowcuts"]), anls("abc", ["xyz"])
    (0.875, 0.0)
    """
    said = _spaced(answer)
    likeness = max((_likeness(said, _spaced(one)) for one in accepted), default=0.0)
    return likeness if likeness >= threshold else 0.0


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _likeness(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    return 1 - _edits(one, other) / longest if longest else 1.0


def _edits(one: str, other: str) -> int:
    """Fewest characters to insert, delete or replace (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        before, row = row, [number]
        for at, own in enumerate(other, 1):
            row.append(min(before[at] + 1, row[-1] + 1, before[at - 1] + (letter != own)))
    return row[-1]


def vqa_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """VQAv2's accuracy, 0 to 1, given what each annotator ``accepted``.

    >>> round(vqa_accuracy("red", ["red"] * 2 + ["blue"] * 8), 3)
    0.6
    """
    said, given = normalised(answer), [normalised(one) for one in accepted]
    if len(given) == 1:
        return float(said == given[0])
    same = given.count(said)
    others = [same - (one == said) for one in given]
    return sum(min(1.0, count / 3) for count in others) / len(others)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact_accuracy,
    "vqa": vqa_accuracy,
    "relaxed": relaxed_accuracy,
    "anls": anls,
}
"""Name -> score of an answer, 0 to 1, given the accepted ones."""
