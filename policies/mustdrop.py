"""MustDrop: visual tokens merged in the tower, filtered in prefill, trimmed from the cache (arXiv 2411.10803).

The pure functions are in ``window_merge.py`` and ``dual_attention.py``; the released files that they follow are named
there.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ..contract.policy import Keep, Policy, Positions
from .dual_attention import (
    PUBLISHED_THRESHOLDS,
    check_thresholds,
    dual_attention_filter,
    key_set,
    scaled_layers,
    step_count,
)
from .scores import attention_mass, global_attention, last_row, top_mask
from .window_merge import merge_alike, merge_as_released, merge_flags, window_cells

if TYPE_CHECKING:
    from ..contract.views import CacheView, FeaturesView, PrefillView, TowerView

KEY, SIZE = "mustdrop_key", "mustdrop_size"
"""Names under which the encode stage stores, per token, whether it is in the key set, and its number of patches."""


@dataclass(frozen=True)
class MustDrop(Policy):
    """MustDrop, in the tower, inside the decoder, and in its cache (encode, prefill and decode stage).

    Encode: after the first vision layer, windows of similar patches become one token each; the tokens that CLS attends
    to most in the layer after the consumed one form the *key set*, which survives everything. Prefill: after four
    decoder layers, tokens that the text after the image hardly attends to are dropped. Decode: tokens dropped in
    prefill leave the cache of the layers that had seen them.

    The default mode differs from the released code as follows. The budget is met exactly, in four steps that keep the
    same share each, ranked by the total attention from the text (the released thresholds were tuned per benchmark);
    windows are merged only as far as the budget allows. Each image merges all of its similar windows, not as many as
    the image of the batch with fewest, and a merged token is placed at its window's last patch, not before all others.
    If the window does not divide the grid, the last rows and columns stay as they are. Each sequence of a batch is
    filtered by its own text, padding is ignored, and a prompt that ends with the image is filtered by its last row.
    The layers scale with the decoder's depth. Tokens keep their original positions.

    Where a pixel shuffle follows the tower, tokens are compared and merged after it, in ``unit_window`` windows,
    and the key set is chosen among whole units; the paper has no such model. Without CLS the mean query is used.

    Attributes:
        thresholds: (global, individual), or a name of `PUBLISHED_THRESHOLDS`, to filter by instead of the budget. They
            decide how many tokens are dropped; of the budget only "all" counts then.
        merge_threshold: mean cosine from which on a window merges; a value above 1 switches merging off.
        window: rows and columns of a window of patches.
        unit_window: rows and columns of a window where a token already holds several patches.
        key_ratio: share of the tokens in the key set; 0 for none. Where the budget is smaller, the key set is kept.
        layers: decoder layers, 0-based, after which tokens are dropped; ``None`` scales the released ones.
        floor: least number of tokens per sequence that thresholds leave, chosen by total attention.
        trim_cache: whether dropped tokens also leave the cache of earlier layers, from the first cut on.
        compat: ``"official"`` reproduces the released code for one sequence, together with ``positions="compact"``:
            no floor, thresholds (1.0, 0.0) unless given, merged tokens first. The receipt then numbers cells in that
            order.
    """

    name: ClassVar[str] = "mustdrop"
    stages: ClassVar[tuple[str, ...]] = ("encode", "prefill", "decode")
    default_ratio: ClassVar[float] = 128 / 576
    reads_cls: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True
    exceeds: ClassVar[bool] = True

    positions: Positions = "original"
    thresholds: tuple[float, float] | str | None = None
    merge_threshold: float = 0.8
    window: tuple[int, int] = (3, 3)
    unit_window: tuple[int, int] = (2, 2)
    key_ratio: float = 0.08
    layers: tuple[int, ...] | None = None
    floor: int = 1
    trim_cache: bool = True
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("thresholds", "window", "unit_window", "layers"):  # configuration files have lists
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        check(self)

    @property
    def limits(self) -> tuple[float, float] | None:
        """The thresholds as numbers; ``None`` in budget mode."""
        if isinstance(self.thresholds, str):
            return PUBLISHED_THRESHOLDS[self.thresholds]
        return (1.0, 0.0) if self.thresholds is None and self.compat == "official" else self.thresholds

    # --- encode ---

    def tower_layers(self, feature_layer: int) -> list[int]:
        """The first layer merges; the layer after the consumed one, or the last one, gives the key set."""
        return sorted({0, feature_layer, feature_layer + 1})

    def encode(self, view: TowerView) -> Keep | None:
        """Merge after the first layer, note the key set at the end."""
        if view.layer >= view.feature_layer and self.key_ratio > 0:
            attention = view.per_unit(global_attention(view.attention))
            view.carry[KEY] = key_set(attention, self.key_ratio, view.valid).to(attention.dtype)
        whole = view.units.shape[1] == view.grid[0] * view.grid[1]
        if view.layer > 0 or view.slots is not None or view.valid is not None or not whole:
            return None
        view.carry[SIZE] = torch.ones_like(view.units, dtype=torch.float32)
        if self.compat == "official":
            return self._merge_as_released(view)
        return self._merge(view.hidden, view.grid, self.window, view.target, view.carry)

    def encode_final(self, view: FeaturesView) -> Keep | None:
        """Merge here where the tower's patches were not the tokens."""
        if SIZE in view.carry:
            return None
        view.carry[SIZE] = torch.ones(
            view.features.shape[:2], dtype=torch.float32, device=view.features.device
        )
        return self._merge(view.features, view.grid, self.unit_window, view.target, view.carry)

    def _merge(
        self,
        hidden: torch.Tensor,
        grid: tuple[int, int],
        window: tuple[int, int],
        target: int,
        carry: dict[str, torch.Tensor],
    ) -> Keep | None:
        cells = window_cells(grid, window, hidden.device)
        per_window = cells.shape[1]
        most = (hidden.shape[1] - target) // (per_window - 1) if self.limits is None else None
        merged, keep = merge_alike(hidden, cells, self.merge_threshold, most)
        if KEY in carry:
            carry[KEY] = merge_flags(carry[KEY], cells, merged)
        size = torch.where(merged, float(per_window), 1.0).to(carry[SIZE].dtype)
        carry[SIZE] = carry[SIZE].index_copy(1, cells[:, -1], size)
        return keep

    def _merge_as_released(self, view: TowerView) -> Keep | None:
        if any(side % step for side, step in zip(view.grid, self.window, strict=True)):
            raise ValueError(
                f'compat="official": windows {self.window} do not divide the grid of {view.grid} patches, and the '
                "released code stops there. Leave compat at its default, or choose another window."
            )
        cells = window_cells(view.grid, self.window, view.hidden.device)
        return merge_as_released(view.hidden, cells, self.merge_threshold)

    # --- prefill and decode ---

    def prefill_layers(self, depth: int) -> list[int]:
        """Four layers in the first half, unless `layers` names others."""
        if self.layers is None:
            return scaled_layers(depth)
        if self.layers[-1] >= depth:
            raise ValueError(f"layers={self.layers}: this decoder has the layers 0 to {depth - 1}")
        return list(self.layers)

    def left(
        self, layer: int, depth: int, entered: int, target: int, tiles: list[tuple[int, int]]
    ) -> int | None:
        """This step's share of the budget, if the key set is known to fit. Thresholds depend on the attention."""
        if self.limits is not None or not tiles:
            return None
        steps = self.prefill_layers(depth)
        share = min(target / max(entered, 1), 1.0)
        count = round(entered * share ** ((steps.index(layer) + 1) / len(steps)))
        keys = sum(math.ceil(units * self.key_ratio) for units, _ in tiles)
        return count if count >= keys else None

    def evicted_layers(self, depth: int) -> Collection[int]:
        """All layers from the first cut on, as in the released code."""
        return range(self.prefill_layers(depth)[0], depth) if self.trim_cache else ()

    def evict(self, view: CacheView) -> torch.Tensor:
        """Tokens that a later layer dropped leave the cache of this one, too."""
        return view.remaining

    def prefill(self, view: PrefillView) -> torch.Tensor:
        """Drop the tokens that the text attends to least, but none of the key set."""
        visual = view.visual
        keys = visual & (view.carry[KEY] > 0) if KEY in view.carry else torch.zeros_like(visual)
        voters = view.text
        voters = voters | (last_row(view.valid, visual) & ~voters.any(-1, keepdim=True))
        most = view.most_text()
        total, peak = attention_mass(view.recorded, voters, None if most is None else max(most, 1))
        if self.limits is None:
            count = view.left
            if count is None:
                steps = self.prefill_layers(view.depth)
                count = step_count(view.initial, view.target, steps.index(view.layer) + 1, len(steps))
                count = torch.maximum(count, keys.sum(-1))
            return ~visual | top_mask(total.masked_fill(keys, torch.inf), count, visual)
        keep = dual_attention_filter(total, peak, visual, *self.limits) | keys | ~visual
        if self.compat == "official":
            return keep
        keep = keep | top_mask(total, torch.full_like(view.initial, self.floor), visual)
        return keep | (view.target >= view.initial)[:, None]


def check(policy: MustDrop) -> None:
    """Raise ValueError for settings that make no sense."""
    if policy.compat not in (None, "official"):
        raise ValueError(f'compat={policy.compat!r}: choose "official" or None')
    check_thresholds(policy.thresholds)
    for name in ("window", "unit_window"):
        value = getattr(policy, name)
        if not (isinstance(value, tuple) and len(value) == 2 and min(value) >= 1 and value[0] * value[1] > 1):
            raise ValueError(
                f"{name}={value!r}: give (rows, columns) that hold at least two tokens, such as (3, 3)"
            )
    if not 0 <= policy.key_ratio <= 1:
        raise ValueError(f"key_ratio={policy.key_ratio!r}: choose a share from 0 to 1")
    if policy.floor < 0:
        raise ValueError(f"floor={policy.floor!r}: choose a number of tokens of at least 0")
    layers = policy.layers
    if layers is not None and (not layers or min(layers) < 0 or list(layers) != sorted(set(layers))):
        raise ValueError(
            f"layers={layers!r}: give 0-based layer numbers in ascending order, such as (2, 6, 10, 14)"
        )
