"""MMTok: tokens that cover both the question and the image (ICLR 2026, arXiv 2508.18264).

Follows ``mm_coverage_selection`` of the released ``mmtok/core/semantic_selector.py``. Each word of the question, and
each token of the image, spreads a total of 1 over the tokens by a softmax of cosines; tokens are picked one by one so
that the largest share of any picked token, summed over all of these, grows most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch.nn.functional import normalize

from ..contract.policy import Keep, Place, Policy, SelectPolicy
from ..contract.views import EntryView
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
        alpha: weight of the image relative to the text.
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
class MMTok(SelectPolicy):
    """MMTok, at the decoder's entry, where the question is known. The budget applies to each tile separately.

    It differs from the released code in these points:

    - The question is all text after the prompt's last image, as the decoder's embeddings. The released code takes the
      user's words out of the conversation and drops a list of stop words; what a chat template writes after the image
      counts here.
    - Features are normalised in fp32, where a row of zeros in half precision does no harm, and never more tokens are
      picked than there are candidates. The released code picks the first token again and again in both cases.
    - Tiles of several images, and of a batch, use the question in their own sequence; the released code takes
      one image.
    - Patches that show nothing but padding may be picked; stock processors crop instead of padding. The functions take
      `candidates`.

    Where patches are merged into one token before the projector, tokens are alike by what enters it: by patches side by
    side after a pixel shuffle, by their mean in Qwen's towers, as in the released code. Where no more than
    finished features is known of a model, tokens are alike by these.

    Attributes:
        alpha: weight of covering the image relative to covering the text.
        text_temperature: of the softmax over tokens for each word; ``None`` is the released 0.02, on Qwen 0.01.
        image_temperature: of the softmax over tokens for each token.
        compat: ``"official"`` normalises in the model's dtype.
    """

    name: ClassVar[str] = "mmtok"
    place: ClassVar[Place] = "entry"
    default_ratio: ClassVar[float] = 64 / 576
    reads_tower: ClassVar[bool] = True

    alpha: float = 0.5
    text_temperature: float | None = None
    image_temperature: float = 0.2
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, alpha=(0, torch.inf), image_temperature=(1e-3, torch.inf))
        check_number(self, optional=True, text_temperature=(1e-3, torch.inf))
        check_choice(self, compat=(None, "official"))

    def for_family(self, family: str, mrope: bool) -> Policy:
        """With the temperature that was released for the family."""
        if self.text_temperature is None:
            released = 0.01 if family.startswith("qwen") else 0.02
            return replace(self, text_temperature=released).for_family(family, mrope)
        return super().for_family(family, mrope)

    def select(self, view: EntryView) -> Keep:
        """The tokens picked, in their original order."""
        tower = view.features if view.tower is None else view.tower
        order = multimodal_cover(
            tower.detach(),
            view.target,
            view.text.detach(),
            view.features.detach(),
            view.question,
            alpha=self.alpha,
            text_temperature=self.text_temperature or 0.02,
            image_temperature=self.image_temperature,
            official=self.compat == "official",
        )
        return Keep(order.sort(dim=-1).values)
