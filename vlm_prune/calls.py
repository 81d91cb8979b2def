"""State of one call. It lives in a context variable while the call runs, never on a module.

`EncodeCall` follows a batch of tiles from the tower to behind the projector, `ForwardCall` one forward of the model.
``generate`` encodes images before it calls forward, so the two are separate; an `EncodeCall` rides on the tower's
output object, which stock code hands from the one to the other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from . import stream
from .errors import UnsupportedCallError
from .kernels import to_device
from .survivors import DecoderTrace
from .timing import Stopwatch

if TYPE_CHECKING:
    from .adapters.base import Arrangement
    from .deepstack import Deepstack
    from .packing import Packing
    from .policies.base import Keep
    from .receipt import Receipt
    from .rows import Rows

_forward: ContextVar[ForwardCall | None] = ContextVar("vlm_prune_forward", default=None)
_encode: ContextVar[EncodeCall | None] = ContextVar("vlm_prune_encode", default=None)
_arrangement: ContextVar[Arrangement | None] = ContextVar("vlm_prune_arrangement", default=None)
_riding: ContextVar[tuple[weakref.ref[Any], ...]] = ContextVar("vlm_prune_riding", default=())
_live_rows: ContextVar[Rows | None] = ContextVar("vlm_prune_live_rows", default=None)

RIDE = "vlm_prune"
"""Attribute of a tower's output object under which its `EncodeCall` travels."""

RESUME = "vlm_prune_call"
"""Keyword by which layers find the call they belong to where no context variable says so: in a compiled step, and when
attention runs again in the backward pass."""


@dataclass
class EncodeCall:
    """Some tiles on their way through tower and projector. What each tile has is written down tile by tile.

    Attributes:
        grids: rows and columns of units of each tile.
        targets: units wanted of each tile.
        pixels: the tower's input.
        extra: rows that each tile hands to the language model beside its units (1 where CLS is one of them).
        kind: which of the model's placeholders the tiles stand for, an index into `Anatomy.image_tokens`.
        keeps: the units that survive so far, ``None`` while all do: one `Keep` for each group of tiles, in order. A
            tower that takes tiles of one size has one group, a tower of packed images one group per image.
        tower_tokens: tokens that each tower layer computed of the tile with most.
        tower_keeps: the units among them, as `keeps`.
        carry: ``(rows for the language model,)``, what the policy left for the decoder's stages; 0 at holes.
        arrangement: how the tiles will become images; ``None`` where rows are simply one tile after another.
        packings: what comes of it, image by image.
    """

    grids: list[tuple[int, int]]
    targets: list[int]
    pixels: torch.Tensor
    stopwatch: Stopwatch
    receipt: Receipt
    extra: int = 0
    kind: int = 0
    state: Any = None
    keeps: list[Keep] | None = None
    tower_tokens: list[int] = field(default_factory=list)
    tower_keeps: list[list[Keep] | None] = field(default_factory=list)
    carry: dict[str, torch.Tensor] = field(default_factory=dict)
    arrangement: Arrangement | None = None
    packings: list[Packing] = field(default_factory=list)

    @property
    def tiles(self) -> int:
        """How many tiles there are."""
        return len(self.grids)

    @property
    def units(self) -> list[int]:
        """Units of each tile before anything is dropped."""
        return [rows * columns for rows, columns in self.grids]

    @property
    def rows(self) -> list[int]:
        """Rows behind the projector that stand for each tile before anything is dropped."""
        return [units + self.extra for units in self.units]

    @property
    def spans(self) -> list[tuple[int, list[int]]]:
        """The rows of the language model that stand together, and those of each tile that went into them."""
        if self.arrangement is None:
            return [(rows, [rows]) for rows in self.rows]
        rows = self.rows
        return [(len(p.source), rows[p.tiles.start : p.tiles.stop]) for p in self.packings]

    @property
    def late(self) -> list[bool]:
        """Of each tile, whether its tokens are chosen behind the arranging."""
        return [packing.late for packing in self.packings for _ in packing.tiles] or [False] * self.tiles

    @property
    def numbers(self) -> torch.Tensor:
        """The visual token that each row of the language model is, counted from 1 through the receipt's grids.

        int64 ``(rows,)`` on the host; 0 for rows that no budget counts: CLS, newlines.
        """
        number, parts = 0, []
        if self.arrangement is None:
            for units in self.units:
                parts += [
                    torch.zeros(self.extra, dtype=torch.int64),
                    torch.arange(number + 1, number + units + 1),
                ]
                number += units
        for packing in self.packings:
            parts.append(torch.where(packing.numbers > 0, packing.numbers + number, 0))
            number += sum(rows * columns for rows, columns in packing.grids)
        return torch.cat(parts)

    @property
    def whole(self) -> bool:
        """Whether all units of all tiles are wanted."""
        return self.targets == self.units

    @property
    def dropped(self) -> int | None:
        """Units dropped in all tiles together, if that is known without asking the device."""
        if self.arrangement is not None:  # padding goes too, and lines that end where nothing is left
            return 0 if self.whole else None
        if self.keeps is None:
            return 0
        if any(keep.valid is not None for keep in self.keeps):
            return None
        return sum(self.units) - sum(keep.index.numel() for keep in self.keeps)


