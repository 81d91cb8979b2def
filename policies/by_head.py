"""Policies that keep visual rows in the KV cache head by head: what SnapKV, H2O and VL-Cache have in common."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..contract.keep import top_mask
from ..contract.policy import Evicted, Policy, Positions

if TYPE_CHECKING:
    from ..contract.views import CacheView


def mean_of_groups(scores: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """``(batch, heads, rows)`` averaged over query heads that share a KV head: ``(batch, kv_heads, rows)``."""
    return scores.unflatten(1, (kv_heads, -1)).mean(2)


def top_by_head(scores: torch.Tensor, count: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """`top_mask` in each head of ``scores`` ``(batch, heads, rows)``, among the same ``(batch, rows)`` in all heads."""
    batch, heads, rows = scores.shape
    among = among[:, None].expand(-1, heads, -1).reshape(-1, rows)
    return top_mask(scores.flatten(0, 1), count.repeat_interleave(heads), among).view(batch, heads, rows)


@dataclass(frozen=True)
class KeepsByHead(Policy):
    """Base of policies that observe each layer of the prefill and keep the highest visual rows of each KV head.

    Attributes:
        positions: has no effect, since cached rows keep the positions that they were computed with.
    """

    stages: ClassVar[tuple[str, ...]] = ("decode",)
    default_ratio: ClassVar[float] = 0.25
    by_head: ClassVar[bool] = True

    positions: Positions | None = "original"

    def observed_layers(self, depth: int) -> Collection[int]:
        """All."""
        return range(depth)

    def evicted_layers(self, depth: int) -> Collection[int]:
        """All."""
        return range(depth)

    def evict(self, view: CacheView) -> Evicted:
        """The visual rows of highest score in each head, as many as the budget allows."""
        return None if view.scores is None else top_by_head(view.scores, view.target, view.visual)
