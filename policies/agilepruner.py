"""AgilePruner: attention-ranked picks with an image-adaptive diversity threshold (ICLR 2026, arXiv 2603.01236).

Follows ``encode_images``, ``effective_rank``, ``calculate_adaptive_tau`` and
``select_diverse_tokens_by_attention_and_distance`` of the released ``llava/model/llava_arch.py`` (paper section 4.3).
Tokens are picked in order of CLS attention; each one picked suppresses all tokens nearer to it than a threshold,
which grows with the token's rank, and faster in images whose tokens span more dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..contract.policy import Keep, Policy
from ..contract.views import FeaturesView, TowerView
from ..kernels import gather_rows
from .scores import cosine_distance, global_attention
from .settings import check_choice, check_number
from .spectrum import rank_by_products

RELEASED_UNITS = 576
"""Visual tokens of an image in the released code, which never prunes to a budget of this size or above."""
RELEASED_ERANK = 90.0
"""Mean effective rank of LLaVA-1.5's training images after the projector (CLIP-L/336, 24 x 24 tokens)."""


def effective_rank(features: torch.Tensor, exact: bool = True) -> torch.Tensor:
    """Exponential of the entropy of the singular values' shares, token mean removed: ``(batch,)``.

    Between 1 (all tokens on one line) and the smaller one of tokens and channels. By an eigenvalue solver, or, where
    `by_products` says so, within the tolerance of `rank_by_products`.

    Args:
        features: ``(batch, tokens, channels)``, left as they are.
        exact: work in fp64 on the smaller one of the two Gram matrices. Without it, in fp32 on the one of the tokens as
            the released code does; where there are fewer channels than tokens its rounding noise raises the rank by up
            to some percent.
    """
    x = features.to(torch.float64 if exact else torch.float32)
    x = x - x.mean(1, keepdim=True)
    gram = x.mT @ x if exact and x.shape[1] > x.shape[2] else x @ x.mT
    return _rank_of(gram, 0.0 if exact else 1e-12)


def by_products(device: torch.device) -> bool:
    """Whether ranks are computed by matrix products: on GPUs that compute fp64 at half the speed of fp32 or better.

    Their solvers take one matrix after the other (on an H200 90 ms for 16 of 576 x 576), and the host waits for each.
    """
    if device.type != "cuda":
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) in FULL_FP64


FULL_FP64 = ((8, 0), (9, 0), (10, 0))
"""Compute capabilities of A100, H100 and H200, B200."""


def _rank_of(gram: torch.Tensor, least: float) -> torch.Tensor:
    # the solver raises where features overflowed; any choice will do then, and the output shows the overflow
    gram = gram.nan_to_num(posinf=0.0, neginf=0.0)
    if not least and by_products(gram.device):
        return rank_by_products(gram.double())
    singular = torch.linalg.eigvalsh(gram).clamp(min=least).sqrt()
    share = singular / (singular.sum(-1, keepdim=True) + 1e-12)
    return (-(share * (share + 1e-12).log()).sum(-1)).exp()


