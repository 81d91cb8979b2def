"""VQA accuracy: short answers against accepted ones.

``exact``: 1 if the answer equals an accepted one. ``vqa``: VQAv2's (Antol et al. 2015, arXiv 1505.00468): with ten
annotators, the mean over every nine of them of min(number that gave this answer / 3, 1); the same formula for any
number of them. Both compare answers in a plain form, see `normalised`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

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
