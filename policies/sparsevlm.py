"""SparseVLM: words related to the image rate its tokens, and dropped tokens are recycled (Zhang et al., ICML 2025,
arXiv 2410.04417).

Follows the released ``llava/model/language_model`` (``score.py``, ``utils.py``, ``modelling_sparse_llama.py``): words
of the question that visual tokens resemble become *raters*; after each of three decoder layers the raters' attention
decides which visual tokens are kept, and the better ones of the others are merged into a few, by `density_peaks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from ..contract.policy import Policy
from ..kernels import gather_rows
from .attention_rows import masked_softmax, row_logits, rows_where
from .density_peaks import cluster_means, density_peaks
from .scores import attention_mass, last_row, top_mask
from .settings import check_choice

if TYPE_CHECKING:
    from ..contract.views import AttentionView, PrefillView

RATER, PLACE = "sparsevlm_rater", "sparsevlm_place"
"""Names under which a row's role as a rater and its position in the sequence are stored."""

UNITS = 576
"""Visual tokens of an image in the released tables."""
CUTS = (2, 6, 15)
"""Released layers, of 32, after which tokens are dropped."""
TABLES = {
    False: {0: (0, 0, 0), 64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)},
    True: {0: (0, 0, 0), 64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118)},
}
"""Released numbers of tokens after each cut, by the budget they go by; True for SparseVLM+."""
SHARED_HEADS = 14
"""Heads whose attention SparseVLM+ reads."""


