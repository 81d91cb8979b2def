"""FlowCut: information-flow pruning inside the vision tower (Tong et al., NeurIPS 2025, arXiv 2505.19536).

Follows the released ``utils_flowcut.py`` and ``modeling_clip_flowcut.py``. Scores are taken at every layer, averaged
over the layers seen so far, and every second layer drops as many tokens as the entropy of the CLS attention allows,
so that exactly the wanted number enters the layer whose output is consumed. The released code for LLaVA-NeXT and
Qwen2-VL has a second half inside the decoder (``modeling_llama_flowcut.py``, ``FlowCut_Qwen``), see `FlowCutNext` and
`FlowCutQwen`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ..contract.policy import Keep, Policy
from ..contract.views import AttentionView, FeaturesView, PrefillView, TowerView
from .scores import exact_dtype, global_logits, last_row, top_mask


def information_score(
    attention: torch.Tensor, semantic: torch.Tensor, magnitude: torch.Tensor
) -> torch.Tensor:
    """Score of each token from one layer: (attention share + similarity share) x value magnitude.

    All arguments and the result are ``(batch, tokens)``. Official: ``compute_score``.
    """
    tiny = torch.finfo(attention.dtype).tiny  # CLS may give the patches no attention
    share = attention / attention.sum(-1, keepdim=True).clamp(min=tiny)
    return (share + semantic / semantic.sum(-1, keepdim=True).clamp(min=tiny)) * magnitude


def value_magnitude(value: torch.Tensor) -> torch.Tensor:
    """L1 norm of the head-averaged values ``(batch, heads, tokens, head_dim)``: ``(batch, tokens)``.

    Heads are averaged with their sign before the norm is taken, as the released code does.
    """
    return value.mean(1).abs().sum(-1)


def relative_entropy(attention: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """Entropy of the attention ``(batch, tokens)`` as a share of the largest possible one, ``ln(count)``: ``(batch,)``.

    0 ln 0 counts as 0 (the released code yields NaN there and stops).
    """
    spread = entropy(attention)
    return spread / torch.log(torch.as_tensor(count, dtype=spread.dtype, device=spread.device))


def entropy(attention: torch.Tensor) -> torch.Tensor:
    """Entropy of each row's shares of its attention ``(batch, tokens)``: ``(batch,)``."""
    return torch.special.entr(attention / attention.sum(-1, keepdim=True)).sum(-1)


def wanted_drops(width: Any, target: int, remaining: int, flatness: Any) -> Any:
    """How many of ``width`` tokens a layer drops whose attention has the relative entropy ``flatness``, not rounded."""
    return (width - target) / remaining**0.5 * (1 - flatness**2)


def drop_counts(
    attention: torch.Tensor, alive: list[int], target: int, remaining: int, batch_max: bool
) -> list[int]:
    """How many tokens each row drops at a layer with ``remaining`` layers to go. Official: ``adaptive_prune_ratio``.

    ``attention`` is ``(batch, tokens)`` with ``alive[b]`` real tokens in row ``b``. ``batch_max`` gives every row
    the largest count of the batch, as the released code does; without it a row does not depend on the rest of the
    batch. Waits for the device.
    """
    if batch_max:  # in the dtype of the model, as there
        width = torch.tensor(alive, dtype=attention.dtype, device=attention.device)
        counts: list[int] = masked_drop_counts(attention, width, target, remaining, batch_max).tolist()
        return counts
    wanted = [
        wanted_drops(n, target, remaining, spread / math.log(max(n, 2)))
        for n, spread in zip(alive, entropy(attention).tolist(), strict=True)
    ]
    return [0 if math.isnan(n) else round(n) for n in wanted]


def masked_drop_counts(
    attention: torch.Tensor, alive: torch.Tensor, target: int, remaining: int, batch_max: bool
) -> torch.Tensor:
    """`drop_counts` that stay on the device: int64 ``(batch,)``. ``alive`` ``(batch,)`` are a row's real tokens."""
    spread = entropy(attention)
    spread = spread if batch_max else spread.double()
    width = alive.to(spread.dtype)
    wanted = wanted_drops(width, target, remaining, spread / width.clamp(min=2).log()).nan_to_num(0.0)
    if batch_max:
        wanted = wanted.max().expand(len(wanted))
    return wanted.round().long()


