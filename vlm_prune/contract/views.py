"""What a policy may look at. The engine fills these in; whatever is costly is computed on first access."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch

LogitEdit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes scaled logits ``(batch, heads, rows, keys)``, not masked yet, and the rows' numbers ``(batch, rows)``."""

Once = Callable[..., torch.Tensor]
"""See `ModulateView.once`."""

View = TypeVar("View", bound="AttentionView | TowerView | FeaturesView")


def _of(view: View, tiles: torch.Tensor) -> View:
    """A view with only these ``tiles`` in each tensor (batch first)."""
    some: dict[str, Any] = {
        f.name: x[tiles] for f in fields(view) if isinstance(x := getattr(view, f.name), torch.Tensor)
    }
    if isinstance(carry := getattr(view, "carry", None), dict):
        some["carry"] = {name: x[tiles] for name, x in carry.items()}
    return replace(view, **some)


@dataclass
class AttentionView:
    """The inputs of one attention call of a vision layer.

    ``query``, ``key``, ``value`` are ``(batch, heads, tokens, head_dim)``; token 0 is CLS where ``has_cls``.
    ``valid`` ``(batch, tokens)`` marks real tokens in a ragged batch, ``None`` if all are.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    has_cls: bool
    valid: torch.Tensor | None = None

    def of(self, tiles: torch.Tensor) -> AttentionView:
        """The same for some ``tiles`` only, int64 numbers."""
        return _of(self, tiles)


@dataclass
class TowerView:
    """The state of the vision tower after one of its layers, for a batch of tiles.

    A *unit* is what becomes one token of the language model: one patch for LLaVA, a 2x2 cell of patches where a
    pixel shuffle follows. ``units`` ``(batch, units)`` are the original numbers of those still present.

    Attributes:
        layer: 0-based number of the layer that just ran.
        feature_layer: the layer whose output is consumed.
        target: units wanted in the end, per tile.
        grid: rows and columns of a tile's units before any cut.
        hidden: the layer's output for the patches ``(batch, patches, channels)``, CLS left out.
        attention: the layer's attention inputs.
        carry: tensors ``(batch, units)`` that the policy passes to its next layer; the engine cuts them along with
            the tokens.
        pixels: ``(batch, 3, height, width)``, the normalised input of the tower.
        earlier: what the attention of layers before computed with, by their number: those that
            `Policy.watched_layers` names and that have run since tokens were last cut.
        still: whether the tower is to keep its shapes, so that nothing waits for a number that depends on the image: a
            policy whose counts do answers `Keep.masked`, with counts that stay on the device.
    """

    layer: int
    feature_layer: int
    target: int
    grid: tuple[int, int]
    units: torch.Tensor
    hidden: torch.Tensor
    attention: AttentionView
    slots: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    carry: dict[str, torch.Tensor] = field(default_factory=dict)
    pixels: torch.Tensor | None = None
    earlier: dict[int, AttentionView] = field(default_factory=dict)
    still: bool = False

    def of(self, tiles: torch.Tensor, target: int) -> TowerView:
        """The same for some ``tiles`` only, int64 numbers, with ``target`` units wanted."""
        earlier = {layer: seen.of(tiles) for layer, seen in self.earlier.items()}
        return replace(_of(self, tiles), attention=self.attention.of(tiles), earlier=earlier, target=target)

    def per_unit(self, per_patch: torch.Tensor) -> torch.Tensor:
        """Sum a quantity ``(batch, patches, ...)`` over the patches of each unit: ``(batch, units, ...)``.

        ``slots`` ``(batch, units, patches_per_unit)`` says where those are; ``None`` means one patch per unit.
        """
        if self.slots is None:
            return per_patch
        trailing = per_patch.shape[2:]
        index = (
            self.slots.flatten(1).view(len(self.slots), -1, *[1] * len(trailing)).expand(-1, -1, *trailing)
        )
        return per_patch.gather(1, index).unflatten(1, self.slots.shape[1:]).sum(2)


@dataclass
class FeaturesView:
    """The features before the projector, or after it.

    Attributes:
        features: ``(batch, units, channels)``, one row per token of the language model, in raster order.
        grid: rows and columns of a tile's units; 1 and their number where tiles or frames stand in one row.
        target: units wanted, per tile, or of all frames together.
        content_key: ``(batch,)`` int64, a number that depends on a tile's pixels alone.
        pixels: ``(batch, 3, height, width)``, the normalised input of the tower; ``None`` once
            tiles are assembled into images, or frames into videos.
        carry: what the policy left in `TowerView.carry`.
        project: the projector as a plain function of ``(batch, units, channels)`` like ``features``, in their dtype;
            ``None`` after it, and where the model's projector is not known.
        frames: of how many frames of a video the units are, as many of each, one frame after the other.
    """

    features: torch.Tensor
    grid: tuple[int, int]
    target: int
    content_key: torch.Tensor
    pixels: torch.Tensor | None
    carry: dict[str, torch.Tensor]
    project: Callable[[torch.Tensor], torch.Tensor] | None = None
    frames: int = 1

    def of(self, tiles: torch.Tensor, target: int) -> FeaturesView:
        """The same for some ``tiles`` only, int64 numbers, with ``target`` units wanted."""
        return replace(_of(self, tiles), target=target)


@dataclass
class EntryView(FeaturesView):
    """Projected features of some tiles at the decoder's entry, where the surrounding text is known.

    Attributes:
        text: embeddings of the text rows of each tile's sequence ``(batch, text rows, channels)``, in order.
        text_valid: bool ``(batch, text rows)``, which of them exist.
        question: bool ``(batch, text rows)``, those after the sequence's last visual token; all of them where none is.
        tower: what entered the projector for each token ``(batch, units, channels)``, if the policy reads it; ``None``
            where the engine knows finished features only. For patches that a packed tower's merger combines it is the
            mean; where stock code assembles tiles into images, it is assembled as the features are.
    """

    text: torch.Tensor = field(kw_only=True)
    text_valid: torch.Tensor = field(kw_only=True)
    question: torch.Tensor = field(kw_only=True)
    tower: torch.Tensor | None = field(default=None, kw_only=True)


@dataclass
class PrefillView:
    """The state of a prefill after one decoder layer.

    Attributes:
        layer: 0-based number of the layer that just ran.
        depth: number of decoder layers.
        hidden: its output ``(batch, rows, channels)``.
        visual: bool ``(batch, rows)``, visual tokens still there.
        valid: bool ``(batch, rows)``, rows that are not padding; ``None`` if none is.
        initial: int64 ``(batch,)``, visual tokens that entered layer 0.
        target: int64 ``(batch,)``, visual tokens that the budget wants in the end.
        attention: the layer's attention inputs, if the policy reads them. Keys may begin with those of earlier turns:
            the last ``rows`` keys are this prefill's. Not repeated for grouped queries.
        carry: values ``(batch, rows)`` that the encode stage left for each visual token, 0 elsewhere; the policy may
            put new ones in.
        norm: the decoder's final norm, with its learned weight: ``(..., channels)`` to the same.
        unpadded: keys ``(batch, heads, rows, head_dim)`` as they would be without padding on the left. Stock code
            counts it in the positions unless the caller gives these, which rotates keys without changing attention.
        input: what the layer was given, shaped like ``hidden``.
        next_attention: returns the attention inputs that the next layer would have if all rows went on, if the policy
            reads ahead. Costs that layer's projections.
        left: what `Policy.left` says of each sequence, int64 ``(batch,)``; ``None`` if it says nothing.
        most_text: no sequence has more rows of text than this tells; ``None`` if that is not known. Waits for the
            device once a prefill, if there are several sequences.
    """

    layer: int
    depth: int
    hidden: torch.Tensor
    visual: torch.Tensor
    valid: torch.Tensor | None
    initial: torch.Tensor
    target: torch.Tensor
    attention: AttentionView | None
    carry: dict[str, torch.Tensor]
    norm: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    unpadded: Callable[[torch.Tensor], torch.Tensor] = lambda key: key

    input: torch.Tensor | None = None
    next_attention: Callable[[], AttentionView] | None = None
    left: torch.Tensor | None = None
    most_text: Callable[[], int | None] = lambda: None

    @property
    def recorded(self) -> AttentionView:
        """`attention`, for policies that require it. Raises RuntimeError if it was not recorded."""
        if self.attention is None:
            raise RuntimeError(f"the attention of decoder layer {self.layer} was not recorded")
        return self.attention

    @property
    def text(self) -> torch.Tensor:
        """Rows after the last visual token, padding excluded: bool ``(batch, rows)``."""
        number = torch.arange(1, self.visual.shape[1] + 1, device=self.visual.device)
        last = (self.visual * number).amax(-1, keepdim=True)
        text = (number > last) & (last > 0)
        return text if self.valid is None else text & self.valid


@dataclass
class CacheView:
    """Rows of one decoder layer's KV cache: those of a prefill, or all of them after a decoding step.

    Attributes:
        layer: 0-based number of the layer.
        depth: number of decoder layers.
        visual: bool ``(batch, rows)``, which stored rows are visual tokens.
        valid: bool ``(batch, rows)``, rows that may be attended; ``None`` if all may.
        remaining: bool ``(batch, rows)``, rows whose tokens also reached the last layer.
        target: int64 ``(batch,)``, visual tokens that the budget wants in the end.
        scores: what `Policy.observe` returned for this layer, for its rows; ``None`` if the layer was not observed.
        all_scores: the same for every observed layer, by the layer's number; rows of layers may differ.
        keys, values: ``(batch, kv_heads, rows, head_dim)``, positions applied.
        step: decoding steps since the prefill; 0 right after it.
        attention: the layer's attention inputs in this decoding step; ``None`` in a prefill, where `Policy.observe`
            sees them layer by layer.
    """

    layer: int
    depth: int
    visual: torch.Tensor
    valid: torch.Tensor | None
    remaining: torch.Tensor
    target: torch.Tensor
    scores: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor
    step: int = 0
    attention: AttentionView | None = None
    all_scores: Mapping[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class ModulateView:
    """One attention call of a decoder layer, after the stock implementation computed it.

    Attributes:
        layer: 0-based number of the layer.
        depth: number of decoder layers.
        query: ``(batch, heads, queries, head_dim)``, positions applied. Query ``j`` is key ``keys - queries + j``.
        key, value: ``(batch, kv_heads, keys, head_dim)``, cache included, not repeated for grouped queries.
        scaling: factor on the dot products.
        output: ``(batch, queries, heads, head_dim)``, what the stock implementation returned.
        hidden: the layer's input ``(batch, queries, channels)``, if the policy reads it.
        visual: bool ``(batch, keys)``, which keys are visual tokens.
        valid: bool ``(batch, keys)``, keys that may be attended; ``None`` if all may.
        prefill: whether this call contains visual tokens.
        brings: bool ``(batch,)``, which sequences of a prefill contain them; ``None`` if all do.
        state: tensors, batch first, stored with this layer's cache; the policy may add its own.
        carry: values ``(batch, keys)`` that the encode stage left for each visual token, 0 elsewhere.
        text_only: ``(batch, heads, head_dim)``, the last row's head outputs of this layer without the image; ``None``
            if no policy needs them.
        logit_edits: what earlier policies of a composition do to the logits, see `rows.LogitEdit`; a policy that
            recomputes rows applies them, and adds its own.
        once: ``once(name, make, *tensors)`` is ``make()``, which follows from ``tensors`` alone, made once a call where
            layers share these: visual marks and masks are the same tensors in all layers that hold the same tokens.
        most_text: how many queries are text in the sequence with most; ``None`` if unknown. Waits for the
            device once a prefill, if there are several sequences.
    """

    layer: int
    depth: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    output: torch.Tensor
    hidden: torch.Tensor | None
    visual: torch.Tensor
    valid: torch.Tensor | None
    prefill: bool
    state: dict[str, torch.Tensor]
    carry: dict[str, torch.Tensor]
    text_only: torch.Tensor | None
    logit_edits: list[LogitEdit] = field(default_factory=list)
    brings: torch.Tensor | None = None
    most_text: Callable[[], int | None] = lambda: None
    once: Once = lambda name, make, *tensors: make()

    @property
    def text_after_image(self) -> torch.Tensor:
        """Queries after the last visual token: bool ``(batch, queries)``."""
        queries = self.query.shape[2]
        after = self.visual.flip(-1).long().cumsum(-1).flip(-1) == 0
        after = after & self.visual.any(-1, keepdim=True)
        after = after if self.valid is None else after & self.valid
        return after[:, -queries:]


@dataclass
class GuideView:
    """The logits of some rows, each of which predicts the token after it, and what they are to be compared with.

    Attributes:
        logits: ``(batch, rows, vocabulary)``, fp32.
        second: the same rows' logits in the second pass, see `Policy.second_pass`; ``None`` if there is none.
        early: by layer, what the language-model head makes of its output, with no norm in between; shaped like
            ``logits``. Computed when asked for.
    """

    logits: torch.Tensor
    second: torch.Tensor | None = None
    early: Mapping[int, torch.Tensor] = field(default_factory=dict)
