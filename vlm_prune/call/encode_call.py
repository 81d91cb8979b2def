"""State of a batch of tiles from the tower until after the projector.

It lives in a context variable while they are encoded, never on a module, and belongs to one pruned model: a tower that
is called directly, or by another model that shares it, finds no `Encoding` and behaves as a stock tower.
``generate`` encodes images before it calls forward, so an `EncodeCall` is attached to the tower's output object, which
stock code passes from one to the other.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..contract.keep import Keep
from ..kernels import planned
from .receipt import Receipt, Segments
from .timing import Stopwatch

if TYPE_CHECKING:
    from ..contract.anatomy import Arrangement
    from .assembly import Packing

_encodings: ContextVar[tuple[Encoding, ...]] = ContextVar("vlm_prune_encodings", default=())
_riding: ContextVar[tuple[weakref.ref[Any], ...]] = ContextVar("vlm_prune_riding", default=())

RIDE = "vlm_prune"
"""Attribute of a tower's output object under which its `EncodeCall` travels."""


@dataclass(frozen=True)
class Span:
    """Contiguous rows of the language model.

    Attributes:
        rows: their number before anything is dropped.
        tiles: rows of each tile that went into them.
        plain: units of its one tile, and how many are wanted; ``None`` where stock code assembles tiles.
    """

    rows: int
    tiles: list[int]
    plain: tuple[int, int] | None = None


@dataclass(frozen=True)
class Offer:
    """Visual tokens among which the decoder's entry chooses, of one tile or of several of one shape.

    Attributes:
        features: ``(tiles, tokens, channels)``, projected.
        rows: int64 ``(tiles, tokens)``, which of the call's rows for the language model each token is; -1 for those
            that stock code removes again, as padding.
        spans: for each tile, the number of the span in `EncodeCall.spans` that it is in.
        grid: rows and columns of tokens.
        target: tokens wanted of each tile.
        content_key: int64 ``(tiles,)``, see `FeaturesView`.
        carry: values ``(tiles, tokens)`` that the encode stage left.
        tower: see `EntryView`.
    """

    features: torch.Tensor
    rows: torch.Tensor
    spans: list[int]
    grid: tuple[int, int]
    target: int
    content_key: torch.Tensor
    carry: dict[str, torch.Tensor]
    tower: torch.Tensor | None = None


