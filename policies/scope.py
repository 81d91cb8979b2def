"""SCOPE: salient tokens that also cover what the others show (NeurIPS 2025, arXiv 2510.24214).

Follows ``SCOPE`` and ``CLIPVisionTower_SCOPE.forward`` of the released ``scope/clip_encoder.py``. Tokens are picked one
by one, by how much each raises the cosine coverage of the image, times its CLS attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..contract.policy import Keep, Policy
from ..contract.views import FeaturesView, TowerView
from .coverage import Combine, greedy_cover
from .scores import global_attention
from .settings import check_choice, check_number


def salient_cover(
    features: torch.Tensor,
    saliency: torch.Tensor,
    keep: int,
    alpha: float = 1.0,
    combine: Combine = "multi",
    official: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick ``keep`` tokens: int64 ``(batch, keep)`` in picking order, and the final cover ``(batch, units)``.

    Args:
        features: ``(batch, units, channels)``.
        saliency: ``(batch, units)``, nonnegative.
        keep: tokens to pick, up to ``units``.
        alpha: exponent of the saliency.
        combine: whether a token's gain in coverage is multiplied by its saliency or added to it.
        official: work in the dtype of ``features`` and do not guard norms, as the released code does. Otherwise all is
            fp32 or better, a row of zeros is similar to none, and a tile without saliency is covered evenly.
    """
    if official:
        unit = features / features.norm(dim=-1, keepdim=True)
    else:
        dtype = torch.promote_types(features.dtype, torch.float32)
        unit = torch.nn.functional.normalize(features.to(dtype), dim=-1)
        saliency = torch.where(saliency.amax(-1, keepdim=True) > 0, saliency, 1.0)
    weight = saliency.to(unit.dtype) ** alpha
    return greedy_cover(unit @ unit.mT, keep, weight, combine)


@dataclass(frozen=True)
class SCOPE(Policy):
    """SCOPE, between tower and projector (encode stage). The budget applies to each tile separately.

    It differs from the released code in these points:

    - Each tile has a budget. The released code divides a total by the number of tiles in the call, rounding down, so
      that unrelated images of a batch share one.
    - Cosines, coverage and saliency are fp32 or better whatever the model's dtype.
    - With feature rows of zeros, or no CLS attention, the choice is still by coverage; the released code then keeps the
      first tokens of the tile.

    The released code has a second implementation, on projected features inside the prompt, which is not followed here.
    Where a pixel shuffle merges patches, a unit's saliency is the sum over its patches, and coverage that of merged
    features; without CLS the mean query is used. Where tiles become images before tokens are chosen,
    coverage is that of projected features. The paper has no such model.

    Attributes:
        alpha: exponent of the saliency; 0 is coverage alone.
        combine: whether a token's gain in coverage is multiplied by its saliency, the sum over heads (``"multi"``, the
            published rule), or added to it (``"add"``).
        compat: ``"official"`` reproduces the released code: the model's dtype, and norms without a lower limit.
    """

    name: ClassVar[str] = "scope"
    stages: ClassVar[tuple[str, ...]] = ("encode",)
    default_ratio: ClassVar[float] = 64 / 576
    reads_cls: ClassVar[bool] = True
    late: ClassVar[bool] = True

    alpha: float = 1.0
    combine: Combine = "multi"
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, alpha=(0, torch.inf))
        check_choice(self, combine=("multi", "add"), compat=(None, "official"))

    def tower_layers(self, feature_layer: int) -> tuple[int]:
        """The feature layer: its attention is the saliency."""
        return (feature_layer,)

    def encode(self, view: TowerView) -> None:
        """Note the CLS attention of each unit, summed over heads; nothing is cut inside the tower."""
        dtype, heads = view.attention.query.dtype, view.attention.query.shape[1]
        mean = global_attention(view.attention, dtype if self.compat == "official" else None)
        view.carry["cls_attention"] = view.per_unit(mean * heads)

    def encode_final(self, view: FeaturesView) -> Keep:
        """The tokens picked, in their original order."""
        order, _ = salient_cover(
            view.features.detach(),
            view.carry["cls_attention"].detach(),
            view.target,
            self.alpha,
            self.combine,
            self.compat == "official",
        )
        return Keep(order.sort(dim=-1).values)
