"""MMTok: tokens that cover both the question and the image (ICLR 2026, arXiv 2508.18264).

Follows ``mm_coverage_selection`` of the released ``mmtok/core/semantic_selector.py``. Each word of the question, and
each token of the image, spreads one unit over the tokens by a softmax of cosines; tokens are picked one by one so that
the largest share which a picked token has of each grows most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import normalize

from ..contract.policy import Keep, Policy
from ..contract.views import FeaturesView
from .coverage import greedy_cover
from .settings import check_choice, check_number


def spread(
    rows: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float,
    valid: torch.Tensor | None = None,
    official: bool = False,
) -> torch.Tensor:
    """How each row spreads over the tokens, all rows together 1: fp32 or better ``(batch, rows, tokens)``.

    Args:
        rows: ``(batch, rows, channels)``.
        tokens: ``(batch, tokens, channels)``.
        temperature: of the softmax of cosines, over tokens.
        valid: bool ``(batch, rows)``, rows that count; ``None`` if all do.
        official: normalise in the inputs' dtype, in which a row of zeros may become NaN.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)

    def unit(x: torch.Tensor) -> torch.Tensor:
        if official:
            return (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-8)).to(dtype)
        return normalize(x.to(dtype), dim=-1)

    share = (unit(rows) @ unit(tokens).mT / temperature).softmax(-1)
    if valid is None:
        return share / max(rows.shape[1], 1)
    return share * (valid / valid.sum(-1, keepdim=True).clamp(min=1))[..., None]


def multimodal_cover(
    tower: torch.Tensor,
    keep: int,
    text: torch.Tensor | None = None,
    projected: torch.Tensor | None = None,
    text_valid: torch.Tensor | None = None,
    candidates: torch.Tensor | None = None,
    alpha: float = 0.5,
    text_temperature: float = 0.02,
    image_temperature: float = 0.2,
    official: bool = False,
) -> torch.Tensor:
    """Pick ``keep`` tokens that cover text and image: int64 ``(batch, keep)`` in picking order.

    Args:
        tower: ``(batch, units, channels)``, what enters the projector: by it tokens of the image are alike.
        keep: tokens to pick, up to ``units``, and up to the number of candidates.
        text: ``(batch, words, width)``, embeddings of the question; ``None`` covers the image alone.
        projected: ``(batch, units, width)``, the tokens in the space of ``text``.
        text_valid: bool ``(batch, words)``; ``None`` if all count.
        candidates: bool ``(batch, units)``, tokens that may be picked, for instance those that show more than padding.
            The others still take part in the softmax, as in the released code. ``None`` for all.
        alpha: weight of the image beside the text.
        text_temperature, image_temperature: of the two softmaxes.
        official: see `spread`.
    """
    worth = spread(tower, tower, image_temperature, official=official) * alpha
    if text is not None and projected is not None:
        of_text = spread(text, projected, text_temperature, text_valid, official)
        worth = torch.cat([of_text, worth.to(of_text.dtype)], 1)
    order, _ = greedy_cover(worth, keep, candidates=candidates)
    return order


@dataclass(frozen=True)
class MMTok(Policy):
    """MMTok, between tower and projector (encode stage). The budget holds for each tile by itself.

    It differs from the released code in that features are normalised in fp32, where a row of zeros in half precision
    does no harm, and that never more tokens are picked than there are candidates.

    Attributes:
        alpha: weight of covering the image beside covering the text.
        text_temperature: of the softmax over tokens for each word. 0.02 for LLaVA, 0.01 for Qwen2.5-VL as released.
        image_temperature: of the softmax over tokens for each token.
        compat: ``"official"`` normalises in the model's dtype.
    """

    name: ClassVar[str] = "mmtok"
    stages: ClassVar[tuple[str, ...]] = ("encode",)
    default_ratio: ClassVar[float] = 64 / 576
    late: ClassVar[bool] = True

    alpha: float = 0.5
    text_temperature: float = 0.02
    image_temperature: float = 0.2
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, alpha=(0, torch.inf))
        check_number(self, text_temperature=(1e-3, torch.inf), image_temperature=(1e-3, torch.inf))
        check_choice(self, compat=(None, "official"))

    def encode_final(self, view: FeaturesView) -> Keep:
        """The tokens that cover the image, in their original order; no question is known here."""
        order = multimodal_cover(
            view.features.detach(),
            view.target,
            image_temperature=self.image_temperature,
            official=self.compat == "official",
        )
        return Keep(order.sort(dim=-1).values)
