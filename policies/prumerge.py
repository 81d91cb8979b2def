"""PruMerge and PruMerge+: tokens that CLS attends to, merged with those of similar keys (Shang et al., ICCV 2025,
arXiv 2403.15388).

Follows ``token_prune_merge_advanced`` and ``token_prune_merge_advanced_plus`` of the released
``llava/model/multimodal_encoder/clip_encoder.py``. Queries and keys are those of the layer after the consumed one, all
heads concatenated. The choice in a tile is expressed as an *order* of its tokens, kept ones first, then the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..contract.policy import Keep, Policy
from ..contract.views import AttentionView, FeaturesView, TowerView
from ..kernels import gather_rows, to_device
from .settings import check_choice

NEIGHBOURS = 32
"""Number of tokens that are added to each kept one."""
SCORE, ORDER, KEPT, NEAR = "cls_attention", "prumerge_order", "prumerge_kept", "prumerge_near"
"""Names under which the tower's layer stores what merging needs: scores, order, number kept, and neighbours."""


def across_heads(view: AttentionView, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The query of CLS, or the mean query, ``(batch, channels)``, and all keys ``(batch, tokens, channels)``.

    Heads are concatenated; computed in ``dtype``, by default fp32 or better.
    """
    dtype = dtype or torch.promote_types(view.query.dtype, torch.float32)
    query, key = (x.to(dtype).transpose(1, 2).flatten(2) for x in (view.query, view.key))
    if view.has_cls:
        return query[:, 0], key
    if view.valid is None:
        return query.mean(1), key
    return (query * view.valid[..., None]).sum(1) / view.valid.sum(-1, keepdim=True), key


def cls_scores(query: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax of the dot products of ``query`` ``(batch, channels)`` with keys ``(batch, tokens, channels)``.

    Divided by the root of the number of channels; ``valid`` is bool ``(batch, tokens)``. Returns ``(batch, tokens)``.
    """
    logits = (keys @ query[..., None])[..., 0] * keys.shape[2] ** -0.5
    return (logits if valid is None else logits.masked_fill(~valid, -torch.inf)).softmax(-1)


def outliers(attention: torch.Tensor) -> torch.Tensor:
    """The number of outliers in each row ``(batch, values)``: int64 ``(batch,)``.

    An outlier exceeds the upper quartile by more than one and a half times the interquartile range.
    """
    exact = attention.float()
    low, high = torch.quantile(exact, to_device([0.25, 0.75], exact.device), dim=-1)
    return (exact > (high + 1.5 * (high - low))[:, None]).sum(-1)


def top(attention: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """The ``count`` tokens with the highest attention: bool like ``attention`` ``(batch, tokens)``.

    ``count`` is one number, or ``(batch, 1)``.
    """
    rank = attention.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < count


def with_every(taken: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """``taken`` bool ``(batch, tokens)`` and, from the first on, every ``step``-th token; int64 ``(batch, 1)``."""
    return taken | (torch.arange(taken.shape[1], device=taken.device) % step == 0)


def with_spread(taken: torch.Tensor, already: int, count: int) -> torch.Tensor:
    """``taken`` bool ``(batch, tokens)``, ``already`` in each row, and ``count`` of the others at even distances."""
    rest = taken.to(torch.int8).argsort(dim=-1, stable=True)[:, : taken.shape[1] - already]
    place = torch.arange(count, device=taken.device) * rest.shape[1] // max(count, 1)
    return taken.scatter(1, rest[:, place], True)


def ordered(kept: torch.Tensor) -> torch.Tensor:
    """Kept tokens, then the rest, both ascending: int64 like ``kept`` bool ``(batch, tokens)``."""
    return kept.view(torch.uint8).argsort(dim=-1, descending=True, stable=True)


def released_order(first: torch.Tensor, units: int) -> torch.Tensor:
    """The tokens ``first`` int64 ``(batch, kept)`` as given, then others, ascending: ``(batch, units)``.

    A token given twice appears twice, and as many of the lowest-numbered others are missing then.
    """
    number = torch.arange(units, device=first.device).repeat(len(first), 1).scatter(1, first, -1)
    return torch.cat([first, number.sort(dim=-1).values[:, first.shape[1] :]], dim=1)


def released_first(attention: torch.Tensor, top_k: int, grid: range) -> torch.Tensor:
    """The kept tokens as the released code orders them: int64 ``(batch, kept)``.

    By descending attention, then those of the ``grid`` of regular positions.
    """
    first = attention.topk(top_k, dim=-1).indices
    places = torch.arange(grid.start, grid.stop, grid.step, device=first.device)
    return torch.cat([first, places.expand(len(first), -1)], dim=1)


def nearest(keys: torch.Tensor, order: torch.Tensor, kept: int, count: int = NEIGHBOURS) -> torch.Tensor:
    """The places in ``order`` of the tokens whose keys have the highest cosine with the key of each kept one.

    Other kept tokens may be among them. Only the kept tokens' rows of the cosines are computed.

    Args:
        keys: ``(batch, tokens, channels)``.
        order: int64 ``(batch, tokens)``, the kept ones first.
        kept: number of kept tokens.
        count: number of neighbours, less than that of the tokens.

    Returns:
        int64 ``(batch, kept, count)``.
    """
    unit = gather_rows(torch.nn.functional.normalize(keys, dim=-1), order)
    cosine = unit[:, :kept] @ unit.mT
    itself = torch.arange(kept, device=keys.device)
    cosine[:, itself, itself] = -torch.inf
    return cosine.topk(min(count, order.shape[1] - 1), dim=-1).indices


def merge(
    features: torch.Tensor, score: torch.Tensor, order: torch.Tensor, kept: torch.Tensor, near: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The merged kept tokens, ``(batch, most kept, channels)``, and the sum of the rest, ``(batch, channels)``.

    Each token is weighted by its score; scores are not divided by their sum. In the dtype of ``features``, summed in
    fp32 or better.

    Args:
        features: ``(batch, tokens, channels)``.
        score: ``(batch, tokens)``.
        order: int64 ``(batch, tokens)``, the kept ones first.
        kept: int64 ``(batch,)``, number of kept tokens.
        near: int64 ``(batch, most kept, neighbours)``, places in ``order``.
    """
    x = gather_rows(features, order).to(torch.promote_types(features.dtype, torch.float32))
    weight = score.to(x.dtype).gather(1, order)
    added = weight.new_zeros(*near.shape[:2], order.shape[1])
    added = added.scatter(2, near, weight[:, None].expand(-1, near.shape[1], -1).gather(2, near))
    rest = weight * (torch.arange(order.shape[1], device=order.device) >= kept[:, None])
    rows = x[:, : near.shape[1]] + added @ x
    return rows.to(features.dtype), (rest[:, None] @ x)[:, 0].to(features.dtype)


@dataclass(frozen=True)
class PruMerge(Policy):
    """PruMerge, between tower and projector (encode stage); with `plus`, PruMerge+. The budget applies to each tile.

    Every kept token becomes the sum of itself and the 32 tokens with the most similar keys, each weighted by its CLS
    attention; one extra token is the weighted sum of all tokens that are not kept. Sums are not divided by the weights.

    The default mode differs from the released code in these points:

    - The budget is the number of tokens, including the extra one; a budget of one token has no extra one. With `plus`,
      half of them are those with the highest attention, and half are evenly spaced among the others. With `adaptive`
      each image decides separately: the released code pools the images of a batch, and fails on a second one with
      `plus`.
    - The grid of `plus` fits the number of tokens, and no token is kept twice. The released grid is for 576 tokens, and
      never contains the last one. Without outliers one token is kept; the released code keeps none, or fails.
    - In a tile of fewer than 33 tokens, all others are neighbours; the released code fails.
    - Tokens stay in raster order, and the extra one is placed at the best token that is not kept. The
      released order is by descending attention, then the grid, then the extra one.
    - Scores and similarities are fp32 or better. A budget of all tokens merges nothing.

    The released code reads CLIP-L's last layer, which is the one after the consumed layer; here it is that one, or the
    consumed one if it is the last. Without CLS the mean query is used; where a pixel shuffle merges patches, a
    unit's score and key are sums over its patches.

    Attributes:
        plus: keep tokens at regular positions in addition to those that CLS attends to (PruMerge+).
        adaptive: keep as many tokens as have outlying attention, instead of a budget, of which only "all" counts
            then. With `plus` about three times as many are added. The released code has both on.
        compat: ``"official"`` reproduces the released code; a budget is one token more than its ``reduction_ratio``
            gives. The receipt then numbers cells in its order.
    """

    name: ClassVar[str] = "prumerge"
    stages: ClassVar[tuple[str, ...]] = ("encode",)
    default_ratio: ClassVar[float] = 32 / 576
    reads_cls: ClassVar[bool] = True

    plus: bool = False
    adaptive: bool = False
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, plus=(False, True), adaptive=(False, True), compat=(None, "official"))

    def tower_layers(self, feature_layer: int) -> tuple[int, int]:
        """The layer after the consumed one, or the consumed one if it is the last: its queries and keys decide."""
        return feature_layer, feature_layer + 1

    def encode(self, view: TowerView) -> None:
        """Decide which tokens stay, and what is added to them; nothing is cut inside the tower."""
        units = view.units.shape[1]
        if view.target >= units:
            return
        query, keys = across_heads(view.attention, view.attention.query.dtype if self.compat else None)
        score, front = cls_scores(query, keys, view.attention.valid), int(view.attention.has_cls)
        # the sum over a unit's patches has the direction of their mean, and only the direction matters
        score, keys = view.per_unit(score[:, front:]), view.per_unit(keys[:, front:])
        if self.compat:
            first = self.first(score, view.target)
            order, kept = (
                released_order(first, units),
                torch.full_like(score, first.shape[1], dtype=torch.long),
            )
        else:
            mask = self.chosen(score, view.target)
            order, kept = ordered(mask), mask.sum(-1, keepdim=True).expand(-1, units)
        most = self._most(kept, view.target)
        view.carry |= {SCORE: score, ORDER: order, KEPT: kept}
        near = torch.nn.functional.pad(nearest(keys, order, most), (0, 0, 0, units - most))
        view.carry |= {f"{NEAR}{number}": column for number, column in enumerate(near.unbind(-1))}

    def chosen(self, score: torch.Tensor, target: int) -> torch.Tensor:
        """The kept tokens in the default mode: bool like ``score`` ``(batch, tokens)``."""
        units, count = score.shape[1], max(target - 1, 1)
        if self.adaptive:
            far = outliers(score).clamp(min=1)[:, None]
            best = top(score, far)
            # a third of the mean distance between outliers, both rounded down
            return with_every(best, (units // far // 3).clamp(min=1)) if self.plus else best
        spread = count // 2 if self.plus else 0
        return with_spread(top(score, count - spread), count - spread, spread)

    def first(self, score: torch.Tensor, target: int) -> torch.Tensor:
        """The kept tokens in the released order, int64 ``(batch, kept)``; some twice with `plus` and a budget.

        Raises:
            ValueError: the released code fails at this budget, or with this number of tiles.
        """
        batch, units = score.shape
        if self.adaptive:
            ratio = int(outliers(score.reshape(1, -1))) / score.numel()
            if not self.plus:
                return released_first(score, int(units * ratio), range(0))
            if batch > 1 or not 0 < ratio <= 1 / 3:
                raise ValueError(
                    f'compat="official" with plus and adaptive: the released code takes one image whose share of '
                    f"outliers is above 0 and at most a third, not {batch} with {ratio:.3f}. Leave compat out."
                )
            first = released_first(score, int(units * ratio), range(0))
            places = torch.arange(0, units - 1, int(int(1 / ratio) / 3), device=first.device)
            return torch.cat([first, places[~torch.isin(places, first)][None]], dim=1)
        kept = target - 1
        if not self.plus:
            return released_first(score, kept, range(0))
        half = kept // 2
        step = int(units / max(half, 1))
        grid = range(int(step / 2), units - 1, step)
        if half < 1 or 2 * half != kept or len(grid) != half:
            raise ValueError(
                f'compat="official" with plus: of {units} tokens the released code cannot keep {kept} beside the extra '
                "one, as its grid holds another number than half of them. Leave compat out, or keep 145 of 576."
            )
        return released_first(score, half, grid)

    def _most(self, kept: torch.Tensor, target: int) -> int:
        """The largest number of tokens that a tile keeps; waits for the device where images decide."""
        return int(kept.max()) if self.adaptive else max(target - 1, 0 if self.compat else 1)

    def encode_final(self, view: FeaturesView) -> Keep | None:
        """Merge, and put the tokens in raster order."""
        if ORDER not in view.carry or view.target >= view.features.shape[1]:
            return None
        order, kept, score = view.carry[ORDER], view.carry[KEPT][:, 0], view.carry[SCORE]
        units = order.shape[1]
        near = torch.stack([x for name, x in view.carry.items() if name.startswith(NEAR)], -1)
        most = self._most(kept, view.target)
        rows, rest = merge(view.features, score, order, kept, near[:, :most])
        rows = torch.cat([rows, rest[:, None]], 1)
        if self.compat:
            return Keep(torch.arange(most + 1, device=order.device).expand(len(order), -1), rows=rows)
        if most == view.target:  # a budget of one token
            return Keep(order[:, :1], rows=rows[:, :1])
        place = order.argsort(dim=-1)
        best = score.masked_fill(place < kept[:, None], -torch.inf).argmax(-1, keepdim=True)
        slot = place.clamp(max=most).scatter(1, best, most)
        stays = place < kept[:, None]
        stays = stays.scatter(1, best, True)
        width = min(most + 1, units)
        keep = Keep.from_mask(stays, width)
        slot = slot.gather(1, keep.index)
        return Keep(keep.index, keep.valid if self.adaptive else None, gather_rows(rows, slot))
