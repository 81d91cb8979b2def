"""VisionZip: dominant tokens by CLS attention, the rest merged into contextual ones (Yang et al., CVPR 2025,
arXiv 2412.04467).

Follows the released ``visionzip/clip_encoder.py`` (training-free mode). Both kinds are made from the feature layer:
its CLS attention ranks the tokens, its keys say which of the others are alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..contract.policy import Keep, Policy
from ..contract.views import FeaturesView, TowerView
from ..kernels import gather_rows, merge_rows, numbers
from .scores import global_attention
from .settings import check_choice, check_number


def assign(attention: torch.Tensor, keys: torch.Tensor, dominant: int, contextual: int) -> torch.Tensor:
    """The token into which each token goes: int64 ``(batch, units)``.

    Dominant tokens, those of highest attention, and contextual ones, spread evenly over the others, name themselves.
    Every other token names the contextual one whose key has the highest cosine with its own, or -1 if there is none.
    Of equals the earlier one is taken.

    Args:
        attention: ``(batch, units)``.
        keys: ``(batch, units, channels)``, of any length.
        dominant, contextual: how many are wanted, together ``units`` at most.
    """
    batch, units = attention.shape
    order = attention.argsort(dim=-1, descending=True, stable=True)
    into = numbers(units, order.device).expand(batch, -1)
    rest = order[:, dominant:].sort(dim=-1).values
    if contextual == 0:
        return into.scatter(1, rest, -1)
    step = rest.shape[1] // contextual
    spread = slice(0, step * contextual, step)
    unit = keys.gather(1, rest[..., None].expand(-1, -1, keys.shape[2]))
    unit = torch.nn.functional.normalize(unit, dim=-1)
    nearest = (unit @ unit[:, spread].mT).argmax(-1)
    nearest[:, spread] = numbers(contextual, order.device)
    return into.scatter(1, rest, rest[:, spread].gather(1, nearest))


def merge(
    features: torch.Tensor, into: torch.Tensor, index: torch.Tensor, combine: str = "add"
) -> torch.Tensor:
    """The kept tokens after the others were merged into them: ``(batch, kept, channels)``.

    Args:
        features: ``(batch, units, channels)``.
        into: where each token goes, as `assign` gives it.
        index: int64 ``(batch, kept)``, the tokens that stay. One into which no other is merged does not change.
        combine: ``"add"`` adds the mean of those that go into a token to it, ``"mean"`` averages them all.
    """
    own = gather_rows(features, index).to(torch.promote_types(features.dtype, torch.float32))
    place = numbers(index.shape[1], into.device).expand_as(index)
    slot = torch.full_like(into, -1).scatter(1, index, place).gather(1, into.clamp(min=0))
    leaves = (into >= 0) & (into != numbers(into.shape[1], into.device))
    slot, one = slot.masked_fill(~leaves, -1), leaves.to(own.dtype)
    total = merge_rows(features, slot, one, index.shape[1])
    count = own.new_zeros(index.shape).scatter_add(1, slot.clamp(min=0), one * (slot >= 0))[..., None]
    merged = (own + total) / (1 + count) if combine == "mean" else own + total / count.clamp(min=1)
    return merged.to(features.dtype)


@dataclass(frozen=True)
class VisionZip(Policy):
    """VisionZip, between tower and projector (encode stage). The budget applies to each tile separately.

    It differs from the released code in these points: a contextual token is placed at its target, in raster
    order, not after the dominant ones; scores and similarities are fp32 or better; ties go to the earlier token. The
    released code counts a CLS token among the dominant ones; it is counted here, too, where the model keeps it
    (``vision_feature_select_strategy="full"``), and all tokens are patches where it does not.

    Where a pixel shuffle merges patches, a unit's score is the sum over its patches, and its key their mean.

    Attributes:
        contextual_share: share of the kept tokens that are contextual. The paper's 10 of 64, 20 of 128 and 30 of 192
            are all 10/64.
        combine: how a contextual token is made. ``"add"``, the published rule, adds the mean of all tokens that join it
            to the target token, which about doubles its norm; ``"mean"`` averages them all.
    """

    name: ClassVar[str] = "visionzip"
    stages: ClassVar[tuple[str, ...]] = ("encode",)
    default_ratio: ClassVar[float] = 128 / 576
    reads_cls: ClassVar[bool] = True

    contextual_share: float = 10 / 64
    combine: Literal["add", "mean"] = "add"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, contextual_share=(0, 1))
        check_choice(self, combine=("add", "mean"))

    def tower_layers(self, feature_layer: int) -> tuple[int]:
        """The feature layer: its attention and keys decide."""
        return (feature_layer,)

    def encode(self, view: TowerView) -> None:
        """Decide which tokens stay, and which are merged into them; nothing is cut inside the tower."""
        seen = view.attention
        attention = view.per_unit(global_attention(seen))
        keys = seen.key.to(attention.dtype).mean(1)
        # the sum over a unit's patches has the direction of their mean, and only the direction matters
        keys = view.per_unit(keys[:, 1:] if seen.has_cls else keys)
        contextual = self._contextual(view.target)
        view.carry["cls_attention"] = attention
        view.carry["visionzip_into"] = assign(attention, keys, view.target - contextual, contextual)

    def encode_final(self, view: FeaturesView) -> Keep:
        """Dominant tokens as they are, contextual ones merged, all in raster order."""
        into = view.carry["visionzip_into"]
        stays = into == numbers(into.shape[1], into.device)
        index = stays.view(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, : view.target]
        if self._contextual(view.target) == 0:
            return Keep(index)
        return Keep(index, rows=merge(view.features, into, index, self.combine))

    def _contextual(self, target: int) -> int:
        """How many of ``target`` tokens are contextual."""
        return round(target * self.contextual_share)
