"""VisPruner: important tokens by CLS attention, and of the rest those least alike (Zhang et al., ICCV 2025,
arXiv 2412.01818).

Follows ``encode_images`` of the released ``llava/model/llava_arch.py``. Tokens that are not important leave a few at a
time: every round splits those left into two halves by turns, and drops the ones of the first half that are most like
some token of the second.
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
"""Tokens that a round drops, whatever the number of tokens."""

Similarity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Cosines ``(batch, a, b)`` of the tokens numbered int64 ``(batch, a)`` with those numbered ``(batch, b)``."""


def drop_alike(order: torch.Tensor, similar: Similarity, keep: int, stable: bool = True) -> torch.Tensor:
    """The tokens left once all but ``keep`` are dropped: int64 ``(batch, keep)``, in the order of the last round.

    Each round drops `PER_ROUND` of the tokens at even places, those whose nearest token at an odd place is nearest;
    the others at even positions go to the front, by descending similarity, the odd ones after them. So which tokens
    meet in the next round depends on all rounds before. The number of rounds is known beforehand: nothing waits for the
    device.

    Args:
        order: int64 ``(batch, tokens)``, in the order in which the first round takes them.
        similar: says how similar tokens are.
        keep: tokens to leave, up to all.
        stable: of equals drop the earlier one; else leave that to torch, as the released code does.
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

    A row of zeros is like nothing.
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
    """Cosines in the dtype of ``features``, computed round by round, so that they round as the released ones do."""
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
        official: compare in the dtype of ``features`` and leave the order of equals to torch.
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

    - Any number of tokens may be left to a round. The released code stops with an error where it is odd, and where
      half of it is less than what the round must drop (budgets that leave fewer than eight diverse tokens).
    - Scores and cosines are fp32 or better, and of equals the earlier token comes first. The released code works in the
      model's dtype, where many cosines are equal, and leaves their order to the device: in half precision about a third
      of its tokens are others than those of exact arithmetic.
    - A token of zeros is like no other; in the released code its cosines are NaN.
    - Several images a prompt, and tiles as the model's own code makes them. The released code takes one image, shows it
      to LLaVA-NeXT as five tiles whatever its shape, and leaves out newlines and the trimming of padding.

    One changed token can change half of the diverse ones, as every drop moves all later rounds: compare results, not
    places. Without CLS the mean query is used; where a pixel shuffle merges patches, a unit's score is the sum
    over its patches, and the merged features are compared. The paper has no such model.

    Attributes:
        important_share: share of the kept tokens that attention alone chooses, rounded down. Released scripts have 0.5,
            and 0.75 for one benchmark.
        compat: ``"official"`` reproduces the released code where it runs, the order of equals on the CPU included.
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
