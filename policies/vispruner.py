"""VisPruner: important tokens by CLS attention, and the most diverse of the rest (Zhang et al., ICCV 2025,
arXiv 2412.01818).

Follows ``encode_images`` of the released ``llava/model/llava_arch.py``. Tokens that are not important are dropped a few
at a time: every round splits those left into two alternating halves, and drops the tokens of the first half that are
most similar to some token of the second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..contract.policy import Keep, Policy
from ..contract.views import FeaturesView, TowerView
from ..kernels import gather_rows
from .scores import global_attention
from .settings import check_choice, check_number

PER_ROUND = 8
"""Number of tokens that a round drops."""

Similarity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Cosines ``(batch, a, b)`` of the tokens numbered int64 ``(batch, a)`` with those numbered ``(batch, b)``."""


def drop_alike(order: torch.Tensor, similar: Similarity, keep: int, stable: bool = True) -> torch.Tensor:
    """The tokens left once all but ``keep`` are dropped: int64 ``(batch, keep)``, in the order of the last round.

    Each round drops `PER_ROUND` of the tokens at even places, those most similar to some token at an odd place. The
    other even ones come first in the next round, by descending similarity, and the odd ones after them, so each round
    depends on all rounds before. The number of rounds is known beforehand: nothing waits for the device.

    Args:
        order: int64 ``(batch, tokens)``, in the order in which the first round takes them.
        similar: says how similar tokens are.
        keep: tokens to leave, up to all.
        stable: drop the earlier of equal tokens; otherwise torch decides, as in the released code.
    """
    if keep == 0:
        return order[:, :0]
    while (left := order.shape[1]) > keep:
        even, odd = order[:, ::2], order[:, 1::2]
        nearest = similar(even, odd).amax(-1)
        rank = nearest.argsort(dim=-1, descending=True, stable=stable)
        rank = rank[:, min(PER_ROUND, left - keep, even.shape[1]) :]
        order = torch.cat([even.gather(1, rank), odd], dim=1)
    return order


def looked_up(features: torch.Tensor) -> Similarity:
    """Cosines of ``features`` ``(batch, tokens, channels)`` in fp32 or better, all computed at once.

    A row of zeros is similar to no token.
    """
    unit = torch.nn.functional.normalize(
        features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1
    )
    cosine, tokens = (unit @ unit.mT).flatten(1), features.shape[1]

    def similar(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        pairs = (a * tokens)[..., None] + b[:, None]
        return cosine.gather(1, pairs.flatten(1)).view(pairs.shape)

    return similar


def as_released(features: torch.Tensor) -> Similarity:
    """Cosines in the dtype of ``features``, computed in each round, so that rounding is that of the released code."""
    unit = features / features.norm(dim=-1, keepdim=True)
    return lambda a, b: gather_rows(unit, a) @ gather_rows(unit, b).mT


def choose(
    attention: torch.Tensor, features: torch.Tensor, keep: int, share: float, official: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Important and diverse tokens: int64 ``(batch, a)`` by descending attention and ``(batch, keep - a)``.

    Args:
        attention: ``(batch, tokens)``.
        features: ``(batch, tokens, channels)``.
        keep: tokens to keep, up to all.
        share: of the kept tokens that are important, rounded down.
        official: compare in the dtype of ``features`` and leave the order of equal tokens to torch.
    """
    important = int(keep * share)
    order = attention.argsort(dim=-1, descending=True, stable=not official)
    similar = as_released(features) if official else looked_up(features)
    rest = drop_alike(order[:, important:], similar, keep - important, stable=not official)
    return order[:, :important], rest


@dataclass(frozen=True)
class VisPruner(Policy):
    """VisPruner, between tower and projector (encode stage). The budget applies to each tile separately.

    The default mode differs from the released code in these points:

    - A round can start with any number of tokens. The released code raises an error if it is odd, or if half of it is
      less than what the round must drop (budgets that leave fewer than eight diverse tokens).
    - Scores and cosines are fp32 or better, and of equal tokens the earlier one comes first. The released code works in
      the model's dtype, where many cosines are equal, and leaves their order to the device: in half precision about a
      third of its tokens differ from those of exact arithmetic.
    - A token of zeros is similar to no other; in the released code its cosines are NaN.
    - Prompts may have several images, and tiles are those of the model's own code. The released code takes one image,
      gives LLaVA-NeXT five tiles whatever its shape, and omits newlines and the trimming of padding.

    One changed token can change half of the diverse ones, as every drop affects all later rounds: compare results, not
    the tokens kept. Without CLS the mean query is used; where a pixel shuffle merges patches, a unit's score is the sum
    over its patches, and the merged features are compared. The paper has no such model.

    Attributes:
        important_share: share of the kept tokens that are chosen by attention alone, rounded down. Released scripts
            have 0.5, and 0.75 for one benchmark.
        compat: ``"official"`` reproduces the released code where it runs, on the CPU even the order of equal tokens.
    """

    name: ClassVar[str] = "vispruner"
    stages: ClassVar[tuple[str, ...]] = ("encode",)
    default_ratio: ClassVar[float] = 128 / 576
    reads_cls: ClassVar[bool] = True

    important_share: float = 0.5
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, important_share=(0, 1))
        check_choice(self, compat=(None, "official"))

    def tower_layers(self, feature_layer: int) -> tuple[int]:
        """The feature layer: its attention is the score."""
        return (feature_layer,)

    def encode(self, view: TowerView) -> None:
        """Note the CLS attention of each unit; nothing is cut inside the tower."""
        dtype = view.attention.query.dtype if self.compat == "official" else None
        view.carry["cls_attention"] = view.per_unit(global_attention(view.attention, dtype))

    def encode_final(self, view: FeaturesView) -> Keep:
        """Important and diverse tokens, in their original order."""
        parts = choose(
            view.carry["cls_attention"],
            view.features.detach(),
            view.target,
            self.important_share,
            self.compat == "official",
        )
        return Keep(torch.cat(parts, dim=1).sort(dim=-1).values)
