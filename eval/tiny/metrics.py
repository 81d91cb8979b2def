"""Figures of the model cards: POPE, CHAIR and caption recall over shapes, with 95 % intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from ..scenes import OBJECTS

Z = 1.959964
"""97.5 % point of the normal distribution."""


def mentioned(text: str) -> list[str]:
    """Objects a caption mentions, in order, repetitions kept."""
    return [OBJECTS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in OBJECTS]


def pope_counts(answers: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """True and false positives, true and false negatives; an answer with the word "no" is a no."""
    said = np.array(["no" not in re.findall(r"[a-z]+", answer.lower()) for answer in answers])
    truth = np.array([label == "yes" for label in labels])
    return np.array(
        [(said & truth).sum(), (said & ~truth).sum(), (~said & ~truth).sum(), (~said & truth).sum()]
    )


def pope_figures(counts: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 and share of yes answers from `pope_counts`."""
    hits, false_yes, rejections, misses = counts.tolist()
    total = counts.sum()
    return {
        "accuracy": float((hits + rejections) / total),
        "f1": 2 * hits / max(1, 2 * hits + false_yes + misses),
        "yes_share": float((hits + false_yes) / total),
    }


def chair_counts(text: str, names: Sequence[str]) -> np.ndarray:
    """Hallucinated mentions, mentions, true objects found, true objects, 1 if any is hallucinated, 1."""
    words = mentioned(text)
    wrong = sum(word not in names for word in words)
    return np.array([wrong, len(words), len(set(words) & set(names)), len(names), wrong > 0, 1])


def chair_figures(counts: np.ndarray) -> dict[str, float]:
    """CHAIRs, CHAIRi and recall of summed `chair_counts`."""
    wrong, words, found, truth, bad, captions = counts.tolist()
    return {
        "chair_s": bad / max(1, captions),
        "chair_i": wrong / max(1, words),
        "recall": found / max(1, truth),
    }


def wilson(hits: float, total: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, square = hits / total, Z * Z / total
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def bootstrap(
    rows: np.ndarray, figure: Callable[[np.ndarray], float], draws: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval of `figure(rows.sum(0))` over scenes (rows) drawn with replacement."""
    rng = np.random.default_rng(0)
    found = [figure(rows[rng.integers(len(rows), size=len(rows))].sum(0)) for _ in range(draws)]
    return float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))
