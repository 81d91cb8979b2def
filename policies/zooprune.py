"""ZOO-Prune: tokens to which the projector is sensitive, far from each other (CVPR 2026, arXiv 2509.24837).

Follows ``select_tokens_sads`` and the sensitivity functions of the released ``llava/model/llava_arch.py``, and
``llava_llama.py`` for the low-rank projector. A token's sensitivity is how much its projected features change when its
features are perturbed slightly in random directions: a derivative estimated without a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import cosine_similarity, normalize

from ..contract.policy import Keep, Policy
from ..contract.views import FeaturesView
from .settings import check_choice, check_number


def random_directions(count: int, width: int, seed: int) -> torch.Tensor:
    """Directions drawn uniformly from the sphere: fp32 ``(count, width)`` of unit length, on the host."""
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, width, generator=generator, dtype=torch.float32), dim=-1)


def sensitivity(
    features: torch.Tensor,
    directions: torch.Tensor,
    project: Callable[[torch.Tensor], torch.Tensor],
    step: float,
) -> torch.Tensor:
    """How fast projected features change, as the mean over directions: ``(batch, units)`` in the features' dtype.

    Central differences; two passes through the projector for each direction, one direction at a time.

    Args:
        features: ``(batch, units, channels)``, the projector's input.
        directions: ``(count, channels)``, the same for all tokens.
        project: the projector, ``(batch, units, channels)`` to ``(batch, units, width)``.
        step: length of the perturbation.
    """
    moved = torch.zeros_like(features[..., 0])
    for direction in directions.to(features.dtype):
        push = step * direction
        change = project(features + push) - project(features - push)
        moved += change.norm(dim=-1).to(moved.device) / (2 * step)
    return moved / len(directions)


def low_rank(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear layer's weight as a product of rank ``rank``, by truncated SVD: ``(rank, in)`` and ``(out, rank)``.

    The released LLaVA-NeXT code measures sensitivity through a projector whose two layers are cut to rank 128 each.
    """
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return v[:rank], u[:, :rank] * s[:rank]


def sensitive_and_diverse(
    features: torch.Tensor, scores: torch.Tensor, keep: int, official: bool = False
) -> torch.Tensor:
    """Take the most sensitive token, then sensitive ones far from all taken: int64 ``(batch, keep)`` in order.

    A token's score is its smallest cosine distance to any token taken, times its sensitivity scaled to the range from
    0 to 1 within the tile. Of equal tokens the earlier one is taken, and none twice. Each of the ``keep`` steps
    computes one row of distances; none waits for the device.

    Args:
        features: ``(batch, units, width)``, projected.
        scores: ``(batch, units)``; if all are equal, distance alone decides.
        keep: tokens to pick, up to ``units``.
        official: work in the inputs' dtype, as the released code does; otherwise in fp32 or better.
    """
    if not official:
        dtype = torch.promote_types(features.dtype, torch.float32)
        features, scores = normalize(features.to(dtype), dim=-1), scores.to(dtype)
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    weight = torch.where(high > low, (scores - low) / (high - low + 1e-8), 1.0).to(features.dtype)
    barred = torch.zeros_like(scores, dtype=torch.bool)
    gap = torch.full_like(weight, torch.inf)
    latest, taken = weight.argmax(-1, keepdim=True), []
    for _ in range(keep):
        taken.append(latest)
        barred.scatter_(1, latest, True)
        one = features.gather(1, latest[..., None].expand(-1, -1, features.shape[2]))
        alike = cosine_similarity(one, features, dim=-1) if official else (features @ one.mT).squeeze(2)
        gap = torch.minimum(gap, 1 - alike)
        latest = (gap * weight).masked_fill(barred, -torch.inf).argmax(-1, keepdim=True)
    return torch.cat(taken, dim=1)


@dataclass(frozen=True)
class ZOOPrune(Policy):
    """ZOO-Prune, between tower and projector (encode stage). The budget applies to each tile separately.

    The released functions were checked as a transcription by hand, from commits that differ between its LLaVA-1.5 and
    LLaVA-NeXT files; this may not be its newest state.

    The default mode differs from the released code in these points:

    - Directions are drawn from a seed, so that an image keeps the same tokens every time. The released code draws new
      ones in each call.
    - Sensitivity is measured in fp32, with an fp32 copy of the projector's weights where these are neither quantised
      nor offloaded. In half precision most of such a small perturbation is rounded away.
    - It is measured through the whole projector, as in the LLaVA-1.5 file. The LLaVA-NeXT file uses one of low rank,
      made before weights are loaded, so perhaps from random weights; `low_rank` makes such a one.
    - Each tile of a batch is scored and pruned separately; the released LLaVA-1.5 code applies tile 0's choice to
      all. Newlines are never candidates, and base tiles never lose a place to them.
    - A feature row of zeros is at distance 1 from all, and in a tile with equal scores distance alone decides.

    Where patches are merged into one token, the projector's input for that token is perturbed as a whole.

    Attributes:
        directions: number of random directions, each of which costs two passes through the projector.
        step: length of the perturbation, in units of the tower's features.
        seed: seed of the directions.
        compat: ``"official"`` works in the model's dtype.
    """

    name: ClassVar[str] = "zooprune"
    stages: ClassVar[tuple[str, ...]] = ("encode",)
    default_ratio: ClassVar[float] = 128 / 576
    calls_projector: ClassVar[bool] = True

    directions: int = 64
    step: float = 0.01
    seed: int = 0
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, compat=(None, "official"))
        check_number(self, step=(1e-6, torch.inf))
        for name, least in (("directions", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r}: choose a whole number, {least} or more")

    @torch.no_grad()
    def encode_final(self, view: FeaturesView) -> Keep:
        """The tokens taken, in their original order."""
        if view.project is None:
            raise RuntimeError(f"{self.name} measures the projector, which is not known for these features")
        official, x = self.compat == "official", view.features
        if not official:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        u = random_directions(self.directions, x.shape[-1], self.seed).to(x.device, non_blocking=True)
        scores = sensitivity(x, u, view.project, self.step)
        order = sensitive_and_diverse(view.project(x), scores, view.target, official)
        return Keep(order.sort(dim=-1).values)