def rater_scores(embeds: torch.Tensor, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """How similar each word is to the visual tokens: ``(batch, rows)``, 0 for rows that are not words.

    Each visual token has a softmax of dot products over the words; these are averaged over visual tokens.
    Waits for the device to count the words.

    Args:
        embeds: the decoder's input, ``(batch, rows, channels)``. Computed in its dtype, or in the type that it promotes
            to with fp32.
        visual, text: bool ``(batch, rows)``.
    """
    embeds = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
    index = rows_where(text)
    real = text.gather(1, index)
    logits = (embeds @ gather_rows(embeds, index).mT).masked_fill(
        ~real[:, None], torch.finfo(embeds.dtype).min
    )
    share = logits.softmax(-1).masked_fill(~visual[..., None], 0).sum(1) / visual.sum(-1, keepdim=True).clamp(
        min=1
    )
    return torch.zeros_like(embeds[..., 0]).scatter_add(1, index, share.masked_fill(~real, 0))


def choose_raters(score: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Words whose ``score`` ``(batch, rows)`` is above the mean of all words, bool; all words where none is."""
    mean = score.masked_fill(~text, 0).sum(-1, keepdim=True) / text.sum(-1, keepdim=True).clamp(min=1)
    above = text & (score > mean)
    return above | (text & ~above.any(-1, keepdim=True))


def head_relation(
    attention: torch.Tensor, real: torch.Tensor, visual: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The raters' attention, averaged over the ``heads`` with most visual attention, and that of each head.

    Args:
        attention: ``(batch, all heads, raters, rows)``.
        real: bool ``(batch, raters)``, False for padding.
        visual: bool ``(batch, rows)``.
        heads: number of heads to average over, at most all.

    Returns:
        ``(batch, rows)`` and ``(batch, all heads)``.
    """
    paid = attention.masked_fill(~real[:, None, :, None], 0).sum(2)
    total = paid.masked_fill(~visual[:, None], 0).sum(-1)
    best = total.topk(min(heads, total.shape[1]), dim=-1).indices
    chosen = paid.gather(1, best[..., None].expand(-1, -1, paid.shape[2]))
    return chosen.mean(1) / real.sum(-1, keepdim=True).clamp(min=1), total


def rotary_of_ones(place: torch.Tensor, others: torch.Tensor, size: int, theta: float) -> torch.Tensor:
    """The logit of two vectors of ones at positions ``(batch, a)`` and ``(batch, b)``: fp32 ``(batch, a, b)``.

    ``size`` is the head size, ``theta`` the base of the rotary embedding. SparseVLM+ divides attention by this logit to
    remove the effect of distance; but it passes through zero.
    """
    frequency = theta ** (-torch.arange(0, size, 2, device=place.device).float() / size)
    apart = (place[..., None] - others[:, None]).float()
    total = torch.zeros_like(apart)
    for one in frequency:
        total += (apart * one).cos()
    return total * 2 / size**0.5


def stage_counts(
    initial: torch.Tensor, target: torch.Tensor, stage: int, table: Mapping[int, tuple[int, ...]]
) -> torch.Tensor:
    """Tokens kept at cut ``stage``: int64 like ``initial``, the tokens that there are, and ``target``, the budget.

    The released ``table`` is for 576 tokens; it is scaled. Between its budgets, and up to all tokens, counts are
    interpolated in whole numbers, half rounded up. At least one token is kept.
    """
    knots = [*table, UNITS]
    counts = [*(row[stage] for row in table.values()), UNITS]
    amount, whole = target * UNITS, initial.clamp(min=1)
    result = initial
    for low, high, few, many in reversed(list(zip(knots, knots[1:], counts, counts[1:], strict=False))):
        above = few * initial * (high - low) + (many - few) * (amount - low * initial)
        below = UNITS * (high - low)
        result = torch.where(amount < high * initial, (2 * above + below) // (2 * below), result)
    return torch.minimum(result.clamp(min=1), whole).minimum(initial)


def recycled_counts(dropped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of the int64 ``dropped`` tokens are recycled, and how many tokens these become; 0 for 0."""
    some = (dropped.double() * 0.3).long() + 1
    return some.minimum(dropped), torch.where(dropped > 0, some // 10 + 1, 0)


@dataclass(frozen=True)
class SparseVLM(Policy):
    """SparseVLM, inside the decoder (prefill stage); with `plus`, SparseVLM+.

    Once per prompt, words after the image that visual tokens resemble more than the average word become raters. After
    each of three layers visual tokens are ranked by the attention of the raters. Of those dropped, the best three in
    ten are clustered, and each cluster becomes one token, which competes with the others at the next cut. Budgets are
    named as in the paper's tables: about that many tokens per layer on average, more in the first layers and fewer in
    the last ones. SparseVLM+ recycles nothing, keeps positions, and reads the 14 heads that attend to the image most.

    In the paper the rank of the attention matrix decides how many tokens to drop. That is not in the released code,
    whose counts are a table. The default mode differs from that code in these points:

    - Tables are scaled to any number of tokens, and interpolated between budgets; the layers scale with depth.
    - A cut drops nothing if its count is reached already; the released code then merges one token with itself and moves
      it after the others.
    - A merged token is placed at its cluster's centre; the released code appends merged tokens after all others.
    - Densities have no noise; the released code breaks ties at random by it. Here the first of equals wins.
    - Each sequence of a batch is rated by its own words, padding is ignored, and several images compete. A prompt that
      ends with the image is rated by its last row; if all words are equally similar, all are raters.
    - Similarity is computed in fp32 or better; in half precision it may overflow.
    - SparseVLM+ does not divide attention by the logit of two rotated vectors of ones, which is near zero or negative
      at some distances, and then turns the ranking upside down.

    With multimodal RoPE tokens keep their positions.

    Attributes:
        plus: SparseVLM+, the released ``USE_VERSION=2_0``.
        layers: decoder layers, 0-based, after which tokens are dropped; ``None`` scales the released 2, 6 and 15 of 32.
        counts: tokens kept after each of `layers`, instead of a budget, of which only "all" counts then. Merged tokens
            are not included.
        rope_theta: base of the rotary embedding, read from the decoder's config; only the official SparseVLM+ needs it.
        compat: ``"official"`` reproduces the released code for one sequence without the noise. The receipt then
            numbers cells in its order.
    """

    name: ClassVar[str] = "sparsevlm"
    stages: ClassVar[tuple[str, ...]] = ("prefill",)
    default_ratio: ClassVar[float] = 192 / 576
    reads_attention: ClassVar[bool] = True

    plus: bool = False
    layers: tuple[int, ...] | None = None
    counts: tuple[int, ...] | None = None
    rope_theta: float | None = None
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, plus=(False, True), compat=(None, "official"))
        for name in ("layers", "counts"):  # configuration files have lists
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        layers, counts = self.layers, self.counts
        if layers is not None and (not layers or layers[0] < 0 or list(layers) != sorted(set(layers))):
            raise ValueError(
                f"layers={layers!r}: give 0-based layer numbers in ascending order, such as {CUTS}"
            )
        if layers is not None and counts is None and len(layers) != len(CUTS):
            raise ValueError(
                f"layers={layers!r}: the tables have {len(CUTS)} cuts, give as many layers, or counts"
            )
        if counts is not None and (len(counts) != len(layers or CUTS) or min(counts) < 1):
            raise ValueError(
                f"counts={counts!r}: give one number of tokens for each layer of {layers or CUTS}"
            )

    def for_decoder(self, config: Any) -> SparseVLM:
        """This policy, with the base of the decoder's rotary embedding."""
        if self.rope_theta is not None:
            return self
        given = getattr(config, "rope_parameters", None) or {}
        return replace(self, rope_theta=float(given.get("rope_theta", 10000.0)))

    def for_family(self, family: str, mrope: bool) -> Policy:
        """SparseVLM+ keeps positions, unless told otherwise."""
        if self.plus and self.positions is None:
            return replace(self, positions="original")
        return super().for_family(family, mrope)

    def cuts(self, depth: int) -> dict[int, int]:
        """The cut that each layer of a decoder makes: its number in the table."""
        layers: Sequence[int] = (
            [int(k * depth / 32 + 0.5) for k in CUTS] if self.layers is None else self.layers
        )
        if self.layers is not None and layers[-1] >= depth:
            raise ValueError(f"layers={self.layers}: this decoder has the layers 0 to {depth - 1}")
        # if several cuts fall on one layer of a shallow decoder, the last one counts
        return {min(layer, depth - 1): number for number, layer in enumerate(layers)}

    def prefill_layers(self, depth: int) -> list[int]:
        """The first layer, where raters are chosen, and the layers of the cuts."""
        return sorted({0, *self.cuts(depth)})

    def prefill(self, view: PrefillView) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
        """Store the raters; keep the tokens that they attend to most, and merge the next best."""
        if view.layer == 0:
            self._note(view)
        if view.layer not in self.cuts(view.depth):
            return None
        left = view.visual.sum(-1)
        count = torch.where(view.target < view.initial, self._count(view).minimum(left), left)
        relation = self.relation(view)
        kept = top_mask(relation, count, view.visual)
        if self.plus:
            return kept | ~view.visual
        return self._recycle(view, relation, kept)

    def relation(self, view: PrefillView) -> torch.Tensor:
        """The mean attention from raters to each row: ``(batch, rows)``."""
        if view.attention is None:
            raise RuntimeError(
                f"{self.name} reads the attention of layer {view.layer}, which was not recorded"
            )
        rater = view.carry[RATER] > 0
        # in a prompt of images alone the raters are visual tokens, which may have been dropped since
        rater = rater | (last_row(view.valid, view.visual) & ~rater.any(-1, keepdim=True))
        if not self.plus:
            return attention_mass(view.attention, rater)[0] / rater.sum(-1, keepdim=True).clamp(min=1)
        return head_relation(*self._paid(view.attention, rater, view.carry), view.visual, SHARED_HEADS)[0]

    def _paid(
        self, attention: AttentionView, rater: torch.Tensor, carry: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of the attention map that belong to raters ``(batch, heads, raters, rows)``, and which are real."""
        rows, index = rater.shape[1], rows_where(rater)
        query = attention.query
        query = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        logits = row_logits(query, attention.key, attention.scaling)
        number = index + attention.key.shape[2] - rows
        paid = masked_softmax(logits, number, attention.valid)[..., -rows:]
        if self.compat == "official":
            place = carry[PLACE]
            theta = 10000.0 if self.rope_theta is None else self.rope_theta
            paid = paid / rotary_of_ones(place.gather(1, index), place, query.shape[3], theta)[:, None]
        return paid, rater.gather(1, index)

    def _note(self, view: PrefillView) -> None:
        if view.input is None:
            raise RuntimeError(f"{self.name} reads what enters the decoder, which was not recorded")
        text = view.text
        text = text | (last_row(view.valid, view.visual) & ~text.any(-1, keepdim=True))
        rater = choose_raters(rater_scores(view.input, view.visual, text), text)
        view.carry[RATER] = rater.float()
        valid = torch.ones_like(view.visual) if view.valid is None else view.valid
        view.carry[PLACE] = valid.cumsum(-1).float() - 1

    def _count(self, view: PrefillView) -> torch.Tensor:
        """Tokens kept at this cut, without merged ones: int64 ``(batch,)``."""
        number = self.cuts(view.depth)[view.layer]
        if self.counts is None:
            count = stage_counts(view.initial, view.target, number, TABLES[self.plus])
        else:
            count = torch.full_like(view.initial, self.counts[number])
        return count.minimum(view.visual.sum(-1) - 1).clamp(min=0) if self.compat == "official" else count

    def _recycle(
        self, view: PrefillView, relation: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Merge the better ones of the tokens that are not ``kept``; waits for the device to count them."""
        gone = view.visual & ~kept
        some, clusters = recycled_counts(gone.sum(-1))
        widest, most = torch.stack([some, clusters]).amax(-1).tolist()
        if most == 0:
            return None
        order = relation.masked_fill(~gone, -torch.inf).argsort(dim=-1, descending=True, stable=True)[
            :, :widest
        ]
        real = torch.arange(widest, device=order.device) < some[:, None]
        x = gather_rows(view.hidden, order)
        dtype = view.hidden.dtype if self.compat == "official" else None
        centre, cluster = density_peaks(x, clusters.clamp(min=1), most, real, dtype)
        merged = cluster_means(x, cluster, most, real).to(view.hidden.dtype)
        slot = torch.arange(most, device=order.device) < clusters[:, None]
        place = order.gather(1, centre.clamp(max=widest - 1))
        rows, end = view.hidden.shape[1], view.hidden.new_zeros(len(order), 1, view.hidden.shape[2])
        into = torch.where(slot, place, rows)
        stays = torch.nn.functional.pad(kept, (0, 1)).scatter(1, into, True)[:, :rows]
        hidden = torch.cat([view.hidden, end], 1)
        hidden = hidden.scatter(1, into[..., None].expand(-1, -1, hidden.shape[2]), merged)[:, :rows]
        if self.compat == "official":
            hidden = self._merged_last(hidden, kept, stays, into)
        return stays | ~view.visual, hidden

    def _merged_last(
        self, hidden: torch.Tensor, kept: torch.Tensor, stays: torch.Tensor, into: torch.Tensor
    ) -> torch.Tensor:
        """``hidden`` with the kept rows in the first of the remaining places, and the merged ones after them."""
        out = hidden.clone()
        for b in range(len(hidden)):
            merged = into[b][into[b] < hidden.shape[1]]
            out[b, stays[b].nonzero()[:, 0]] = hidden[b, torch.cat([kept[b].nonzero()[:, 0], merged])]
        return out
