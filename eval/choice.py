"""Multiple choice: MMBench's circular evaluation (Liu et al., ECCV 2024, arXiv 2307.06281).

A question is asked once for each of its options, each time with the options moved on by one place, and counts as right
only if all of its answers are. So a model that likes a letter gains nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

LETTERS = "ABCDEFGH"

_ALONE = re.compile(r"(?<![A-Za-z'])([A-H])(?![A-Za-z'])")


def rotations(options: Sequence[str], right: int, circular: bool = True) -> list[tuple[list[str], int]]:
    """The options in each order that is asked, and where the right one stands in it.

    >>> rotations(["cat", "dog"], 0)
    [(['cat', 'dog'], 0), (['dog', 'cat'], 1)]
    """
    count = len(options)
    shifts = range(count if circular else 1)
    return [([*options[s:], *options[:s]], (right - s) % count) for s in shifts]


def asked(question: str, options: Sequence[str], hint: str = "") -> str:
    """A question with its hint and its lettered options, a line each."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([*([hint] if hint else []), question, *lines])


def read_choice(answer: str, options: Sequence[str]) -> str:
    """The letter that an answer chooses; empty if it is not clear.

    The only letter of an option that stands by itself, "A" before more than three words only if a mark follows it; or
    else the only option whose text is in the answer. The benchmark's own script asks a language model about the rest.

    >>> read_choice("B. a dog", ["cat", "a dog"]), read_choice("It is a dog", ["a cat", "a dog"])
    ('B', 'B')
    >>> read_choice("A dog sits on the mat", ["cat", "dog"]), read_choice("A or B", ["cat", "dog"])
    ('B', '')
    """
    known = LETTERS[: len(options)]
    found = {match[1]: match for match in _ALONE.finditer(answer) if match[1] in known}
    if "A" in found and len(answer.split()) > 3 and answer[found["A"].end() : found["A"].end() + 1] == " ":
        del found["A"]  # the article
    if len(found) == 1:
        return next(iter(found))
    if found:
        return ""
    text = answer.lower()
    named = [letter for letter, option in zip(known, options, strict=True) if option.strip().lower() in text]
    return named[0] if len(named) == 1 else ""


def circular_accuracy(right: Mapping[str, Sequence[bool]]) -> float:
    """Share of questions of which all answers are right, from the answers by question.

    >>> circular_accuracy({"1": [True, True], "2": [True, False]})
    0.5
    """
    return sum(map(all, right.values())) / len(right) if right else 0.0