@dataclass
class EncodeCall:
    """Tiles on their way through tower and projector. Per-tile facts are lists with one entry per tile.

    Attributes:
        grids: rows and columns of units of each tile.
        targets: units wanted of each tile.
        pixels: the tower's input.
        extra: rows of each tile for the language model in addition to its units (1 where CLS is kept).
        kind: which of the model's placeholders the tiles replace, an index into `Anatomy.image_tokens`.
        keeps: the units that survive so far, ``None`` while all do: one `Keep` for each group of tiles, in order. A
            tower that takes tiles of one size has one group, a tower of packed images one group per image.
        tower_tokens: tokens that each tower layer computed for the largest tile.
        tower_keeps: the units among them, as `keeps`.
        carry: ``(rows for the language model,)``, what the policy left for the decoder's stages; 0 at holes.
        arrangement: how the tiles are assembled into images; ``None`` where they are simply concatenated.
        packings: the result, image by image.
        offers: what the decoder's entry chooses among, if a policy does so there.
        entering: what entered the projector ``(tiles, units, channels)``, if that policy reads it.
        still: whether the tower is to keep its shapes, see `TowerView`; ``masked`` says that tokens were masked for it.
        trusted: whether stock code is known to pass all rows on unchanged; else holes are counted on arrival.
        asked: the feature method that encoded them with its arguments, if one did; called again for another image.
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
    offers: list[Offer] = field(default_factory=list)
    entering: torch.Tensor | None = None
    trusted: bool = True
    still: bool = False
    masked: bool = False
    asked: tuple[str, dict[str, Any]] | None = None

    @property
    def tiles(self) -> int:
        """The number of tiles."""
        return len(self.grids)

    @property
    def units(self) -> list[int]:
        """Units of each tile before anything is dropped."""
        return [rows * columns for rows, columns in self.grids]

    @property
    def rows(self) -> list[int]:
        """Rows of each tile after the projector, before anything is dropped."""
        return [units + self.extra for units in self.units]

    @property
    def spans(self) -> list[Span]:
        """The rows that the language model gets for these tiles, image by image, or tile by tile."""
        rows = self.rows
        if self.arrangement is None:
            plain = zip(self.units, self.targets, strict=True)
            return [Span(count, [count], units) for count, units in zip(rows, plain, strict=True)]
        return [Span(len(p.source), rows[p.tiles.start : p.tiles.stop]) for p in self.packings]

    @property
    def late(self) -> list[bool]:
        """For each tile, whether its tokens are chosen after assembly."""
        return [packing.late for packing in self.packings for _ in packing.tiles] or [False] * self.tiles

    def groups(self, tiles: list[int]) -> dict[int, list[int]]:
        """Groups of ``tiles`` with the same number of wanted units: that number, and the tiles' numbers."""
        groups: dict[int, list[int]] = {}
        for tile in tiles:
            groups.setdefault(self.targets[tile], []).append(tile)
        return groups

    @property
    def numbers(self) -> torch.Tensor:
        """The visual token that each row of the language model is, counted from 1 through the receipt's grids.

        int64 ``(rows,)`` on the host; 0 for rows that no budget counts: CLS, newlines.
        """
        if self.arrangement is None:
            key = ("visual tokens", tuple(self.units), self.extra)
            return planned(key, lambda: self._numbers())
        return self._numbers()

    def _numbers(self) -> torch.Tensor:
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

    def unit_rows(self) -> tuple[torch.Tensor, list[int]]:
        """The row for the language model that each unit becomes, and the number of the span that each tile is in.

        int64 ``(tiles, units)`` on the host, of tiles of one size; -1 for units that stock code removes again.
        """
        units = self.units[0]
        if self.arrangement is None:
            first = torch.arange(self.tiles)[:, None] * self.rows[0] + self.extra
            return first + torch.arange(units), list(range(self.tiles))
        rows, images, begin = torch.full((self.tiles * units,), -1), [], 0
        for number, packing in enumerate(self.packings):
            images += [number] * len(packing.tiles)
            places = (packing.source >= 0).nonzero()[:, 0]
            rows[packing.source[places] + packing.tiles.start * units] = places + begin
            begin += len(packing.source)
        return rows.view(self.tiles, units), images

    @property
    def whole(self) -> bool:
        """Whether all units of all tiles are wanted."""
        return self.targets == self.units

    @property
    def dropped(self) -> int | None:
        """Units dropped in all tiles together, if known without waiting for the device."""
        if self.arrangement is not None:  # padding is dropped too, and newlines of lines without tokens
            return 0 if self.whole else None
        if self.keeps is None:
            return 0
        if any(keep.valid is not None for keep in self.keeps):
            return None
        return sum(self.units) - sum(keep.index.numel() for keep in self.keeps)

    def pass_layers(self, number: int, tokens: int, keeps: list[Keep] | None) -> None:
        """Those of the first ``number`` tower layers that are not noted yet computed ``tokens``, of units ``keeps``."""
        more = number - len(self.tower_tokens)
        self.tower_tokens += [tokens] * more
        self.tower_keeps += [keeps] * more

    def settle(self, alive: torch.Tensor) -> torch.Tensor:
        """Note which rows for the language model a late choice keeps, bool ``(rows,)``; returns it with newlines."""
        if self.arrangement is None:
            keeps, masks = [], [mask[self.extra :] for mask in alive.split(self.rows)]
            for mask, target, units in zip(masks, self.targets, self.units, strict=True):
                keeps.append(
                    Keep.from_mask(mask[None], units) if target < units else Keep.all(1, units, mask.device)
                )
            self.keeps = keeps
        else:
            parts, keeps = [], []
            for packing, mask in zip(
                self.packings, alive.split([len(p.source) for p in self.packings]), strict=True
            ):
                chosen = mask & ~packing.newline.to(mask.device)
                keeps += packing.kept(chosen)
                parts.append(chosen | packing.ends_line(chosen))
            alive, self.keeps = torch.cat(parts), keeps
        self.receipt.keeps = self.keeps
        return alive

    def record_tower(self, segments: Segments, dense: Segments) -> None:
        """Note in the receipt what the tower did; ``segments`` and ``dense`` are called on first access."""
        receipt = self.receipt
        receipt.keeps, receipt.tower_tokens = self.keeps, self.tower_tokens
        receipt.tower_keeps, receipt.tower_grids = self.tower_keeps, self.grids
        receipt._tower_segments = (segments, dense)
        receipt._tower_ms = self.stopwatch.stop()


