"""What the encode stages of all vLLM models share: a budget that holds for a block, and the heads of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from ..call.budget import Budget
from ..call.encode_call import encoding
from ..call.timing import Stopwatch
from ..composition import Composition
from ..contract.policy import Keep, Policy
from ..contract.views import FeaturesView, TowerView
from .towers import PackedParts, Parts

Gather = Callable[[torch.Tensor], torch.Tensor]
"""Joins the last dimension of a tensor over the tensor-parallel ranks."""


class NoReceipt:
    """vLLM has its own metrics: receipts are discarded."""

    def new_receipt(self, *args: Any) -> Any:
        """A receipt that records nothing."""
        return SimpleNamespace()

    def publish(self, receipt: Any) -> None:
        """Nobody reads it."""


class ServedStage:
    """Mix-in for an `EncodeStage` on the modules of a vLLM model.

    Args:
        parts: the modules.
        gather: joins heads, where a tensor-parallel rank holds a share of them.
        policy: of the encode stage.

    Attributes:
        active: whether the tower prunes now.
        heads: of a tower layer, over all tensor-parallel ranks.
        times: functions that return the milliseconds that policies took to choose in this block; they may wait.
    """

    active: bool = False
    budget: Budget
    session: Any

    def __init__(self, parts: Parts | PackedParts, gather: Gather, policy: Policy):
        alone = Composition((policy,), (policy,), Budget(ratio=1.0))
        super().__init__(parts.tower, parts.projector, alone, NoReceipt())  # type: ignore[call-arg]
        self.heads, self.gather = parts.heads, gather
        self.times: list[Callable[[], float]] = []

    @contextmanager
    def keeping(self, units: int) -> Iterator[None]:
        """Within the block, the tower keeps this many units of each tile. Outside of it, the tower is stock."""
        self.active, self.budget, self.times = True, Budget(tokens=units), []
        try:
            with encoding(self.session, once=False):
                yield
        finally:
            self.active = False

    def ask_layer(self, number: int, view: TowerView, whole: bool) -> list[Keep]:
        """What the policy answers after a tower layer, and how long it took."""
        stopwatch = Stopwatch(view.hidden.device)
        answers: list[Keep] = super().ask_layer(number, view, whole)  # type: ignore[misc]
        self.times.append(stopwatch.stop())
        return answers

    def ask_final(self, view: FeaturesView, after_projector: bool | None = None) -> Keep | None:
        """The same after the tower, and around the projector."""
        stopwatch = Stopwatch(view.features.device)
        answer: Keep | None = super().ask_final(view, after_projector)  # type: ignore[misc]
        self.times.append(stopwatch.stop())
        return answer

    def all_heads(self, states: torch.Tensor, head_size: int) -> torch.Tensor:
        """Queries, keys and values of the heads of all ranks, which have to agree on the tokens to keep.

        ``(3, tiles, tokens, heads of this rank * head size)`` -> ``(3, tiles, heads, tokens, head size)``.
        """
        if states.shape[-1] < self.heads * head_size:
            states = self.gather(states)
        return states.unflatten(-1, (-1, head_size)).transpose(2, 3)
