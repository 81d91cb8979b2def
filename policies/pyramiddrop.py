"""PyramidDrop: fewer visual tokens from stage to stage of the decoder (Xing et al., CVPR 2025, arXiv 2410.17247).

Follows ``pdrop_rank_drop`` of the released ``llava/model/modeling_llama_pdrop.py``: before a decoder layer,
tokens are ranked by the attention that they receive from the prompt's last row *in that layer*, and cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ..contract.policy import Policy
from .attention_rows import masked_softmax, row_logits
from .dual_attention import step_count
from .scores import last_row, top_mask
from .settings import check_choice

if TYPE_CHECKING:
    from ..contract.views import AttentionView, PrefillView

STAGES = 4
"""Parts of the decoder; all but the first begin with a cut."""


def scaled_layers(depth: int) -> tuple[int, ...]:
    """The decoder layers before which the released code cuts, 8, 16 and 24 of 32, in another decoder.

    Raises:
        ValueError: the decoder has a single layer.
    """
    found = {int(stage * depth / STAGES + 0.5) for stage in range(1, STAGES)}
    layers = tuple(sorted(layer for layer in found if 0 < layer < depth))
    if not layers:
        raise ValueError(f"a decoder of depth {depth} has no two layers between which tokens can be dropped")
    return layers


def attention_of_row(
    view: AttentionView, row: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The attention from one row of each sequence to all rows, averaged over heads: ``(batch, rows)``.

    ``row`` is bool ``(batch, rows)`` with one True per sequence. The softmax is fp32 or better and includes earlier
    turns; its result is averaged in ``dtype``.
    """
    rows = row.shape[1]
    place = row.to(torch.int8).argmax(-1, keepdim=True)
    query = view.query.gather(
        2, place[:, None, :, None].expand(-1, view.query.shape[1], -1, view.query.shape[3])
    )
    logits = row_logits(query, view.key, view.scaling)
    paid = masked_softmax(logits, place + view.key.shape[2] - rows, view.valid)[:, :, 0, -rows:]
    return paid.to(dtype or paid.dtype).mean(1)


@dataclass(frozen=True)
class PyramidDrop(Policy):
    """PyramidDrop, inside the decoder (prefill stage).

    The default mode differs from the released code in these points:

    - The budget is what remains after the last cut, and all cuts keep the same share; the default of an eighth gives
      the released shares of a half, a quarter and an eighth. `ratios` sets them one by one.
    - The layers scale with the decoder's depth.
    - Batches, padding on either side, several images in a prompt (their tokens compete) and grouped-query attention
      work. The released code takes one image per prompt, and fails with padding on the left, or with more than one
      group of query heads.
    - Sequences are not cut off at the tokenizer's maximum length.
    - Attention is averaged over heads in fp32, and the first of equal tokens is kept.
    - With multimodal RoPE tokens keep their positions.

    Attributes:
        layers: decoder layers, 0-based, before which tokens are dropped; ``None`` scales the released ones.
        ratios: shares of the image's tokens that are left after each cut, instead of a budget; rounded down. Of the
            budget only "all" counts then.
        compat: ``"official"`` averages attention over heads in the model's dtype, and takes the released ratios where
            none are given.
    """

    name: ClassVar[str] = "pyramiddrop"
    stages: ClassVar[tuple[str, ...]] = ("prefill",)
    default_ratio: ClassVar[float] = 0.125
    reads_ahead: ClassVar[bool] = True

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, compat=(None, "official"))
        for name in ("layers", "ratios"):  # configuration files have lists
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        layers, ratios = self.layers, self.ratios
        if layers is not None and (not layers or layers[0] < 1 or list(layers) != sorted(set(layers))):
            raise ValueError(
                f"layers={layers!r}: give 0-based layer numbers of at least 1 in ascending order, such as (8, 16, 24)"
            )
        if ratios is not None and (
            not ratios
            or not 0 <= ratios[-1] <= ratios[0] <= 1
            or list(ratios) != sorted(ratios, reverse=True)
        ):
            raise ValueError(
                f"ratios={ratios!r}: give descending shares from 1 to 0, such as (0.5, 0.25, 0.125)"
            )
        if layers is not None and ratios is not None and len(layers) != len(ratios):
            raise ValueError(f"layers={layers!r} and ratios={ratios!r}: give one ratio per layer")

    def prefill_layers(self, depth: int) -> list[int]:
        """The layers after which tokens are dropped, one before each of `layers`."""
        layers = scaled_layers(depth) if self.layers is None else self.layers
        if layers[-1] >= depth:
            raise ValueError(f"layers={layers}: this decoder has the layers 0 to {depth - 1}")
        ratios = self._shares
        if ratios is not None and len(ratios) != len(layers):
            raise ValueError(
                f"ratios={ratios}: a decoder of depth {depth} is cut before layers {layers}, give one ratio each"
            )
        return [layer - 1 for layer in layers]

    @property
    def _shares(self) -> tuple[float, ...] | None:
        return (0.5, 0.25, 0.125) if self.ratios is None and self.compat == "official" else self.ratios

    def left(self, layer: int, depth: int, entered: int, target: int, tiles: list[tuple[int, int]]) -> int:
        """The number of tokens that this cut leaves."""
        steps = self.prefill_layers(depth)
        step, shares = steps.index(layer), self._shares
        if target >= entered:
            return entered
        if shares is not None:
            return int(entered * shares[step])
        return round(entered * (target / entered) ** ((step + 1) / len(steps)))

    def _count(self, view: PrefillView) -> torch.Tensor:
        """The same on the device, of each sequence: int64 ``(batch,)``."""
        steps = self.prefill_layers(view.depth)
        step, shares = steps.index(view.layer), self._shares
        if shares is None:
            return step_count(view.initial, view.target, step + 1, len(steps))
        some = (view.initial.double() * shares[step]).long()
        return torch.where(view.target < view.initial, some, view.initial)

    def prefill(self, view: PrefillView) -> torch.Tensor:
        """Keep the tokens to which the last row will attend most in the next layer."""
        if view.next_attention is None:
            raise RuntimeError(
                f"{self.name} reads the attention after layer {view.layer}, which is not available"
            )
        dtype = view.hidden.dtype if self.compat == "official" else None
        paid = attention_of_row(view.next_attention(), last_row(view.valid, view.visual), dtype)
        return ~view.visual | top_mask(paid, self._count(view), view.visual)
