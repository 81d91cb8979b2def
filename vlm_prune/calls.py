"""State of one call. It lives in a context variable while the call runs, never on a module.

`EncodeCall` follows a batch of tiles from the tower to behind the projector, `ForwardCall` one forward of the model.
``generate`` encodes images before it calls forward, so the two are separate; an `EncodeCall` rides on the tower's
output object, which stock code hands from the one to the other.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from .errors import UnsupportedCallError
from .timing import Stopwatch

if TYPE_CHECKING:
    from .policies.base import Keep
    from .receipt import Receipt
    from .rows import Rows

_forward: ContextVar[ForwardCall | None] = ContextVar("vlm_prune_forward", default=None)
_encode: ContextVar[EncodeCall | None] = ContextVar("vlm_prune_encode", default=None)

RIDE = "vlm_prune"
"""Attribute of a tower's output object under which its `EncodeCall` travels."""


@dataclass
class EncodeCall:
    """One batch of tiles on its way through tower and projector.

    Attributes:
        tiles: rows of ``pixel_values``.
        grid: rows and columns of units per tile.
        target: units wanted per tile.
        pixels: the tower's input.
        keep: the units that survive so far, ``None`` while all do.
        tower_tokens: tokens that each tower layer computed, per tile.
        carry: ``(tiles, rows for the language model)``, what the policy left for the decoder's stages; 0 at holes.
    """

    tiles: int
    grid: tuple[int, int]
    target: int
    pixels: torch.Tensor
    stopwatch: Stopwatch
    receipt: Receipt
    state: Any = None
    keep: Keep | None = None
    tower_tokens: list[int] = field(default_factory=list)
    carry: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def units(self) -> int:
        """Units per tile before anything is dropped."""
        return self.grid[0] * self.grid[1]

    @property
    def dropped(self) -> int | None:
        """Units dropped in all tiles together, if that is known without asking the device."""
        if self.keep is None:
            return 0
        if self.keep.valid is not None:
            return None
        return self.tiles * (self.units - self.keep.index.shape[1])


def current_encode() -> EncodeCall | None:
    """The encode call under way in this thread, if any."""
    return _encode.get()


def set_encode(call: EncodeCall | None) -> None:
    """Begin (or, with ``None``, end) an encode call."""
    _encode.set(call)


@dataclass
class ForwardCall:
    """One forward of the model.

    Attributes:
        encoded: the tiles that this forward consumes.
        unknown_features: features may arrive whose encode call is not known (sliced or made by the user).
        shift_labels: next-token targets ``(batch, length)`` that the loss will read, ours to write to.
        image_mask: bool ``(batch, length)``, placeholders of visual tokens; known if a policy acts in the decoder.
        mask: the caller's attention mask.
        rows: what is left of the sequence by now; ``entered`` is what entered layer 0, ``layer_rows`` each layer.
        first: what the stock masks and positions of this call were made for, see `layers.DecoderLayers`.
        fitted: masks and positions made for layers that differ from it.
        observed: what the current layer's attention computed with.
        text_only: per layer, the last row's head outputs ``(batch, heads, head_dim)`` without the image.
        probing: True during that pass without the image.
        owner: whose forward this is; ``outer`` is the call of another model around it.
    """

    unknown_features: bool = False
    encoded: list[EncodeCall] = field(default_factory=list)
    shift_labels: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    rows: Rows | None = None
    entered: Rows | None = None
    layer_rows: list[Rows] = field(default_factory=list)
    first: tuple[Any, ...] = ()
    fitted: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)
    text_only: dict[int, torch.Tensor] = field(default_factory=dict)
    probing: bool = False
    stopwatch: Stopwatch | None = None
    owner: Any = None
    outer: ForwardCall | None = None

    def may_have_holes(self, embeds: torch.Tensor) -> bool:
        """Whether holes can stand in ``embeds`` ``(batch, length, channels)``. Asks the device only if it must."""
        if self.encoded:
            return any(call.dropped != 0 for call in self.encoded)
        return self.unknown_features and bool(embeds[..., 0].isnan().any())

    def has_visual_tokens(self) -> bool:
        """Whether this forward brings visual tokens along."""
        return bool(self.encoded) or (self.unknown_features and self.image_mask is not None)

    def mark_visual(self, rows: Rows) -> Rows:
        """``rows`` with `Rows.visual` and the values that the encode stage left for each visual token."""
        mask = self.image_mask
        if mask is None:
            raise UnsupportedCallError(
                "This policy acts on visual tokens inside the decoder and cannot tell which they are: the call has "
                "inputs_embeds with image features already in them. Pass input_ids and pixel_values instead."
            )
        carry = {}
        for name in {name for call in self.encoded for name in call.carry}:
            values = torch.cat([call.carry[name].flatten() for call in self.encoded])
            repeats = int(mask.sum()) // len(values) if len(mask) > 1 else 1
            spread = torch.zeros(mask[::repeats].shape, dtype=values.dtype, device=mask.device)
            # beams come as copies of a row next to it, so every repeats-th row stands for its copies
            carry[name] = spread.masked_scatter(mask[::repeats], values).repeat_interleave(repeats, 0)
        return replace(rows, visual=mask, carry=carry)

    def live_rows(self, alive: torch.Tensor, live: torch.Tensor) -> tuple[int, bool]:
        """Length of the shortened sequence, and whether every row of the batch fills it.

        ``alive`` ``(batch, length)`` is False at holes, ``live`` at padding too. For one sequence with a fixed budget
        the answer is known on the host; otherwise this waits for the device, once.
        """
        dropped = [call.dropped for call in self.encoded]
        planned = sum(n or 0 for n in dropped) if None not in dropped else 0
        if len(alive) == 1 and planned:
            return alive.shape[1] - planned, True
        *counts, holes = torch.cat([live.sum(-1), (~alive).sum()[None]]).tolist()
        if planned and holes % planned:
            raise UnsupportedCallError(
                f"The image features hold {holes} rows of NaN where {planned} tokens were dropped: the vision "
                "tower or projector overflowed (float16?). Load the model in bfloat16 or float32."
            )
        # a turn of holes only (in a chunked prefill) leaves one masked row: stock layers cannot compute none
        return max(1, *counts), 0 < min(counts) == max(counts)


def current_forward() -> ForwardCall | None:
    """The forward under way in this thread, if any."""
    return _forward.get()


def begin_forward(call: ForwardCall) -> None:
    """Make ``call`` the current one."""
    outer = _forward.get()
    # a forward is never inside another of the same model: that one was interrupted, and Ctrl-C runs no hooks
    call.outer = outer if outer is None or outer.owner is not call.owner else outer.outer
    _forward.set(call)


def end_forward() -> ForwardCall | None:
    """End the current forward and return it; the one around it, if any, is current again."""
    call = _forward.get()
    if call is not None:
        _forward.set(call.outer)
    return call


def forget_calls() -> None:
    """End everything that an interrupt may have left under way in this thread."""
    _forward.set(None)
    _encode.set(None)
