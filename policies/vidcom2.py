"""VidCom2: distinctive frames keep more tokens (Liu et al., EMNLP 2025, arXiv 2505.14454).

Follows ``token_compressor/vidcom2/vidcom2.py`` of the released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..contract.policy import Keep, Place, SelectPolicy
from ..contract.views import FeaturesView
from .settings import check_choice, check_number

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
"""Variances of the Gaussians whose sum is the similarity."""


def steady_channels(features: torch.Tensor) -> torch.Tensor:
    """The half of the channels, rounded down, that varies least over the tokens: ``(batch, tokens, channels // 2)``.

    Of equal channels the first ones are taken; at least one is.
    """
    variance = features.var(dim=1, unbiased=False)
    steady = variance.argsort(dim=-1, stable=True)[:, : max(1, features.shape[2] // 2)]
    return features.gather(2, steady[:, None].expand(-1, features.shape[1], -1))


def likeness(features: torch.Tensor, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How similar each token is to the mean of its video, and to that of its frame: two ``(batch, frames, tokens)``.

    Tokens are normalised, and the similarity is the sum of Gaussians of the distance, with the variances `WIDTHS`.

    Args:
        features: ``(batch, frames * tokens, channels)``.
        frames: number of frames.
    """
    unit = torch.nn.functional.normalize(features, dim=-1).unflatten(1, (frames, -1))

    def like(centre: torch.Tensor) -> torch.Tensor:
        distance = (unit - centre).square().sum(-1)
        return torch.stack([(-distance / (2 * width)).exp() for width in WIDTHS]).sum(0)

    return like(unit.mean((1, 2), keepdim=True)), like(unit.mean(2, keepdim=True))


def frame_counts(to_video: torch.Tensor, ratio: float, temperature: float) -> torch.Tensor:
    """Tokens to keep of each frame, by how distinct it is from the video: int64 ``(batch, frames)``, at least one.

    The share of a frame is ``ratio``, times one plus its weight in a softmax over the frames less the mean weight.
    Counts are rounded one by one, so their sum is not exactly ``ratio`` of all.

    Args:
        to_video: the first result of `likeness`.
        ratio: from 0 to 1.
        temperature: temperature of the softmax.
    """
    part = (-to_video.mean(-1) / temperature).softmax(-1)
    share = (ratio * (1 + part - part.mean(-1, keepdim=True))).clamp(max=1)
    tokens = to_video.shape[2]
    return (share * tokens).round().long().clamp(min=1, max=tokens)


def least_alike(like: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The ``counts`` ``(batch, frames)`` least similar tokens of each frame: bool ``(batch, frames, tokens)``.

    Of equal tokens the first one is taken, and NaN counts as most similar.
    """
    order = like.nan_to_num(nan=torch.finfo(like.dtype).max).argsort(dim=-1, stable=True)
    return order.argsort(dim=-1) < counts[..., None]


@dataclass(frozen=True)
class VidCom2(SelectPolicy):
    """VidCom2, after the projector, over all frames of a video. Frames share the budget of the video.

    Tokens similar to the mean of their video and of their frame are dropped. A frame whose tokens differ more from the
    video keeps more of them. The budget is per frame, and frames of a video share the sum; with ``per="image"`` it is
    for the whole video. An image is a video of one frame: the tokens least similar to their mean stay.

    The default mode differs from the released code in these points:

    - Exactly the budget is kept. Counts of frames are rounded one by one: where they sum to more, the most similar
      tokens of any frame are dropped; where they sum to less, the next ones are kept. vLLM does the same, but rounds
      the budget down and keeps at least one token per frame; here a smaller budget leaves frames without any.
    - Scores are fp32 or better, and of equal tokens the earlier one comes first. A single channel is used as it is.
    - Frames share a budget on families that tell which frames form a video. InternVL treats frames like tiles of
      images, each with a separate budget.

    Attributes:
        temperature: temperature of the softmax over frames: the higher, the more evenly they share the budget.
        compat: ``"official"`` reproduces the released code: rounded counts, and scores in the model's dtype. The
            budget is then met on average only.
    """

    name: ClassVar[str] = "vidcom2"
    place: ClassVar[Place] = "projected"
    over_frames: ClassVar[bool] = True
    default_ratio: ClassVar[float] = 0.25

    temperature: float = 0.01
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, temperature=(1e-4, 1e4))
        check_choice(self, compat=(None, "official"))

    def select(self, view: FeaturesView) -> Keep:
        """The tokens that stay of each video, in their original order."""
        x, units = view.features.detach(), view.features.shape[1]
        x = x if self.compat else x.to(torch.promote_types(x.dtype, torch.float32))
        to_video, to_frame = likeness(steady_channels(x), view.frames)
        like = to_video + to_frame
        counts = frame_counts(to_video, view.target / units, self.temperature)
        first = least_alike(like, counts).flatten(1)
        if self.compat:
            return Keep.from_mask(first, units)
        order = like.flatten(1).nan_to_num(nan=torch.finfo(like.dtype).max).argsort(dim=-1, stable=True)
        rank = order.gather(1, (~first.gather(1, order)).to(torch.int8).argsort(dim=-1, stable=True))
        return Keep(rank[:, : view.target].sort(dim=-1).values)
