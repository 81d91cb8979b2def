"""DoLa: decoding by contrasting layers (Chuang et al., ICLR 2024, arXiv 2309.03883).

Follows the released code, as transformers had it as ``dola_layers`` until 4.5x: early layers go through the
language-model head without the final norm.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..contract.policy import Policy
from .contrast import implausible
from .settings import check_number

if TYPE_CHECKING:
    from ..contract.views import GuideView


def divergence(logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How far two distributions over the last dimension are from their mean: shaped like ``logits`` without it.

    The released code measures from the mean, ``(KL(m || p) + KL(m || q)) / 2``, where the Jensen-Shannon divergence of
    the paper has ``KL(p || m)``; this is the code's. Official: ``_dola_select_contrast``.
    """
    one, two = logits.log_softmax(-1), other.log_softmax(-1)
    mean = (one.exp() + two.exp()) / 2
    each = mean.log().nan_to_num(neginf=0.0) * 2 - one - two
    return (mean * each).sum(-1) / 2


def layer_choice(part: str, depth: int, tied: bool) -> tuple[int, ...]:
    """Every other layer of the lower or upper half (of 20 layers at most), as transformers chose them.

    Layer 0 is the input of the first layer, which with ``tied`` embeddings predicts the token itself: the lower half
    begins with 2 then.
    """
    if part == "high":
        return tuple(range(depth // 2 if depth <= 40 else depth - 20, depth, 2))
    start = 0 if not tied or depth <= 1 else (2 if depth > 2 else 1)
    return tuple(range(start, max(depth // 2 if depth <= 40 else 20, start + 1), 2))


@dataclass(frozen=True)
class DoLa(Policy):
    """DoLa, on the logits: tokens that an early layer finds likely, too, count for less (guide stage).

    The candidate layer whose distribution is furthest from that of the last layer is contrasted. It is chosen for each
    token of each sequence; the released code chooses one for a whole batch. There is no second pass: each candidate
    costs one pass of the language-model head. Tokens that the last layer finds implausible get ``-inf``. Prompts
    without an image are unchanged.

    Attributes:
        layers: the candidates: ``"high"`` or ``"low"``, every other layer of the upper or lower half, or numbers, where
            0 is the input of the first layer. The paper has "high" for short answers, "low" for long ones.
        beta: tokens less than ``beta`` times as likely as the likeliest are excluded; the paper has 0.1.
        alpha: strength of the contrast; the paper's is 1.
    """

    name: ClassVar[str] = "dola"
    stages: ClassVar[tuple[str, ...]] = ("guide",)

    layers: str | tuple[int, ...] = "high"
    beta: float = 0.1
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layers, str):  # configuration files have lists
            object.__setattr__(self, "layers", tuple(self.layers))
        check_number(self, alpha=(0, 100), beta=(0, 1))
        if isinstance(self.layers, str):
            if self.layers not in ("high", "low"):
                raise ValueError(
                    f'layers={self.layers!r}: choose "high", "low", or numbers such as (16, 18, 20)'
                )
        elif not self.layers or min(self.layers) < 0:
            raise ValueError(
                f"layers={self.layers}: choose layers such as (16, 18, 20); 0 is what enters the first"
            )

    def for_decoder(self, config: Any) -> DoLa:
        """This policy with the numbers of its layers, which depend on whether the head is the embedding."""
        if not isinstance(self.layers, str):
            return self
        tied = bool(getattr(config, "tie_word_embeddings", False))
        return replace(self, layers=layer_choice(self.layers, config.num_hidden_layers, tied))

    def early_layers(self, depth: int) -> Collection[int]:
        """``layers``. Raises ValueError for one that does not exist, or is the last."""
        layers = layer_choice(self.layers, depth, False) if isinstance(self.layers, str) else self.layers
        if max(layers) >= depth:
            raise ValueError(
                f"layers={self.layers}: the language model has {depth} layers, and others are compared with the last "
                f"one; choose from 0 to {depth - 1}"
            )
        return layers

    def guide(self, view: GuideView) -> torch.Tensor:
        """Logits less the furthest candidate's log-probabilities; as in the released code up to a constant per row."""
        last = view.logits.log_softmax(-1)
        furthest, chosen = None, last
        for layer in view.early:
            early = view.early[layer].log_softmax(-1)
            distance = divergence(last, early)
            if furthest is None:
                furthest, chosen = distance, early
            else:
                further = distance > furthest
                furthest = torch.where(further, distance, furthest)
                chosen = torch.where(further[..., None], early, chosen)
        new = view.logits - self.alpha * chosen
        return new.masked_fill(implausible(last, self.beta), -torch.inf)
