"""VFlowOpt: pruning by visual information flow, in three stages (Yang et al., ICCV 2025, arXiv 2508.05211).

Importance is computed from the attention of the tower's last layer (`importance`). After the projector the least
important tokens are recycled, stage 1 (`recycle`); before two decoder layers more are dropped by the same map, stages 2
and 3. Follows the released ``llava_qwen_training_free.py`` and ``modeling_qwen2.py`` (``forward_illava``).
`vlm_prune.tune` searches for the settings that suit a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import inf, isqrt
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ..contract.policy import Keep, Policy, Positions
from .importance import calibrated_attention, entropy_share, patch_entropy, true_grey, wrapped_grey
from .recycle import recycle_official, recycle_to
from .scores import top_mask
from .settings import check_choice, check_number
from .shares import (
    PUBLISHED,
    average_share,
    check_average,
    check_first,
    literal_counts,
    solve_first,
    solved_counts,
)

if TYPE_CHECKING:
    from ..contract.views import FeaturesView, ModulateView, PrefillView, TowerView

MAP, AVERAGE = "vflowopt_map", "vflowopt_average"
"""What the encode stage stores per token: its importance, and the average number to hold per token that enters."""

LEAST = 0.001
"""The smallest share that a setting may have."""


@dataclass(frozen=True)
class VFlowOpt(Policy):
    """VFlowOpt, after the projector and inside the decoder (encode and prefill stage).

    The budget is the paper's: the share of visual tokens that a decoder layer computes, averaged over all layers. A
    little more than that enters the decoder, and less is left at its end. Stage 1 prunes each tile separately, stages 2
    and 3 all visual tokens of a prompt together. For CLIP the row and the column of CLS are left out of the map; where
    a pixel shuffle merges patches, a unit's importance is the mean over its patches.

    The default differs from the released code:
    - budgets are exact; there, recycled tokens are extra, and what the second cut cannot use of the budget is lost;
    - where no token passes the threshold ``t``, the one that receives most attention is used; there, the map is NaN;
    - weights of recycling are neither negative nor NaN;
    - all layers are causal; there, the layer before the first cut is not, because sdpa computes without the mask when
      the attention map is requested;
    - where a budget is smaller than the number of cells, cells grow;
    - entropy is that of the true pixels.

    Attributes:
        t: the factor by which the attention that a token receives must exceed the mean for the token to take part
            in the calibration. Depends on the tower: the published values are for SigLIP's attention sinks.
        alpha: weight of patch entropy in the map, may be negative. 0, as published, leaves it out.
        m: side of the cells for recycling, in tokens; need not be an integer. ``None`` drops without recycling.
        r_v: share of the tokens that enters the decoder. ``None``: follows from the budget.
        r_1: share of these that is kept at the first cut in the decoder.
        r_2: share of the rest that is kept at the second cut. ``None``: follows from the budget. If ``r_v`` is given
            too, all shares are used as given, and their average is the default budget.
        layers: the two cuts, as fractions of the decoder's depth.
        counts: ``"average"``, or ``"entering"``: the budget is what enters the decoder, and both cuts save more.
        entropy: of ``"true_grey"`` levels, or ``"official_wrap"``: of normalised values that wrap around, as in the
            released code. ``None``: the latter with ``compat="official"``, otherwise the former.
        image_mean: the processor's, one number per channel. Needed for true grey levels if ``alpha`` is not 0.
        image_std: likewise.
        compat: ``"official"`` reproduces the released code, but raises for a map of NaN.
    """

    name: ClassVar[str] = "vflowopt"
    stages: ClassVar[tuple[str, ...]] = ("encode", "prefill")
    default_ratio: ClassVar[float] = 0.25
    late: ClassVar[bool] = True
    after_projector: ClassVar[bool] = True
    exceeds: ClassVar[bool] = True

    positions: Positions = "original"
    t: float = PUBLISHED[0.25]["t"]
    alpha: float = 0.0
    m: float | None = PUBLISHED[0.25]["m"]
    r_v: float | None = None
    r_1: float = PUBLISHED[0.25]["r_1"]
    r_2: float | None = None
    layers: tuple[float, float] = (9 / 28, 18 / 28)
    counts: Literal["average", "entering"] = "average"
    entropy: Literal["true_grey", "official_wrap"] | None = None
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "image_mean", "image_std"):
            if isinstance(getattr(self, name), list):  # what JSON makes of a tuple
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _check(self)
        if self.counts == "average" and self.r_v is not None and self.r_2 is not None:
            object.__setattr__(
                self, "default_ratio", average_share(self.r_v, self.r_1, self.r_2, self.layers)
            )

    @property
    def entropy_of(self) -> str:
        """The levels whose entropy is taken, ``compat`` considered."""
        return self.entropy or ("true_grey" if self.compat is None else "official_wrap")

    def tower_layers(self, feature_layer: int) -> tuple[int, ...]:
        """The layer whose output is consumed."""
        return (feature_layer,)

    def encode(self, view: TowerView) -> None:
        """Store the map, the mean over the patches of each unit, for all three stages."""
        units = view.grid[0] * view.grid[1]
        if view.target >= units:
            return
        scores = calibrated_attention(view.attention, self.t, fallback=self.compat is None)
        if self.compat is None:
            scores = scores.nan_to_num(nan=0.0)
        scores = view.per_unit(scores) / (1 if view.slots is None else view.slots.shape[2])
        if self.alpha:
            scores = scores + self.alpha * self._entropy(view).gather(1, view.units)
        view.carry[MAP] = scores
        view.carry[AVERAGE] = torch.full_like(scores, view.target / self._entering(view.target, units))

    def encode_final(self, view: FeaturesView) -> Keep | None:
        """Stage 1: recycle the least important tokens of each tile."""
        scores, units = view.carry[MAP], view.features.shape[1]
        entering = self._entering(view.target, units)
        if self.compat == "official":
            if bool(scores.isnan().any()):
                raise ValueError(
                    f'no token receives more than t={self.t} times the mean attention, for which compat="official" '
                    "has no map: choose a smaller t, or leave compat out"
                )
            if self.m is not None:
                return recycle_official(view.features, scores, [view.grid], entering / units, self.m)
        if entering >= units:
            return None
        if self.m is None:
            return Keep.top(scores, entering)
        return recycle_to(view.features, scores, view.grid, entering, self.m)

    def _entering(self, target: int, units: int) -> int:
        """Tokens of a tile of ``units`` that enter the decoder, for a budget of ``target``."""
        share = self.entering_share(target / units, 1 / units)
        return max(1, units - round(units * (1 - share)))

    def entering_share(self, budget: float, grain: float = 0.0) -> float:
        """The share of the tokens that enters the decoder where the budget is a share of ``budget``.

        ``grain`` is the share of one token.
        """
        if self.counts == "entering":
            return budget
        if self.r_v is None:
            return solve_first(budget, self.r_1, self.r_2 or PUBLISHED[0.25]["r_2"], self.layers)
        if self.r_2 is None:
            check_first(budget, self.r_v, self.r_1, self.layers, grain)
        else:
            check_average(budget, self.r_v, self.r_1, self.r_2, self.layers, 0.005 + grain)
        return self.r_v

    def _entropy(self, view: TowerView) -> torch.Tensor:
        """Softmax of patch entropy per unit, ``(tiles, units)``, dropped ones included."""
        if view.pixels is None:
            raise RuntimeError("alpha is not 0, but the engine shows the policy no pixels")
        mean, std = self.image_mean, self.image_std
        if self.entropy_of == "official_wrap" or mean is None or std is None:
            grey = wrapped_grey(view.pixels)
        else:
            grey = true_grey(view.pixels, mean, std)
        merge = 1 if view.slots is None else isqrt(view.slots.shape[2])
        patches = (view.grid[0] * merge, view.grid[1] * merge)
        return entropy_share(patch_entropy(grey, patches), view.grid, merge)

    def cuts(self, depth: int) -> tuple[int, int]:
        """The decoder layers before which tokens are dropped."""
        first, second = (min(max(round(depth * share), 1), depth - 1) for share in self.layers)
        return first, second

    def prefill_layers(self, depth: int) -> tuple[int, ...]:
        """The layers before the two cuts."""
        return tuple(sorted({cut - 1 for cut in self.cuts(depth) if cut}))

    def left(
        self, layer: int, depth: int, entered: int, target: int, tiles: list[tuple[int, int]]
    ) -> int | None:
        """What the two cuts leave, for tiles of one size."""
        if len(set(tiles)) != 1 or self.compat is not None:
            return None
        units, wanted = tiles[0]
        if wanted >= units:
            return entered
        known = len(tiles) * self._entering(wanted, units)
        return _count(self, known, len(tiles) * wanted, layer, depth) + entered - known

    def _counts(self, entered: torch.Tensor, average: torch.Tensor, layer: int, depth: int) -> torch.Tensor:
        """Tokens that go on after ``layer``, of ``entered``, if the layers are to hold ``average`` of them."""
        cuts = self.cuts(depth)
        if self.counts == "entering" or (self.r_v is not None and self.r_2 is not None):
            counts = literal_counts(entered, self.r_1, self.r_2 or PUBLISHED[0.25]["r_2"])
        else:
            counts = solved_counts(entered, average, self.r_1, cuts, depth)
        return counts[sum(layer + 1 >= cut for cut in cuts) - 1]

    def prefill(self, view: PrefillView) -> torch.Tensor | None:
        """Stages 2 and 3: keep the most important of a prompt's visual tokens."""
        if MAP not in view.carry:
            return None
        known = view.visual & (
            view.carry[AVERAGE] > 0
        )  # a CLS row that counts as a visual token has no importance
        others = (view.visual & ~known).sum(-1)
        if view.left is not None:
            return top_mask(view.carry[MAP], view.left - others, known) | ~known
        entered = view.initial - others
        # every token carries the same number, so the mean over those still present is that over all that entered
        each = (view.carry[AVERAGE] * known).double().sum(-1) / known.sum(-1).clamp(min=1)
        count = self._counts(entered, (each * entered).round(), view.layer, view.depth)
        return top_mask(view.carry[MAP], count, known) | ~known

    def modulate_layers(self, depth: int) -> tuple[int, ...]:
        """For ``compat="official"``: the layer before the first cut."""
        return self.prefill_layers(depth)[:1] if self.compat == "official" else ()

    def modulate(self, view: ModulateView) -> torch.Tensor | None:
        """For ``compat="official"``: this layer's attention in prefill without its causal mask."""
        if not view.prefill or MAP not in view.carry:
            return None
        mask = None if view.valid is None else view.valid[:, None, None]
        # keys are repeated here rather than by enable_gqa, which not every supported torch has for every device
        shared = view.query.shape[1] // view.key.shape[1]
        key, value = (x.repeat_interleave(shared, dim=1) for x in (view.key, view.value))
        seen = torch.nn.functional.scaled_dot_product_attention(
            view.query, key, value, mask, scale=view.scaling
        )
        return seen.transpose(1, 2)


