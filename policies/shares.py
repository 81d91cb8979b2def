"""Average shares of visual tokens where they are dropped in several steps.

A share ``r_v`` enters the decoder; a share ``r_1`` of these is kept before layer ``cuts[0]``, a share ``r_2`` of those
left before layer ``cuts[1]``. The cost is the *average* share over the decoder's layers. ``depth`` is their number;
with ``depth=1``, ``cuts`` are fractions of the depth.
"""

from __future__ import annotations

import torch

Cuts = tuple[float, float]

PUBLISHED: dict[float, dict[str, float]] = {
    0.50: {"t": 28.683047941520474, "m": 11.756787150848968, "r_v": 0.7233201448753168,
           "r_1": 0.748747637472693, "r_2": 0.487},
    0.25: {"t": 34.759552803070484, "m": 15.580797034937687, "r_v": 0.2651026358526424,
           "r_1": 0.9833434139039235, "r_2": 0.8773258179532721},
    0.10: {"t": 39.26492840997221, "m": 17.386981849158786, "r_v": 0.11661529508161146,
           "r_1": 1.0, "r_2": 0.6011},
}  # fmt: skip
"""The released settings for LLaVA-OneVision-7B, by average share of tokens; ``alpha`` is 0 in all of them."""


def average_share(r_v: float, r_1: float, r_2: float, cuts: Cuts, depth: float = 1) -> float:
    """Share of the visual tokens that a layer computes, averaged over the decoder's layers."""
    first, second = cuts
    return r_v * (first + r_1 * (second - first) + r_1 * r_2 * (depth - second)) / depth


def solve_first(average: float, r_1: float, r_2: float, cuts: Cuts, depth: float = 1) -> float:
    """The ``r_v``, at most 1, with which the layers hold ``average`` on average."""
    return min(1.0, average / average_share(1.0, r_1, r_2, cuts, depth))


def solve_last(average: float, r_v: float, r_1: float, cuts: Cuts, depth: float = 1) -> float:
    """The ``r_2``, at most 1, with which the layers hold ``average``; negative if earlier layers hold more already.

    Where it stops at 1, the layers hold less than ``average``. Official: ``bayesian_objective``.
    """
    first, second = cuts
    spent = r_v * (first + r_1 * (second - first))
    return min(1.0, (average * depth - spent) / (depth - second) / (r_v * r_1))


def check_first(average: float, r_v: float, r_1: float, cuts: Cuts, slack: float) -> None:
    """Raise ValueError if no ``r_2`` makes the layers hold ``average``, give or take ``slack``."""
    most = solve_first(average, r_1, 0.0, cuts)
    if not average - slack <= r_v <= most + slack:
        raise ValueError(
            f"r_v={r_v} and r_1={r_1} cannot hold {average:.3f} of the visual tokens on average: choose r_v from "
            f"{average:.3f} to {most:.3f}, or leave it out"
        )


def check_average(average: float, r_v: float, r_1: float, r_2: float, cuts: Cuts, slack: float) -> None:
    """Raise ValueError if the layers do not hold ``average``, give or take ``slack``."""
    held = average_share(r_v, r_1, r_2, cuts)
    if abs(average - held) > slack:
        raise ValueError(
            f"r_v={r_v}, r_1={r_1} and r_2={r_2} hold {held:.3f} of the visual tokens on average, the budget is "
            f"{average:.3f}: leave out the budget, or leave out r_v or r_2, which then follow from it"
        )


def literal_counts(entered: torch.Tensor, r_1: float, r_2: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens kept at the two cuts, two int64 ``(batch,)``, by shares of what is left each time.

    ``entered`` is int64 ``(batch,)``. The number dropped is rounded half to even, as in the released code.
    """
    first = entered - (entered.double() * (1 - r_1)).round().long()
    return first, first - (first.double() * (1 - r_2)).round().long()


def solved_counts(
    entered: torch.Tensor, average: torch.Tensor, r_1: float, cuts: tuple[int, int], depth: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens kept at the two cuts, two int64 ``(batch,)``, so that the layers hold ``average`` tokens.

    ``entered`` is int64 ``(batch,)``, ``average`` fp64 ``(batch,)``. The first cut follows ``r_1``, the second makes up
    the balance to half a token. Where that would be more than the first cut leaves, the first cut leaves as many.
    At least one token is kept.
    """
    first, second = cuts
    total = average * depth - entered * first
    before = literal_counts(entered, r_1, 1.0)[0].double()
    after = (total - before * (second - first)) / (depth - second)
    level, short = total / (depth - first), after > before
    most = entered.clamp(min=1)

    def whole(counts: torch.Tensor) -> torch.Tensor:
        return torch.where(short, level, counts).round().long().clamp(min=1).minimum(most)

    return whole(before), whole(after)
