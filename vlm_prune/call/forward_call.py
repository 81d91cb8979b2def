"""State of one forward of a pruned model. It lives in a context variable while it runs, never on a module.

Forwards of several models can be nested (a hook that calls another model), so they form a stack, and each model's hooks
look for the innermost one of their model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedCallError
from ..kernels import to_device
from . import stream
from .encode_call import EncodeCall, Span
from .row_counts import Census
from .survivors import DecoderTrace
from .timing import Stopwatch

if TYPE_CHECKING:
    from .deepstack import Deepstack
    from .rows import Rows

_forwards: ContextVar[tuple[ForwardCall, ...]] = ContextVar("vlm_prune_forwards", default=())

RESUME = "vlm_prune_call"
"""Keyword that passes layers their call where no context variable does: in a compiled step, and when
attention runs again in the backward pass."""


@dataclass
class ForwardCall:
    """One forward of the model.

    Attributes:
        encoded: the tiles that this forward consumes.
        unknown_features: features may arrive whose encode call is unknown (sliced or made by the user).
        placeholders: for each kind of placeholder, how many there are in the prompts, if that was counted.
        kinds: which placeholders the features replace that this forward still encodes, in the order of encoding.
        image_masks: for each kind of placeholder, bool ``(batch, length)``: where they are; set if a policy acts in
            the decoder.
        mask: the caller's padding mask.
        given: the mask that the model was called with, from which some models make those of their decoder.
        types: int ``(batch, tokens)``, the type of each token, where the model was given it; some let those of an
            image attend to each other.
        positions: positions for the decoder's rotary embeddings alone, hidden from other stock code, see
            `language.decoder.Decoder`.
        rows: what is left of the sequence so far; ``entered`` is what entered layer 0, ``layer_rows`` each layer.
        first: what the stock masks and positions of this call were made for, see `layers.DecoderLayers`.
        fitted: masks and positions made for layers that differ from it.
        observed: the inputs of the current layer's attention.
        text_only: per layer, the last row's head outputs ``(batch, heads, head_dim)`` without the image.
        scores: by layer and ``id`` of a policy, what its `observe` returned for the layer's rows.
        targets: by ``id`` of a policy, visual tokens that entered layer 0 and those that its budget wants in the end.
        memo: what layers share, see `once`.
        step_attention: by layer, the attention inputs of a decoding step after which rows may be evicted.
        probing: True during that pass without the image.
        looking: True while a layer's attention is started only to be observed, see `look_ahead`.
        drafts: tokens at the end that come from an assistant and are not part of the prompt.
        prompt: the decoder's output for the prompt, in the step after it that computes the drafts.
        deepstack: features that stock code adds after the decoder's first layers.
        census: the result of `count`, once it was called.
        left: visual tokens of each sequence that are left so far; ``None`` until they are counted.
        wrapped: a cache whose layers the decoder temporarily sees as stock ones, and these layers.
        captured: whether a graph computed the decoder or why not, if the model is to capture its calls.
        owner: the pruning that this forward belongs to.
    """

    unknown_features: bool = False
    encoded: list[EncodeCall] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    placeholders: list[int] = field(default_factory=list)
    image_masks: list[torch.Tensor] = field(default_factory=list)
    mask: torch.Tensor | None = None
    given: Any = None
    types: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    rows: Rows | None = None
    entered: Rows | None = None
    layer_rows: list[Rows] = field(default_factory=list)
    first: tuple[Any, ...] = ()
    fitted: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)
    text_only: dict[int, torch.Tensor] = field(default_factory=dict)
    scores: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    targets: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    memo: dict[tuple[Any, ...], tuple[Any, Any]] = field(default_factory=dict)
    step_attention: dict[int, Any] = field(default_factory=dict)
    probing: bool = False
    looking: bool = False
    drafts: int = 0
    prompt: Any = None
    deepstack: Deepstack | None = None
    census: Census | None = None
    left: list[int] | None = None
    stopwatch: Stopwatch | None = None
    wrapped: tuple[Any, list[Any]] | None = None
    captured: str | None = None
    owner: Any = None

    def once(self, name: Any, make: Callable[[], Any], *tensors: Any) -> Any:
        """What ``make()`` returns, made when it is first asked for with these very ``tensors``."""
        key = (name, *map(id, tensors))
        if key not in self.memo:
            self.memo[key] = tensors, make()  # which keeps them, so that no other gets their number
        return self.memo[key][1]

    def holes(self, embeds: torch.Tensor) -> torch.Tensor:
        """Which rows of ``embeds`` ``(batch, length, channels)`` are holes: bool ``(batch, length)``."""
        return stream.find_holes(embeds, getattr(self.owner, "marked", True))

    def may_have_holes(self, embeds: torch.Tensor) -> bool:
        """Whether ``embeds`` ``(batch, length, channels)`` can contain holes. Waits for the device only if it must."""
        if self.encoded:
            return any(call.dropped != 0 for call in self.encoded)
        return self.unknown_features and bool(self.holes(embeds).any())

    @property
    def image_mask(self) -> torch.Tensor | None:
        """Placeholders of visual tokens of any kind: bool ``(batch, length)``; ``None`` if unknown."""
        if len(self.image_masks) == 1:
            return self.image_masks[0]
        return torch.stack(self.image_masks).any(0) if self.image_masks else None

    def has_visual_tokens(self) -> bool:
        """Whether this forward contains visual tokens."""
        return bool(self.encoded) or (self.unknown_features and bool(self.image_masks))

    def unwrap(self, cache: Any) -> None:
        """Let the decoder see the stock layers inside those of a pruned cache, which report physical lengths."""
        self.wrapped = (cache, list(cache.layers))
        cache.layers[:] = [getattr(layer, "inner", layer) for layer in cache.layers]

    def wrap_again(self) -> None:
        """Undo `unwrap`."""
        if self.wrapped is not None:
            cache, layers = self.wrapped
            cache.layers[:] = layers
            self.wrapped = None

    def add_encoded(self, call: EncodeCall) -> None:
        """Note tiles encoded inside this forward."""
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
            copies=self.copies,
            kinds=[call.kind for call in self.encoded],
            numbers=[call.numbers for call in self.encoded],
            number=number,
            layers=[(rows.order, rows.valid) for rows in self.layer_rows],
        )

    def per_sequence(self, wanted: Callable[[list[int]], int]) -> torch.Tensor:
        """``wanted(rows of each tile)`` summed over the images of each prompt: int64 ``(batch,)``."""
        device, values = self.image_masks[0].device, []
        for call in self.encoded:
            first = [n for span in call.spans for n in (wanted(span.tiles), *[0] * (span.rows - 1))]
            values.append(to_device(first, device))
        return self._spread(values).sum(-1)

    def text_width(self) -> int | None:
        """An upper bound on the text rows of any sequence of a prefill."""
        return None if self.rows is None or self.rows.visual is None else max(self.count().text)

    def count(
        self,
        live: torch.Tensor | None = None,
        alive: torch.Tensor | None = None,
        overflow: torch.Tensor | None = None,
    ) -> Census:
        """The census of this prefill. One sequence with a fixed budget is counted on the host; else this waits once.

        ``live``, ``alive`` and ``overflow`` ``(batch, length)`` as for `Census.take`, needed only where holes are.

        Raises:
            UnsupportedCallError: features overflowed, and this waits anyway. Otherwise they reach the logits, as in
                the stock model.
        """
        if self.census is None:
            if live is None:
                live = torch.ones_like(self.image_masks[0])
                if self.mask is not None and len(live) > 1:
                    live = self.mask[:, -live.shape[1] :].bool()
            planned = self._planned()
            trusted = all(call.trusted for call in self.encoded)
            if planned is not None and trusted and len(live) == 1 and (planned or alive is None):
                self.census = self._plan(live.shape[1], planned)
            else:
                self.census = Census.take(self.image_masks, live, alive, overflow)
            if self.census.overflowed:
                raise UnsupportedCallError(
                    f"The image features hold {self.census.overflowed} rows of NaN that no policy dropped: the pixels "
                    "hold NaN or inf, or the vision tower or projector overflowed (float16?). Load the model in "
                    "bfloat16 or float32."
                )
            if planned and alive is not None and not self.census.holes:
                raise UnsupportedCallError(
                    f"{planned} visual tokens were dropped, but none is missing at the decoder's entry: this "
                    "model does not pass its image features on as expected. Please unprune(model), and report it."
                )
            if self.left is None:  # else a cut has counted since
                self.left = list(self.census.visual)
        return self.census

    def _planned(self) -> int | None:
        """Rows dropped in all tiles together, if the host knows."""
        dropped = [call.dropped for call in self.encoded]
        if self.unknown_features or not dropped or None in dropped:
            return None
        return sum(n or 0 for n in dropped)

    def _plan(self, length: int, dropped: int) -> Census:
        """The census of one sequence of ``length`` rows."""
        placeholders = [
            [sum(span.rows for span in self._spans(kind))] for kind in range(len(self.image_masks))
        ]
        visual = sum(count for (count,) in placeholders) - dropped if placeholders else 0
        return Census([length - dropped], [visual], dropped, placeholders)

    def _spans(self, kind: int) -> list[Span]:
        return [span for call in self.encoded if call.kind == kind for span in call.spans]

    @property
    def copies(self) -> list[int]:
        """For each kind of placeholder, how many sequences next to each other share the values of an image.

        More than one where beams are copies of a sequence.
        """
        kinds = range(len(self.image_masks))
        if len(self.image_masks[0]) == 1:
            return [1 for _ in kinds]
        rows = [sum(span.rows for span in self._spans(kind)) for kind in kinds]
        return [sum(self.count().placeholders[kind]) // rows[kind] if rows[kind] else 1 for kind in kinds]

    @property
    def accounted(self) -> bool:
        """Whether every placeholder belongs to a row of a known tile, and none is masked out."""
        census = self.count()
        found = [sum(counts) for counts in census.placeholders]
        known = [
            copies * sum(span.rows for span in self._spans(kind)) for kind, copies in enumerate(self.copies)
        ]
        return found == known and sum(found) - census.holes == sum(census.visual)

    def owners(self) -> list[list[int]]:
        """For each encode call, the number of the sequence that each of its spans is in: the first of its copies."""
        owners: list[list[int]] = [[] for _ in self.encoded]
        for kind, (copies, counts) in enumerate(zip(self.copies, self.count().placeholders, strict=True)):
            sequence, room = 0, counts[0]
            for encoded, mine in zip(self.encoded, owners, strict=True):
                for span in encoded.spans if encoded.kind == kind else ():
                    while room < span.rows:
                        sequence += copies
                        room = counts[sequence]
                    room -= span.rows
                    mine.append(sequence)
        return owners

    def spans_by_sequence(self) -> list[list[Span]]:
        """The rows that the encode stage gave each sequence."""
        owned: list[list[Span]] = [[] for _ in self.count().live]
        copies = self.copies
        for encoded, owners in zip(self.encoded, self.owners(), strict=True):
            for span, owner in zip(encoded.spans, owners, strict=True):
                for sequence in owned[owner : owner + copies[encoded.kind]]:
                    sequence.append(span)
        return owned

    def recount(self, lost: list[int] | None) -> None:
        """The decoder's entry dropped tokens: ``lost`` per sequence, ``None`` if only the device knows."""
        if lost is None:
            self.census = self.left = None
        elif self.census is not None:
            self.census = self.census.without(lost)
            self.left = list(self.census.visual)