@cache
def _count(policy: VFlowOpt, known: int, wanted: int, layer: int, depth: int) -> int:
    """`VFlowOpt._counts` of one prompt: the same in every call."""
    return int(policy._counts(torch.tensor([known]), torch.tensor([float(wanted)]).double(), layer, depth))


def _check(policy: VFlowOpt) -> None:
    """Raise ValueError for a setting outside its range, or for settings that contradict each other."""
    check_choice(
        policy,
        counts=("average", "entering"),
        entropy=(None, "true_grey", "official_wrap"),
        compat=(None, "official"),
    )
    check_number(policy, t=(0, inf), alpha=(-inf, inf), r_1=(LEAST, 1))
    check_number(policy, optional=True, m=(1, inf), r_v=(LEAST, 1), r_2=(LEAST, 1))
    cuts = list(policy.layers)
    if len(cuts) != 2 or not 0 < cuts[0] <= cuts[1] < 1:
        raise ValueError(
            f"layers={policy.layers!r}: choose two rising fractions of the depth, such as (0.32, 0.64)"
        )
    for name in ("image_mean", "image_std"):
        value = getattr(policy, name)
        if value is not None and len(value) != 3:
            raise ValueError(f"{name}={value!r}: give the processor's, one number for each of the 3 channels")
    if policy.counts == "entering" and policy.r_v is not None:
        raise ValueError(f'r_v={policy.r_v} with counts="entering", where the budget is r_v: leave it out')
    if policy.alpha and policy.entropy_of == "true_grey" and None in (policy.image_mean, policy.image_std):
        raise ValueError(
            f"alpha={policy.alpha} weighs the entropy of true pixels, which image_mean and image_std of the processor "
            'give back: give both (processor.image_processor.image_mean, ...), alpha=0 or entropy="official_wrap"'
        )