def rank_and_distance(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`effective_rank` and `cosine_distance` of features, ``(batch,)`` and ``(batch, tokens, tokens)``.

    Where there are as many channels as tokens, so that rounding raises no eigenvalue from zero, both come from one
    matrix product in fp32: centring a Gram matrix subtracts its row and column means. Otherwise the rank is exact.
    """
    if features.shape[1] > features.shape[2] or features.dtype == torch.float64:
        return effective_rank(features), cosine_distance(features)
    x = features.double() if by_products(features.device) else features.float()
    gram = x @ x.mT
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt() + 1e-8
    distance = 1.0 - gram / length[:, :, None] / length[:, None]
    mean = gram.mean(1, keepdim=True)
    rank = _rank_of(gram - mean - mean.mT + mean.mean(2, keepdim=True), 0.0)
    return rank.double(), distance.float()


def calibrate_erank(features: Iterable[torch.Tensor]) -> float:
    """Mean effective rank over images: the ``erank_avg`` of `AgilePruner` for a model.

    Args:
        features: projected features of the unpruned model, each ``(units, channels)`` or ``(tiles, units, channels)``,
            for instance ``model.get_image_features(pixel_values=pixels).pooler_output``. A few dozen images are enough.

    Raises:
        ValueError: there are no features.
    """
    ranks = [effective_rank(x if x.dim() == 3 else x[None]).cpu() for x in features]
    if not ranks:
        raise ValueError("no features: give those of at least one image")
    return torch.cat(ranks).mean().item()


def adaptive_tau(growth: torch.Tensor, units: int, step: float, limit: float) -> torch.Tensor:
    """The distance below which the token of each rank suppresses others: fp64 ``(batch, units)``.

    ``growth`` ``(batch,)`` is the image's effective rank over the average one. The threshold rises by ``step`` times
    that from rank to rank, up to ``limit``. Official: ``calculate_adaptive_tau`` (equation 6).
    """
    rank = torch.arange(1, units + 1, device=growth.device, dtype=torch.float64)
    return (rank * (growth.double() * step)[:, None]).clamp(max=limit)


def pick(order: torch.Tensor, distance: torch.Tensor, tau: torch.Tensor, keep: int) -> torch.Tensor:
    """Walk down a ranking, suppressing tokens too near to a picked one: int64 ``(batch, keep)`` in picking order.

    If candidates run out before ``keep`` tokens are picked, the best-ranked suppressed ones fill up.
    ``keep`` steps, none of which waits for the device.

    Args:
        order: int64 ``(batch, units)``, token numbers from the best to the worst.
        distance: ``(batch, units, units)``.
        tau: ``(batch, units)``, by rank: the token of rank ``r`` suppresses those at ``distance < tau[:, r]``.
        keep: tokens to pick.
    """
    batch, units = order.shape
    # the comparison is made in the dtype of the distances, as torch does for the Python floats of the released code
    radius = tau.to(distance.dtype)[..., None]
    by_rank = distance.gather(1, order[..., None].expand(-1, -1, units))
    near = by_rank.gather(2, order[:, None].expand(-1, units, -1)) < radius
    near.diagonal(dim1=-2, dim2=-1).fill_(True)
    # each rank while it is alive, `units` once it is struck out; the row after the last is for when none is alive
    struck = torch.nn.functional.pad(near.int() * units, (0, 0, 0, 1))
    left = torch.arange(units, device=order.device, dtype=torch.int32).expand(batch, -1)
    best = []
    for _ in range(keep):
        best.append(left.amin(-1, keepdim=True).long())
        left = torch.maximum(left, struck.gather(1, best[-1][..., None].expand(-1, -1, units)).squeeze(1))
    taken = torch.zeros(batch, units + 1, dtype=torch.bool, device=order.device)
    taken = taken.scatter(1, torch.cat(best, 1), True)[:, :units]
    first = taken.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :keep]
    return order.gather(1, first)


@dataclass(frozen=True)
class AgilePruner(Policy):
    """AgilePruner, after the projector (encode stage). The budget applies to each tile separately.

    Scores are the CLS attention of the feature layer; effective rank and cosine distances are those of projected
    features. The default mode differs from the released code in these points:

    - Features are never changed. The released rank function subtracts the token mean in place, so that with float32
      features the distances, and the tokens that the language model reads, lose their mean.
    - Any number of tiles and of tokens per tile; the released code stops at two tiles, and prunes nothing if the
      budget is 576 or more.
    - Attention, distances and thresholds are fp32 or better, the rank fp64, and ties go to the earlier token; the
      released code works in the model's dtype, where many scores tie, in an order that depends on the device.

    Where a pixel shuffle merges patches, a unit's score is the sum over its patches; without a CLS token the mean
    query is used. The paper has no such model.

    Attributes:
        erank_avg: mean effective rank of the model's images. The published 90 belongs to LLaVA-1.5 (CLIP-L/336);
            measure that of another model with `calibrate_erank`. ``None`` is 90 for tiles of 24 x 24 tokens, and each
            image's own rank for all others: thresholds then do not adapt to the image.
        tau_step: growth of the threshold from rank to rank in an average image, as a cosine distance.
        tau_max: largest threshold.
        tau: one threshold for all tokens instead (the sweep of the paper's table 12; ``DIST_THRESHOLD`` in the code).
        compat: ``"official"`` reproduces the released code, in-place centring of float32 features included.
    """

    name: ClassVar[str] = "agilepruner"
    stages: ClassVar[tuple[str, ...]] = ("encode",)
    default_ratio: ClassVar[float] = 64 / 576
    reads_cls: ClassVar[bool] = True
    late: ClassVar[bool] = True
    after_projector: ClassVar[bool] = True

    erank_avg: float | None = None
    tau_step: float = 0.01
    tau_max: float = 0.25
    tau: float | None = None
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, optional=True, erank_avg=(1, torch.inf), tau=(0, 2))
        check_number(self, tau_step=(0, 2), tau_max=(0, 2))
        check_choice(self, compat=(None, "official"))

    def tower_layers(self, feature_layer: int) -> tuple[int]:
        """The feature layer: its attention is the score."""
        return (feature_layer,)

    def encode(self, view: TowerView) -> None:
        """Note the CLS attention of each unit; nothing is cut inside the tower."""
        dtype = view.attention.query.dtype if self.compat == "official" else None
        view.carry["cls_attention"] = view.per_unit(global_attention(view.attention, dtype))

    def encode_final(self, view: FeaturesView) -> Keep | None:
        """Pick among the projected features."""
        official = self.compat == "official"
        if official and view.target >= RELEASED_UNITS:
            return None
        features, centred = view.features, official and view.features.dtype == torch.float32
        if centred:
            features = features - features.mean(1, keepdim=True)
        average = self._average(view)
        if official:
            distance = cosine_distance(features.detach(), features.dtype)
            rank = effective_rank(view.features.detach(), exact=False) if average else None
        elif average is None:
            distance, rank = cosine_distance(features.detach()), None
        else:
            rank, distance = rank_and_distance(features.detach())
        order = view.carry["cls_attention"].argsort(dim=-1, descending=True, stable=not official)
        tau = self._thresholds(view, None if rank is None or average is None else rank.double() / average)
        index = pick(order, distance, tau, view.target).sort(dim=-1).values
        rows = gather_rows(features, index) if centred else None
        return Keep(index, rows=rows)

    def _average(self, view: FeaturesView) -> float | None:
        """The average rank that thresholds compare with; ``None`` if they do not adapt to the image."""
        if self.tau is not None:
            return None
        if self.erank_avg is None and (view.grid == (24, 24) or self.compat == "official"):
            return RELEASED_ERANK
        return self.erank_avg

    def _thresholds(self, view: FeaturesView, growth: torch.Tensor | None) -> torch.Tensor:
        """The threshold of each rank, ``(batch, units)``; ``growth`` ``(batch,)`` is the rank over the average one."""
        batch, units = view.features.shape[:2]
        if self.tau is not None:
            return view.features.new_full((batch, units), self.tau, dtype=torch.float64)
        if growth is None:
            growth = view.features.new_ones(batch, dtype=torch.float64)
        return adaptive_tau(growth, units, self.tau_step, self.tau_max)