def layer_scores(
    layers: list[AttentionView], exact: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """CLS attention and information score of each patch, of several vision layers of the same tokens at once.

    Two ``(layers, batch, patches)``, in fp32 or better, or in ``exact``. Without CLS the mean query takes its place,
    and the score is attention times value magnitude. The same as `global_attention`, `global_similarity`,
    `value_magnitude` and `information_score` of each layer, in fewer operations: one softmax, one normalisation and one
    norm for all.
    """
    first, count = layers[-1], len(layers)
    dtype, device = exact or exact_dtype(first.query.dtype), first.query.device
    values = [seen.value.to(device) if exact else seen.value.to(device, dtype) for seen in layers]
    logits = [global_logits(seen, dtype).to(device) for seen in layers]
    if first.has_cls:
        logits += [(value.to(dtype) @ value[:, :, 0, :, None].to(dtype)).squeeze(-1) for value in values]
    joined = torch.stack(logits)
    if first.valid is not None:
        joined = joined.masked_fill(~first.valid[:, None], -torch.inf)
    shares = joined.softmax(-1).mean(2)
    magnitude = torch.linalg.vector_norm(torch.stack([value.mean(1) for value in values]), 1, -1)
    if not first.has_cls:
        return shares, shares * magnitude
    shares = shares[..., 1:]
    whole = shares.sum(-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
    normal = shares / whole
    return shares[:count], (normal[:count] + normal[count:]) * magnitude[..., 1:]


@dataclass(frozen=True)
class FlowCut(Policy):
    """FlowCut, inside the vision tower (encode stage).

    The default mode differs from the released code in three ways: scores are computed in fp32 or better; the number
    of tokens dropped at a layer depends on the image alone, not on the most prunable image of the batch; fully
    concentrated attention gives entropy 0 instead of NaN. For one image in fp32 both modes keep the same tokens.

    Where a pixel shuffle merges 2x2 patches, whole cells are scored (sum of their patches) and dropped; the paper
    has no such model. Without a CLS token the mean query is used instead and the similarity term is left out, as in
    the authors' Qwen2-VL code.

    Attributes:
        compat: ``"official"`` reproduces the released code, batch-maximum rule and model-dtype scores included. On
            Qwen2-VL it works as `FlowCutQwen` says.
    """

    name: ClassVar[str] = "flowcut"
    stages: ClassVar[tuple[str, ...]] = ("encode",)
    default_ratio: ClassVar[float] = 128 / 576
    reads_cls: ClassVar[bool] = True
    late: ClassVar[bool] = True

    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compat not in (None, "official"):
            raise ValueError(f'compat={self.compat!r}: choose "official" or None')

    def for_family(self, family: str, mrope: bool) -> Policy:
        """The released code has a separate variant for Qwen2-VL."""
        policy = super().for_family(family, mrope)
        if self.compat is None:
            return policy
        if mrope and family not in RELEASED:
            raise ValueError(
                'compat="official": of models with multimodal RoPE, the released code knows '
                f"{', '.join(RELEASED)} only. Leave compat out."
            )
        fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
        return RELEASED[family](**fields) if family in RELEASED else policy

    def tower_layers(self, feature_layer: int) -> range:
        """Every second layer before the consumed one: the cuts fall on these."""
        consumed = self._consumed(feature_layer)
        return range(1 - consumed % 2, consumed, 2)

    def watched_layers(self, feature_layer: int) -> range:
        """The layers between them, which are scored together with the next one."""
        consumed = self._consumed(feature_layer)
        return range(consumed % 2, consumed - 1, 2)

    def encode(self, view: TowerView) -> Keep | None:
        """Score the layers since the last cut, and cut again."""
        width, target = view.units.shape[1], self._leaving(view.target)
        if width <= target:
            return None
        attention, scores = self._scores(view)
        # the average of half the last layer, a quarter of the one before, ..., times two: ranks are the same
        known = view.carry.get("flow")
        flow = scores[0] * 2 if known is None else torch.add(scores[0], known, alpha=0.5)
        for score in scores[1:]:
            flow = torch.add(score, flow, alpha=0.5)
        view.carry["flow"] = flow
        ranked = flow if view.valid is None else flow.masked_fill(~view.valid, -torch.inf)
        remaining = self._consumed(view.feature_layer) - 1 - view.layer
        if view.still:
            if remaining == 0:  # no cut leaves fewer
                return Keep.top(ranked, target)
            among = view.valid if view.valid is not None else torch.ones_like(view.units, dtype=torch.bool)
            return Keep.masked(top_mask(ranked, self._kept(attention, view, target, remaining), among))
        alive = [width] * len(view.units) if view.valid is None else view.valid.sum(-1).tolist()
        if max(alive) <= target:
            return None
        if remaining == 0:
            kept = [min(n, target) for n in alive]
        else:
            drop = self._drop_counts(attention, alive, target, remaining)
            kept = [min(n, max(n - p, target)) for n, p in zip(alive, drop, strict=True)]
        return None if kept == alive else Keep.top(ranked, kept)

    def _kept(self, attention: torch.Tensor, view: TowerView, target: int, remaining: int) -> torch.Tensor:
        """How many tokens a cut leaves each tile: int64 ``(batch,)``, without asking the device."""
        batch, width = view.units.shape
        alive = (
            torch.full((batch,), width, device=view.units.device)
            if view.valid is None
            else view.valid.sum(-1)
        )
        official = self.compat == "official"
        dropped = masked_drop_counts(attention, alive, target, remaining, official)
        return torch.minimum(alive, (alive - dropped).clamp(min=target))

    def _leaving(self, target: int) -> int:
        """How many tokens leave the tower where ``target`` are wanted in the end."""
        return target

    def _consumed(self, feature_layer: int) -> int:
        """The layer that exactly the wanted number enters."""
        return feature_layer

    def _drop_counts(
        self, attention: torch.Tensor, alive: list[int], target: int, remaining: int
    ) -> list[int]:
        return drop_counts(attention, alive, target, remaining, self.compat == "official")

    def encode_final(self, view: FeaturesView) -> Keep | None:
        """Choose by the scores of all layers, where the cuts inside the tower had to be left out."""
        return Keep.top(view.carry["flow"], view.target) if "flow" in view.carry else None

    def _scores(self, view: TowerView) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """CLS attention of this layer, and information scores of the layers since the last cut: ``(batch, units)``."""
        mine = self.watched_layers(view.feature_layer)
        layers = [seen for number, seen in view.earlier.items() if number in mine]
        layers.append(view.attention)
        exact = view.attention.query.dtype if self.compat == "official" else None
        attention, scores = layer_scores(layers, exact)
        if view.slots is None:
            return attention[-1], list(scores)
        patches = torch.stack([attention[-1], *scores], -1)
        here, *summed = view.per_unit(patches).unbind(-1)
        return here, summed


LAYER = 1
"""0-based decoder layer after which tokens are dropped."""


def relevance_score(view: AttentionView, visual: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """How relevant each ``visual`` row is to the prompt's ``last`` one, ``(batch, rows)``; 0 for text.

    Its query with their keys and its value with their values, a softmax over visual rows each, shares of both added and
    weighted by the magnitude of the value. ``visual`` and ``last`` are bool ``(batch, rows)``; key heads may be shared.
    """
    rows = visual.shape[1]
    dtype = torch.promote_types(view.query.dtype, torch.float32)
    key, value = view.key[:, :, -rows:].to(dtype), view.value[:, :, -rows:].to(dtype)
    place = last.to(torch.int8).argmax(-1)[:, None, None, None]

    def of_last(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).gather(2, place.expand(-1, x.shape[1], 1, x.shape[3]))

    def share(query: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        grouped = query.reshape(len(query), other.shape[1], -1, query.shape[3])
        logits = (grouped @ other.mT * view.scaling).masked_fill(~visual[:, None, None], -torch.inf)
        return logits.softmax(-1).nan_to_num(0.0).mean((1, 2))

    return information_score(
        share(of_last(view.query), key), share(of_last(value), value), value_magnitude(value)
    )


@dataclass(frozen=True)
class FlowCutDecoder(Policy):
    """One cut at a decoder layer (prefill stage): the released code's second half on LLaVA-NeXT and Qwen2-VL."""

    name: ClassVar[str] = "flowcut"
    stages: ClassVar[tuple[str, ...]] = ("prefill",)
    reads_attention: ClassVar[bool] = True

    def prefill_layers(self, depth: int) -> list[int]:
        """The second layer."""
        return [LAYER]

    def prefill(self, view: PrefillView) -> torch.Tensor:
        """Exactly the wanted number of visual rows, those most relevant to the last row of the prompt."""
        score = relevance_score(view.recorded, view.visual, last_row(view.valid, view.visual))
        return ~view.visual | top_mask(score, view.target, view.visual)


@dataclass(frozen=True)
class FlowCutQwen(FlowCut):
    """FlowCut on Qwen2-VL as released (encode and prefill stage).

    Twice the wanted tokens leave the tower, in which single patches are dropped, the last time after its last block.
    The merger then makes one token of every four of them, whichever these are, and the tokens take the first places of
    the image. Half of them are dropped in the decoder, after its second layer: with ``tokens=5`` ten enter it, which
    `Receipt.kept` lists, and five are left from its third layer on. The released code takes one image a prompt; here
    each image is treated as if it were alone.
    """

    single_patches: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True

    prefill_layers = FlowCutDecoder.prefill_layers
    prefill = FlowCutDecoder.prefill

    def _leaving(self, target: int) -> int:
        return 2 * target

    def _consumed(self, feature_layer: int) -> int:
        return feature_layer + 1

    def _drop_counts(
        self, attention: torch.Tensor, alive: list[int], target: int, remaining: int
    ) -> list[int]:
        """From the entropy ``-sum g ln(g + 1e-7)``, ``g`` as it is."""
        entropy = -(attention * (attention + 1e-7).log()).sum(-1)
        flatness = entropy / torch.log(torch.tensor(float(max(alive[0], 2)), dtype=attention.dtype))
        return [int(n) for n in wanted_drops(alive[0], target, remaining, flatness).round().tolist()]


@dataclass(frozen=True)
class FlowCutNext(FlowCut):
    """FlowCut on LLaVA-NeXT as released (encode and prefill stage).

    The budget applies to a whole image: half of it leaves the tower for every tile, padding is removed, no newlines are
    inserted, and the cut in the decoder leaves exactly the budget, if there is more.
    """

    per_image: ClassVar[bool] = True
    drops_newlines: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True

    prefill_layers = FlowCutDecoder.prefill_layers
    prefill = FlowCutDecoder.prefill

    def tile_target(self, target: int) -> int:
        """Half of it, rounded down."""
        return target // 2


RELEASED: dict[str, type[FlowCut]] = {"llava_next": FlowCutNext, "qwen2_vl": FlowCutQwen}
"""Model families for which the released code differs."""
