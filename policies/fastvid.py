"""FastVID: a video in segments, salient tokens of each frame, and the rest merged into a few (Shen et al.,
NeurIPS 2025, arXiv 2503.11187).

Follows ``fastvid_llavaonevision/LLaVA-NeXT/llava/model/language_model/modeling_qwen2.py`` of the released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..contract.policy import Keep, Policy, Positions
from ..contract.views import FeaturesView, TowerView
from .scores import global_attention
from .settings import check_number

NEIGHBOURS = 4
"""Number of nearest tokens, the token itself included, from which density is computed."""

ATTENTION = "cls_attention"


def segment_lengths(features: torch.Tensor, frames: int, least: int, alike: float) -> list[list[int]]:
    """The number of frames in each segment of each video. Waits for the device if there are several frames.

    A segment ends between two frames whose mean features have a cosine below ``alike``, and at the ``least - 1``
    smallest cosines.

    Args:
        features: ``(batch, frames * tokens, channels)``, fp32 or better.
    """
    if frames == 1:
        return [[1]] * len(features)
    mean = torch.nn.functional.normalize(features.unflatten(1, (frames, -1)).mean(2), dim=-1)
    cosine = (mean[:, 1:] * mean[:, :-1]).sum(-1)
    rank = cosine.argsort(dim=-1, stable=True).argsort(dim=-1)
    cuts = ((rank < least - 1) | (cosine < alike)).tolist()
    found = []
    for cut in cuts:
        ends = [*(i + 1 for i, here in enumerate(cut) if here), frames]
        found.append([end - begin for begin, end in zip([0, *ends], ends, strict=False)])
    return found


def even_parts(total: int, parts: int) -> list[int]:
    """``total`` as a sum of ``parts`` numbers that differ by at most 1, the larger ones first."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def density_scores(x: torch.Tensor) -> torch.Tensor:
    """The density around each token times the distance to the nearest denser one: ``(tokens,)``.

    ``x`` is ``(tokens, channels)``, fp32 or better; for the densest token the largest distance of all is used.
    """
    distance = torch.cdist(x, x) / x.shape[1] ** 0.5
    near = distance.topk(min(NEIGHBOURS, len(x)), dim=-1, largest=False).values
    density = (-near.square().mean(-1)).exp()
    denser = density[None] > density[:, None]
    return torch.where(denser, distance, distance.max()).amin(-1) * density


def merge_into(centres: torch.Tensor, tokens: torch.Tensor, least: float) -> torch.Tensor:
    """Each of ``centres`` ``(some, channels)`` merged with the ``tokens`` ``(many, channels)`` that are nearest to it.

    Nearest by cosine; ``tokens`` may include the centre. With ``n`` such tokens the weight of the centre itself is
    ``1 / (n + 1)``, at least ``least``, and that of their mean is the rest.
    """
    unit, aims = (torch.nn.functional.normalize(x, dim=-1) for x in (tokens, centres))
    nearest = (unit @ aims.mT).argmax(-1, keepdim=True)
    member = (nearest == torch.arange(len(centres), device=nearest.device)).to(tokens.dtype)
    count = member.sum(0)[:, None]
    weight = (1 / (count + 1)).clamp(min=least)
    return weight * centres + (1 - weight) * (member.mT @ tokens) / count.clamp(min=1)


