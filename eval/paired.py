"""Paired statistics: does one policy beat another on the same samples, or is the difference noise?

Two policies that answer the same samples are compared sample by sample, which tells far smaller differences than
comparing the intervals of two means. Yes/no outcomes go through McNemar's exact test (McNemar 1947), rates such as
F1 through a paired bootstrap over images (Efron & Tibshirani 1993, ch. 16), and the p-values of many comparisons
through Holm's correction (Holm 1979), so that the chance of any false "beats" in a family stays below the level.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

Floats = npt.NDArray[np.float64]
Verdict = Literal["beats", "ties", "loses"]

LEVEL = 0.05
"""Chance of a false verdict in a family of comparisons."""

DRAWS = 10_000
"""Bootstrap draws; the smallest p-value is ``2 / (draws + 1)``."""


@dataclass(frozen=True)
class Difference:
    """A paired difference, first minus second.

    Attributes:
        low: lower end of the 95 % interval, ``high`` the upper one.
        p: two-sided p-value of no difference.
    """

    value: float
    low: float
    high: float
    p: float


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p-value of McNemar's test.

    Args:
        wins: samples that only the first policy got right.
        losses: samples that only the second got right. Samples where both agree carry no evidence.

    Raises:
        ValueError: a count is negative.
    """
    if min(wins, losses) < 0:
        raise ValueError(f"wins={wins}, losses={losses}: counts of samples are 0 or more")
    if wins + losses == 0:
        return 1.0
    return float(binomtest(wins, wins + losses, 0.5).pvalue)


def ratio(counts: Floats) -> Floats:
    """Ratio of sums ``(...)`` of counts ``(..., units, 2)``: part over whole, 0 where the whole is 0."""
    part, whole = np.moveaxis(counts.sum(-2), -1, 0)
    found: Floats = np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)
    return found


def ratio_draws(counts: Floats, draws: int = DRAWS, seed: int = 0) -> Floats:
    """The same ratio over units drawn with replacement, the same draws for all policies.

    Args:
        counts: ``(policies, units, 2)``; a unit is what is independent of the others, such as an image.
        draws: how often.
        seed: of the draws.

    Returns:
        ``(policies, draws)``.
    """
    policies, units, _ = counts.shape
    rng = np.random.default_rng(seed)
    flat = counts.transpose(1, 0, 2).reshape(units, -1)
    at_a_time = max(1, (1 << 20) // units)
    sums = []
    for start in range(0, draws, at_a_time):
        some = min(at_a_time, draws - start)
        drawn = rng.integers(units, size=(some, units)) + np.arange(some)[:, None] * units
        times = np.bincount(drawn.ravel(), minlength=some * units).reshape(some, units)
        sums.append(times @ flat)
    part, whole = np.moveaxis(np.concatenate(sums).reshape(draws, policies, 2), -1, 0)
    found: Floats = np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)
    return found.T


def difference(value: float, first: Floats, second: Floats, moved: int) -> Difference:
    """A difference with its interval and p-value, from bootstrap draws ``(draws,)`` of both sides.

    The interval is the percentile one; the p-value is twice the share of draws on the far side of 0, counted with one
    draw added so that it is never 0. Draws of few units cannot know how few they are, so the p-value is at least that
    of the sign test when all ``moved`` units, those on which the sides differ, go one way: ``2 / 2**moved``.
    """
    gaps = first - second
    low, high = np.quantile(gaps, [0.025, 0.975])
    tail = min(int((gaps <= 0).sum()), int((gaps >= 0).sum()))
    p = max(2 * (tail + 1) / (len(gaps) + 1), 2.0 ** (1 - moved))
    return Difference(value, float(low), float(high), min(1.0, p))


def paired_bootstrap(first: Floats, second: Floats, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Difference of two ratios of sums over the same units.

    Args:
        first: ``(units, 2)``, part and whole of each unit; ``second`` alike.
        draws: how often units are drawn with replacement.
        seed: of the draws.

    Raises:
        ValueError: the shapes differ, or there is no unit.
    """
    if first.shape != second.shape or first.ndim != 2 or first.shape[1] != 2 or not len(first):
        raise ValueError(f"counts {first.shape} and {second.shape}: two of shape (units, 2) are needed")
    both = np.stack([first, second]).astype(float)
    ours, theirs = ratio(both)
    moved = int((first != second).any(-1).sum())
    drawn = ratio_draws(both, draws, seed)
    return difference(float(ours - theirs), drawn[0], drawn[1], moved)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    adjusted = [0.0] * len(p)
    least = 0.0
    for rank, number in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, (len(p) - rank) * p[number]))
        adjusted[number] = least
    return adjusted


def verdict(gap: float, p: float, level: float = LEVEL) -> Verdict:
    """What a difference says, ``gap`` above 0 where the first policy is the better one."""
    if p >= level or gap == 0:
        return "ties"
    return "beats" if gap > 0 else "loses"


Name = TypeVar("Name", bound=Hashable)


def twins(behaviour: Mapping[Name, Hashable]) -> dict[Name, Name]:
    """The did-it-act gate: name -> the first name before it whose behaviour is equal.

    ``behaviour`` is whatever shows that a policy acted, such as all its answers and kept tokens; put the unpruned
    model first, so that a policy that did nothing is said to equal it.
    """
    first: dict[Hashable, Name] = {}
    found = {}
    for name, shown in behaviour.items():
        if (other := first.setdefault(shown, name)) != name:
            found[name] = other
    return found
