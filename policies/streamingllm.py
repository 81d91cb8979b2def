"""StreamingLLM's pattern on visual rows of the KV cache (Xiao et al., ICLR 2024, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..contract.policy import Place, Positions, ScorerPolicy
from .settings import check_number

if TYPE_CHECKING:
    from ..contract.views import CacheView


def sinks_then_recent(visual: torch.Tensor, sinks: int) -> torch.Tensor:
    """Scores that rank the first ``sinks`` visual rows highest and later ones of the others above earlier ones.

    ``visual`` is bool ``(batch, rows)``; fp32 of the same shape.
    """
    number = visual.long().cumsum(-1) - 1
    return torch.where(number < sinks, torch.inf, number.float())


@dataclass(frozen=True)
class StreamingLLM(ScorerPolicy):
    """StreamingLLM, in the KV cache (decode stage): the first and the last visual rows of a prompt stay.

    The prefill sees the whole image; then every layer's cache keeps the first `sinks` visual rows, and as many of the
    last ones as the budget allows. It ignores content, so it is the baseline of cache methods.

    Paper's definition, not run against released code. It differs in that only visual rows are evicted, and all text
    stays: so the window does not move while the answer grows, as it would over a whole sequence. Rows keep their
    positions; the paper counts positions inside the cache.

    Attributes:
        sinks: first visual rows that stay; the paper keeps four tokens. A smaller budget keeps the first ones of them.
        positions: has no effect, since cached rows keep the positions that they were computed with.
    """

    name: ClassVar[str] = "streamingllm"
    place: ClassVar[Place] = "cache"
    default_ratio: ClassVar[float] = 0.25

    positions: Positions | None = "original"
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, sinks=(0, 10**6))

    def score(self, view: CacheView) -> torch.Tensor:
        """See `sinks_then_recent`."""
        return sinks_then_recent(view.visual, self.sinks)
