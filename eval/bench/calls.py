"""Whole calls, tower to logits, against the stock model and against the least that a pruned call has to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlm_prune import prune, unprune
from vlm_prune.eval.bench.clock import Times, interleaved, peak_bytes, shortest
from vlm_prune.eval.bench.counts import Counts, counts
from vlm_prune.eval.bench.subject import Subject
from vlm_prune.registry import make_policies

EVERYDAY = (
    "uniform", "divprune", "visionzip", "fastv", "agilepruner", "vflowopt", "flowcut", "mustdrop",
)  # fmt: skip
"""Policies whose whole calls are compared where none are named."""


SHORT = 200.0
"""Milliseconds. A call of one prompt that takes less is repeated within its turn, since the host decides it."""


@dataclass(frozen=True)
class Call:
    """A forward of one policy at one batch; ``policy="dense"`` is the stock model.

    Times are medians in milliseconds, ratios are medians of the ratios round by round. The *oracle* is the stock tower
    and then the stock language model handed as few rows as `uniform` leaves: no pruned call of that budget has less to
    do. ``counts`` are of one run; of a captured call its operations are those of an eager one, since nobody sees them
    in a graph. ``captured`` is what the receipt says of captured parts, ``None`` of an eager call; captured calls of
    "none" are those of the stock model, and ``wall_over_captured`` is over these.
    """

    policy: str
    batch: int
    tokens: int
    wall_ms: float
    wall_spread: float
    wall_over_dense: float
    wall_over_oracle: float
    counts: Counts
    peak_bytes: int
    peak_over_oracle: float
    captured: dict[str, str] | None = None
    wall_over_captured: float | None = None

    def json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def budget_of(policy: str, tokens: int) -> dict[str, Any]:
    """The budget to prune with: none for policies that drop nothing."""
    return {"tokens": tokens} if any(one.prunes for one in make_policies(policy, {})) else {}


@torch.no_grad()
def calls(
    subject: Subject, policies: Sequence[str], tokens: int, rounds: int, device: str, capture: bool = False
) -> Iterator[Call]:
    """Measure the stock model's call, then that of each of ``policies``; the stock model takes part in every round.

    With ``capture`` calls are captured (`vlm_prune.prune`), those of the stock model first and in every round.

    Of calls of one prompt that are shorter than `SHORT` the shortest of three counts in each round.
    """
    encode, shortened = subject.encode(), subject.shortened("uniform", {"tokens": tokens})
    head = subject.model.get_output_embeddings()

    def oracle() -> None:
        encode()
        head(subject.decoder(**shortened).last_hidden_state[:, -1:])

    least = peak_bytes(oracle, device)

    def one(
        policy: str,
        kept: int,
        times: dict[str, Times],
        found: Counts,
        peak: int,
        captured: dict[str, str] | None = None,
    ) -> Call:
        ours = times.get("ours", times["dense"])
        return Call(
            policy, subject.batch, kept, ours.median, ours.spread, ours.over(times["dense"]),
            ours.over(times["oracle"]), found, peak, peak / least, captured,
            ours.over(times["captured"]) if captured and "captured" in times else None,
        )  # fmt: skip

    first = interleaved({"oracle": oracle}, 1)["oracle"].median
    repeats = 3 if subject.batch == 1 and first < SHORT else 1
    whole = shortest(subject.call, repeats)
    stock = {"dense": whole, "oracle": shortest(oracle, repeats)}
    times = interleaved(stock, rounds)
    yield one("dense", subject.visual, times, counts(subject.call, device), peak_bytes(subject.call, device))
    more: dict[str, Any] = {"capture": True} if capture else {}
    for policy in ("none", *(name for name in policies if name != "none")) if capture else policies:
        budget = budget_of(policy, tokens)
        options = {**budget, **more}
        prune(subject.model, policy, **options)
        try:
            subject.call()
            receipt: Any = subject.model.pruning.receipt
            captured = dict(receipt.captured) if capture else None
            found, peak = counts(subject.call, device), peak_bytes(subject.call, device)
        finally:
            unprune(subject.model)
        taking_turns = {"ours": subject.under(policy, options, whole, warm=1), **stock}
        if capture:
            taking_turns["captured"] = subject.under("none", more, whole, warm=1)
        times = interleaved(taking_turns, rounds)
        yield one(policy, tokens if budget else subject.visual, times, found, peak, captured)