def check_rows(call: ForwardCall, rows: list[int]) -> None:
    """Raise if the placeholders do not match the ``rows`` of each image that this forward is about to encode.

    As `check_forward` does for models that do not assemble tiles; nothing has been computed yet.
    """
    if not call.placeholders or not call.kinds:
        return
    found, need = call.placeholders[call.kinds[0]], sum(rows)
    if found != need:
        raise UnsupportedCallError(
            f"input_ids hold {found} placeholders, but the {len(rows)} images or videos of this call need {need} "
            f"({', '.join(map(str, rows[:8]))}). Let the processor write the prompt, with one <image> for every image, "
            "and do not cut it off inside one; pruning does not change how many placeholders there are."
        )


def current_forward(owner: Any = None) -> ForwardCall | None:
    """The running forward of this thread, if any: that of ``owner``, or the innermost of all."""
    for call in reversed(_forwards.get()):
        if owner is None or call.owner is owner:
            return call
    return None


@contextmanager
def resumed(call: ForwardCall | None) -> Iterator[None]:
    """Make the forward ``call`` current again; ``None`` changes nothing."""
    if call is None:
        yield
        return
    token = _forwards.set((*_forwards.get(), call))
    try:
        yield
    finally:
        _forwards.reset(token)


@contextmanager
def calls_hidden() -> Iterator[None]:
    """No forward is under way: hooks inside a part that is being recorded are to leave it as it is."""
    token = _forwards.set(())
    try:
        yield
    finally:
        _forwards.reset(token)


