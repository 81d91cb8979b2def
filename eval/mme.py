"""MME: two yes-no questions an image, one of each answer (Fu et al. 2023, arXiv 2306.13394).

A category's score is 100 (accuracy + accuracy+), 0 to 200: the share of questions answered right, and the share of
images of which both are. A part's score, perception or cognition, is the sum over its categories.
"""

from __future__ import annotations

from collections.abc import Iterable

from vlm_prune.eval.pope_matching import Row

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""The categories of cognition; all others are of perception."""


def read_answer(answer: str) -> str:
    """yes, no or other: the word itself, or what stands in the first four characters, yes before no.

    >>> read_answer("Yes, it is."), read_answer("no"), read_answer("I see no dog"), read_answer("Not")
    ('yes', 'no', 'other', 'no')
    """
    start = answer.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def mme_scores(rows: Iterable[Row]) -> dict[str, float]:
    """The score of each category, and of ``perception`` and ``cognition`` where there are any.

    Args:
        rows: with ``category``, ``image``, ``label`` (yes or no, in any case) and ``answer``.

    Raises:
        ValueError: an image of a category has not two questions.
    """
    images: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        right = read_answer(row["answer"]) == row["label"].strip().lower()
        images.setdefault(row["category"], {}).setdefault(row["image"], []).append(right)
    scores: dict[str, float] = {}
    for category, found in images.items():
        if odd := [image for image, answers in found.items() if len(answers) != 2]:
            raise ValueError(
                f"image {odd[0]!r} of {category} has {len(found[odd[0]])} questions; MME has two of each image, and "
                "accuracy+ needs both"
            )
        both = list(found.values())
        scores[category] = 100 * (sum(map(sum, both)) / (2 * len(both)) + sum(map(all, both)) / len(both))
    parts = {
        "perception": [value for name, value in scores.items() if name.lower() not in COGNITION],
        "cognition": [value for name, value in scores.items() if name.lower() in COGNITION],
    }
    return scores | {name: sum(values) for name, values in parts.items() if values}
