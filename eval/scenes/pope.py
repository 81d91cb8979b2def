"""POPE questions about scenes, by the rules of the official code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .scene import Scene
from .shapes import with_article


def cooccurrence(scenes: Sequence[Scene]) -> Counter[tuple[str, str]]:
    """How many scenes show both objects, for each ordered pair of distinct names."""
    return Counter((a, b) for scene in scenes for a in scene.names for b in scene.names if a != b)


def pope_questions(scenes: Sequence[Scene], split: str, seed: int) -> list[dict[str, Any]]:
    """POPE questions about `scenes`, built by the rules of the official code.

    Per scene with at least three distinct objects: the first three, each followed by an absent object that
    was not asked about before. The absent one is drawn uniformly (`random`), is the most frequent (`popular`), or
    appears most often with the object just asked about (`adversarial`).

    Returns:
        Dictionaries: `question_id` from 1, `image` (position in `scenes`), `text`, `label` (yes/no),
            `object`.

    Raises:
        ValueError: an unknown split, or a scene that has all the objects that the scenes show.
    """
    if split not in ("random", "popular", "adversarial"):
        raise ValueError(f"split must be random, popular or adversarial, got {split!r}")
    rng = np.random.default_rng(seed)
    frequency = Counter(name for scene in scenes for name in scene.names)
    together = cooccurrence(scenes)
    seen = sorted(frequency)
    questions: list[dict[str, Any]] = []

    def ask(image: int, name: str, label: str) -> None:
        text = f"Is there {with_article(name)} in the image?"
        number = len(questions) + 1
        questions.append(
            {"question_id": number, "image": image, "text": text, "label": label, "object": name}
        )

    for image, scene in enumerate(scenes):
        if len(scene.names) < 3:
            continue
        asked: set[str] = set()
        for name in scene.names[:3]:
            absent = [other for other in seen if other not in scene.names and other not in asked]
            if not absent:
                raise ValueError(
                    f"{len(scenes)} scenes show {len(seen)} kinds of objects, too few to ask for an absent one: scene "
                    f"{image} has {', '.join(scene.names)}. Take more scenes, 4 at least."
                )
            if split == "random":
                negative = absent[int(rng.integers(len(absent)))]
            elif split == "popular":
                negative = max(absent, key=lambda other: frequency[other])
            else:
                negative = max(absent, key=lambda other: together[name, other])
            asked.add(negative)
            ask(image, name, "yes")
            ask(image, negative, "no")
    return questions