def begin_forward(call: ForwardCall, module: Any) -> None:
    """Make ``call``, a forward of ``module``, the current one."""
    outer = _forwards.get()
    if current_forward(call.owner) is not None and not _inside_itself(module):
        outer = _without(call.owner)  # the previous one was interrupted: Ctrl-C runs no hooks
    _forwards.set((*outer, call))


def next_forward(call: ForwardCall, owner: Any) -> None:
    """Continue with ``call`` in place of the current one of ``owner``."""
    if end_forward(owner) is not None:
        call.owner = owner
    _forwards.set((*_forwards.get(), call))


def end_forward(owner: Any) -> ForwardCall | None:
    """End the current forward of ``owner`` and return it; enclosing ones become current again."""
    calls = _forwards.get()
    for number in reversed(range(len(calls))):
        if calls[number].owner is owner:
            calls[number].wrap_again()  # where an exception kept the decoder from doing it
            _forwards.set(calls[:number])
            return calls[number]
    return None


def forget_calls(owner: Any) -> None:
    """End all calls of ``owner`` that an interrupt may have left running in this thread."""
    _forwards.set(_without(owner))


def _without(owner: Any) -> tuple[ForwardCall, ...]:
    return tuple(call for call in _forwards.get() if call.owner is not owner)


def _inside_itself(module: Any) -> bool:
    """Whether a module is being called from inside another call of itself."""
    frame, calls = sys._getframe(), 0
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            calls += 1
    return calls > 1
