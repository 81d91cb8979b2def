"""DyCoke: tokens that repeat those of an earlier frame are dropped (Tao et al., CVPR 2025, arXiv 2411.15024).

Its first stage, temporal merging, as in ``dycole_ttm`` of the released ``llava/model/llava_arch.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..contract.policy import Keep, Place, SelectPolicy
from ..contract.views import FeaturesView
from ..kernels import to_device

WINDOW = 4
"""Frames of a window; the first one is kept whole."""


def earlier_frame(frame: int) -> int:
    """The frame that each frame is compared with: for the third of a window its first, for all others the one before.

    The first of a window is compared with no other; its own number is returned.
    """
    return frame - {0: 0, 2: 2}.get(frame % WINDOW, 1)


def likeness_in_time(features: torch.Tensor, frames: int) -> torch.Tensor:
    """Cosine of each token with the one at the same place in `earlier_frame`: ``(batch, frames, tokens)``.

    ``features`` is ``(batch, frames * tokens, channels)``, fp32 or better.
    """
    x = torch.nn.functional.normalize(features.unflatten(1, (frames, -1)), dim=-1)
    before = to_device([earlier_frame(f) for f in range(frames)], x.device)
    return (x * x.index_select(1, before)).sum(-1)


def frame_budgets(frames: int, tokens: int, target: int) -> list[int]:
    """Tokens that each frame keeps, ``target`` in all: first frames of windows first, then the others, evenly."""
    first = [f for f in range(frames) if f % WINDOW == 0]
    others = [f for f in range(frames) if f % WINDOW]
    whole = min(target, len(first) * tokens)
    counts = [0] * frames
    for group, total in ((first, whole), (others, target - whole)):
        for number, f in enumerate(group):
            counts[f] = total // len(group) + (number < total % len(group))
    return counts


@dataclass(frozen=True)
class DyCoke(SelectPolicy):
    """DyCoke's temporal merging, after the projector, over all frames of a video.

    Of every four frames the first one is kept whole, and the others lose the tokens that are most similar to the token
    at the same place in an earlier frame, which then represents both. The budget is per frame, and frames of a video
    share the sum; with ``per="image"`` it is for the whole video.

    First frames hold a quarter of the tokens. A smaller budget keeps only tokens of first frames, evenly spaced, which
    is not part of the method. In a single image there is no earlier frame, and evenly spaced tokens are kept: choose
    another policy for images.

    It differs from the released code in these points:

    - The budget says how many tokens stay. The released rate is the share that the other frames lose; the default here
      corresponds to 0.7, the rate of its scripts.
    - The third frame of the last window is cut like those of the others, the last frame of an odd number is not lost,
      and a video may have fewer than five frames.
    - Tokens stay in their order. The released code sorts them by ascending similarity.
    - Its second stage, which hides rows of the cache in some decoding steps and restores them in others, is not
      implemented. Compose with a policy that drops rows of the cache for good, as in ``"dycoke+snapkv"``.
    - InternVL treats frames like tiles of images, and none has an earlier one.
    """

    name: ClassVar[str] = "dycoke"
    place: ClassVar[Place] = "projected"
    over_frames: ClassVar[bool] = True
    default_ratio: ClassVar[float] = 0.475

    def select(self, view: FeaturesView) -> Keep:
        """The tokens that stay of each video, in their original order."""
        x, frames = view.features.detach(), view.frames
        tokens = x.shape[1] // frames
        like = likeness_in_time(x.to(torch.promote_types(x.dtype, torch.float32)), frames)
        rank = like.nan_to_num(nan=2.0).argsort(dim=-1, stable=True).argsort(dim=-1)
        counts = frame_budgets(frames, tokens, view.target)
        whole = torch.arange(frames, device=x.device) % WINDOW == 0
        budget = to_device(counts, x.device)[:, None]
        place = torch.arange(tokens, device=x.device)
        # one token of each stretch between two bounds: as many as the frame keeps, evenly spaced
        spread = (place + 1) * budget // tokens > place * budget // tokens
        mask = torch.where(whole[:, None], spread, rank < budget)
        return Keep(Keep.from_mask(mask.flatten(1), view.target).index)  # as many of each video