def let_ride(output: Any, call: EncodeCall) -> None:
    """Let an encode call travel on the tower's output object."""
    setattr(output, RIDE, call)
    _riding.set((weakref.ref(output), *_riding.get()[:3]))


def ride_of(output: Any) -> EncodeCall | None:
    """The encode call that an output object comes from; ``None`` if it is not known.

    transformers and accelerate copy such objects when they move their tensors to another device. A copy is known by the
    features of the last few that are still there.
    """
    call: EncodeCall | None = getattr(output, RIDE, None)
    features = getattr(output, "pooler_output", None)
    if call is None and features is not None:
        for reference in _riding.get():
            if (known := reference()) is not None and _alike(known.pooler_output, features):
                call = getattr(known, RIDE)
                setattr(output, RIDE, call)
                break
    return call


def _alike(known: Any, features: Any) -> bool:
    """Whether these are the same image features, perhaps on another device. Waits for the device."""
    pairs = (
        list(zip(known, features, strict=False)) if known is not None and len(known) == len(features) else []
    )
    return bool(pairs) and all(
        a.shape == b.shape and torch.equal(a[..., 0].nan_to_num(), b[..., 0].to(a.device).nan_to_num())
        for a, b in pairs
    )


def current_encode() -> EncodeCall | None:
    """The encode call under way in this thread, if any."""
    return _encode.get()


def set_encode(call: EncodeCall | None) -> None:
    """Begin (or, with ``None``, end) an encode call."""
    _encode.set(call)


def current_arrangement() -> Arrangement | None:
    """How the tiles that go through the tower now in this thread will be arranged, if they will."""
    return _arrangement.get()


def set_arrangement(arrangement: Arrangement | None) -> None:
    """Say so, or with ``None`` end it."""
    _arrangement.set(arrangement)