def anchors_of(frames: range, every: int, wanted: int, room: int) -> tuple[list[int], int]:
    """The number of frames of a segment that hold its merged tokens, and their spacing, counted from the end.

    Each frame has ``room`` for that many of the ``wanted`` tokens; where that is too little, more frames are taken.
    """
    while every > 1 and -(-len(frames) // every) * room < wanted:
        every -= 1
    return [f for f in frames if (frames.stop - 1 - f) % every == 0], every


def compress(
    x: torch.Tensor,
    attention: torch.Tensor,
    segments: Sequence[int],
    target: int,
    share: float,
    every: int,
    least: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens kept of one video, int64 ``(target,)`` ascending, and their new features ``(target, channels)``.

    Args:
        x: ``(frames, tokens, channels)``.
        attention: ``(frames, tokens)``, the saliency of each.
        segments: frames of each segment.
        target: tokens to keep.
        share: share of a frame's budget for merged tokens, rounded down.
        every: one frame of so many in a segment holds merged tokens.
        least: least weight of a token among those merged into it.
    """
    frames, tokens, _ = x.shape
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    budgets = even_parts(target, frames)
    context = [int(budget * share) for budget in budgets]
    salient = [budget - merged for budget, merged in zip(budgets, context, strict=True)]
    order = attention.argsort(dim=-1, descending=True, stable=True)
    places, rows, rest = [], [], []
    for f in range(frames):
        chosen = order[f, : salient[f]]
        places.append(chosen + f * tokens)
        rows.append(x[f, chosen])
        rest.append(order[f, salient[f] :].sort().values)
    begin = 0
    for length in segments:
        segment = range(begin, begin + length)
        begin += length
        wanted = sum(context[f] for f in segment)
        anchors, step = anchors_of(segment, every, wanted, tokens - max(salient[f] for f in segment))
        everything = None if step == 1 else torch.cat([exact[f, rest[f]] for f in segment])
        for f, count in zip(anchors, even_parts(wanted, len(anchors)), strict=True):
            if count:
                mine = exact[f, rest[f]]
                score = density_scores(mine.detach())
                centres = score.argsort(descending=True, stable=True)[:count]
                merged = merge_into(mine[centres], mine if everything is None else everything, least)
                places.append(rest[f][centres] + f * tokens)
                rows.append(merged.to(x.dtype))
    place, back = torch.cat(places).sort()
    return place, torch.cat(rows)[back]


@dataclass(frozen=True)
class FastVID(Policy):
    """FastVID, after the projector, over all frames of a video, which is split into segments of similar frames.

    Each frame keeps its salient tokens, those that CLS attends to. The rest of the budget goes to every fourth frame of
    a segment, counted from its end: it keeps tokens in dense regions, and each becomes a mean of itself and of all
    tokens of the segment that are nearest to it. The budget is per frame, and a segment's frames share the sum; with
    ``per="image"`` it is for the whole video. An image is a video of one frame.

    It differs from the released code in these points:

    - Exactly the budget is kept. The released code loses the remainder of dividing by the frames of a segment, and
      fails if a budget exceeds the room in every fourth frame; here more frames take part then.
    - The similarity of frames is that of their mean projected tokens, and attention from CLS (the mean query of a tower
      without it) gives the saliency. The released code takes both from the pooling head of SigLIP, which Hugging Face
      checkpoints lack. The threshold is the released one nevertheless.
    - Scores are fp32 or better, and of equal tokens the earlier one comes first; the released code adds noise.
    - Videos with fewer frames than segments are split between all frames; the released code fails there.
    - InternVL treats frames like tiles of images, each a video of one frame.

    With deepstack, a merged token gets the deepstack features of the token at whose place it is.

    Attributes:
        segments: least number of segments in a video.
        alike: cosine of two frames below which a segment ends.
        merged_share: share of the budget for tokens into which others are merged.
        every: one frame of so many in a segment holds merged tokens.
        own_weight: least weight of a token among those merged into it.
    """

    name: ClassVar[str] = "fastvid"
    stages: ClassVar[tuple[str, ...]] = ("encode",)
    default_ratio: ClassVar[float] = 0.1
    after_projector: ClassVar[bool] = True
    late: ClassVar[bool] = True
    over_frames: ClassVar[bool] = True
    reads_cls: ClassVar[bool] = True

    positions: Positions | None = "original"
    segments: int = 8
    alike: float = 0.9
    merged_share: float = 0.4
    every: int = 4
    own_weight: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, segments=(1, 10**6), alike=(-1, 1), merged_share=(0, 1), every=(1, 10**6))
        check_number(self, own_weight=(0, 1))

    def tower_layers(self, feature_layer: int) -> tuple[int]:
        """The feature layer: its attention gives the saliency."""
        return (feature_layer,)

    def encode(self, view: TowerView) -> None:
        """Store the CLS attention of each unit; nothing is cut inside the tower."""
        view.carry[ATTENTION] = view.per_unit(global_attention(view.attention))

    def encode_final(self, view: FeaturesView) -> Keep:
        """Split each video into segments, choose tokens and merge."""
        x = view.features
        exact = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        found = segment_lengths(exact, view.frames, int(self.segments), self.alike)
        found_each = zip(x, view.carry[ATTENTION], found, strict=True)
        kept = [
            compress(
                video.unflatten(0, (view.frames, -1)),
                attention.unflatten(0, (view.frames, -1)),
                lengths,
                view.target,
                self.merged_share,
                int(self.every),
                self.own_weight,
            )
            for video, attention, lengths in found_each
        ]
        return Keep(torch.stack([place for place, _ in kept]), rows=torch.stack([rows for _, rows in kept]))