def let_ride(output: Any, call: EncodeCall) -> None:
    """Attach an encode call to the tower's output object."""
    setattr(output, RIDE, call)
    _riding.set((weakref.ref(output), *_riding.get()[:3]))


def ride_of(output: Any) -> EncodeCall | None:
    """The encode call that an output object comes from; ``None`` if unknown.

    transformers and accelerate copy such objects when they move their tensors to another device. A copy is recognised
    by its features, among the last few that still exist. What chunked prefill slices out of one is not a copy, even if
    it is a whole image: the other outputs are missing from it.
    """
    call: EncodeCall | None = getattr(output, RIDE, None)
    features = getattr(output, "pooler_output", None)
    if call is None and features is not None:
        for reference in _riding.get():
            if (known := reference()) is None or known.keys() != output.keys():
                continue
            if _alike(known.pooler_output, features):
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


@dataclass(eq=False)
class Encoding:
    """A running feature method of a pruned model; the tower only prunes during one.

    Attributes:
        owner: the pruning that the method belongs to.
        arrangement: how the tiles that go through the tower will be assembled, if they will.
        call: those tiles, from the tower's entry until their features are complete.
        forward: the forward that called the method, if one did.
        once: whether the method calls its tower once; further calls come from elsewhere.
        done: whether it has.
        nested: running calls of the tower inside its own call, which come from elsewhere.
        ended: those tiles, once their features are complete.
        recording: whether a graph is being recorded, so that the tiles are only left in ``ended``.
        captured: whether a graph computed the tiles or why not, if the model is to capture its calls.
    """

    owner: Any
    arrangement: Arrangement | None = None
    forward: Any = None
    once: bool = True
    call: EncodeCall | None = None
    done: bool = False
    nested: int = 0
    recording: bool = False
    ended: EncodeCall | None = None
    captured: str | None = None

    @property
    def mine(self) -> EncodeCall | None:
        """`call`, for what a module computes now; ``None`` while it runs for another caller."""
        return None if self.nested else self.call


@contextmanager
def encoding(
    owner: Any, arrangement: Arrangement | None = None, forward: Any = None, once: bool = True
) -> Iterator[Encoding]:
    """Within the block, the tower of the model that ``owner`` prunes drops tokens; no state remains after it."""
    under_way = Encoding(owner, arrangement, forward, once)
    token = _encodings.set((*_encodings.get(), under_way))
    try:
        yield under_way
    finally:
        _encodings.reset(token)


def current_encoding(owner: Any) -> Encoding | None:
    """The innermost `encoding` of ``owner`` in this thread, if any."""
    for under_way in reversed(_encodings.get()):
        if under_way.owner is owner:
            return under_way
    return None


def current_encode(owner: Any = None) -> EncodeCall | None:
    """The running encode call of this thread, if any: that of ``owner``, or the innermost of all."""
    for under_way in reversed(_encodings.get()):
        if owner is None or under_way.owner is owner:
            return under_way.mine
    return None