@dataclass
class ForwardCall:
    """One forward of the model.

    Attributes:
        encoded: the tiles that this forward consumes.
        unknown_features: features may arrive whose encode call is not known (sliced or made by the user).
        kinds: which placeholder the features stand for that this forward still encodes, in the order of encoding.
        image_masks: for each kind of placeholder, bool ``(batch, length)``: where they are; known if a policy acts in
            the decoder.
        mask: the caller's padding mask.
        rows: what is left of the sequence by now; ``entered`` is what entered layer 0, ``layer_rows`` each layer.
        first: what the stock masks and positions of this call were made for, see `layers.DecoderLayers`.
        fitted: masks and positions made for layers that differ from it.
        observed: what the current layer's attention computed with.
        text_only: per layer, the last row's head outputs ``(batch, heads, head_dim)`` without the image.
        probing: True during that pass without the image.
        drafts: tokens at the end that are an assistant's and not the prompt's.
        prompt: the decoder's output for the prompt, in the step behind it that computes the drafts.
        deepstack: features that stock code adds behind the decoder's first layers.
        visual_entered: visual rows that entered the decoder, and how many are left (``visual_left``), where that is
            known on the host: for one sequence and fixed budgets. ``most_text``: see `text_width`.
        copies: rows of the batch that share the values of an image, by kind of placeholder.
        owner: whose forward this is; ``outer`` is the call of another model around it.
    """

    unknown_features: bool = False
    encoded: list[EncodeCall] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    image_masks: list[torch.Tensor] = field(default_factory=list)
    mask: torch.Tensor | None = None
    rows: Rows | None = None
    entered: Rows | None = None
    layer_rows: list[Rows] = field(default_factory=list)
    first: tuple[Any, ...] = ()
    fitted: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)
    text_only: dict[int, torch.Tensor] = field(default_factory=dict)
    probing: bool = False
    drafts: int = 0
    prompt: Any = None
    deepstack: Deepstack | None = None
    visual_entered: int | None = None
    visual_left: int | None = None
    most_text: int | None = None
    copies: dict[int, int] = field(default_factory=dict)
    stopwatch: Stopwatch | None = None
    owner: Any = None
    outer: ForwardCall | None = None

    def may_have_holes(self, embeds: torch.Tensor) -> bool:
        """Whether holes can stand in ``embeds`` ``(batch, length, channels)``. Asks the device only if it must."""
        if self.encoded:
            return any(call.dropped != 0 for call in self.encoded)
        return self.unknown_features and bool(embeds[..., 0].isnan().any())

    @property
    def image_mask(self) -> torch.Tensor | None:
        """Placeholders of visual tokens of any kind: bool ``(batch, length)``; ``None`` if that is not known."""
        return torch.stack(self.image_masks).any(0) if self.image_masks else None

    def has_visual_tokens(self) -> bool:
        """Whether this forward brings visual tokens along."""
        return bool(self.encoded) or (self.unknown_features and bool(self.image_masks))

    def add_encoded(self, call: EncodeCall) -> None:
        """Note tiles that were encoded inside this forward."""
        call.kind = self.kinds.pop(0) if self.kinds else call.kind
        self.encoded.append(call)

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
            some = next(call.carry[name] for call in self.encoded if name in call.carry)
            carry[name] = self._spread(
                [call.carry.get(name, some.new_zeros(len(call.numbers))) for call in self.encoded]
            )
        return replace(rows, visual=mask, carry=carry)

    def _spread(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Lay out values ``(rows of all its tiles,)`` of each encode call over the prompts: ``(batch, length)``."""
        device = self.image_masks[0].device
        values = [x.to(device) for x in values]
        return stream.lay_out(values, [call.kind for call in self.encoded], self.image_masks, self.copies)

    def trace(self, number: int) -> DecoderTrace | None:
        """Where the tiles of ``encoded[number]`` are in each layer; ``None`` if no policy acts between layers."""
        if not self.image_masks or not self.layer_rows:
            return None
        return DecoderTrace(
            masks=self.image_masks,
            kinds=[call.kind for call in self.encoded],
            numbers=[call.numbers for call in self.encoded],
            number=number,
            layers=[(rows.order, rows.valid) for rows in self.layer_rows],
        )

    def per_sequence(self, wanted: Callable[[list[int]], int]) -> torch.Tensor:
        """``wanted(rows of each tile)`` summed over the images of each prompt: int64 ``(batch,)``."""
        device, values = self.image_masks[0].device, []
        for call in self.encoded:
            first = [n for rows, tiles in call.spans for n in (wanted(tiles), *[0] * (rows - 1))]
            values.append(to_device(first, device))
        return self._spread(values).sum(-1)

    def count_visual(self) -> None:
        """Note how many visual rows enter the decoder, if that is known without asking the device: of one sequence."""
        dropped = [call.dropped for call in self.encoded]
        if self.unknown_features or None in dropped or not self.image_masks or len(self.image_masks[0]) > 1:
            return
        rows = sum(rows for call in self.encoded for rows, _ in call.spans)
        self.visual_entered = self.visual_left = rows - sum(n or 0 for n in dropped)

    def text_width(self) -> int | None:
        """No sequence of a prefill has more rows of text than this. A batch waits for the device, once."""
        if self.rows is None or self.rows.visual is None:
            return None
        if self.visual_left is not None:
            return self.rows.count - self.visual_left
        if self.most_text is None:
            text = ~self.rows.visual if self.rows.mask is None else ~self.rows.visual & self.rows.mask
            self.most_text = int(text.sum(-1).max())
        return self.most_text

    def plain_tiles(self) -> list[tuple[int, int]]:
        """Units of each tile and those wanted of it; empty where stock code arranges tiles."""
        if any(call.arrangement is not None for call in self.encoded):
            return []
        return [pair for call in self.encoded for pair in zip(call.units, call.targets, strict=True)]

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


def nothing_under_way() -> bool:
    """Whether no call is under way in this thread, so that there is none to end."""
    return _forward.get() is None and _encode.get() is None


@contextmanager
def resumed(call: ForwardCall | None) -> Iterator[None]:
    """The forward ``call`` is under way again; ``None`` leaves things as they are."""
    if call is None:
        yield
        return
    token = _forward.set(call)
    try:
        yield
    finally:
        _forward.reset(token)


def leave_live_rows(rows: Rows) -> None:
    """Tell the loss of this forward which rows are left."""
    _live_rows.set(rows)


def take_live_rows() -> Rows | None:
    """The rows left by the forward that just ended in this thread; ``None`` if it dropped none."""
    rows = _live_rows.get()
    _live_rows.set(None)
    return rows


def begin_forward(call: ForwardCall) -> None:
    """Make ``call`` the current one."""
    _live_rows.set(None)
    outer = _forward.get()
    # a forward is never inside another of the same model: that one was interrupted, and Ctrl-C runs no hooks
    call.outer = outer if outer is None or outer.owner is not call.owner else outer.outer
    _forward.set(call)


def next_forward(call: ForwardCall) -> None:
    """Go on with ``call`` in place of the current one."""
    if (before := _forward.get()) is not None:
        call.owner, call.outer = before.owner, before.outer
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
    _live_rows.set(None)
