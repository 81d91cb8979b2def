"""The KV cache of a pruned sequence: stock layers that report the length of the unpruned sequence.

A cache layer has two lengths. *Physical* is the number of rows it holds. *Logical* is what it would be without
pruning: ``get_seq_length`` returns the logical one, so that ``generate``, position ids, attention masks and later turns
stay right; ``get_mask_sizes`` returns ``(physical + new, missing)``, the same offset that transformers uses for sliding
windows. A static layer has slots instead, and is made with fewer of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ..call.rows import Rows
from ..errors import UnsupportedCallError
from ..kernels import gather_kv, live_order, numbers
from . import storage
from .masks import join_masks, past_mask


class PrunedLayer(CacheLayerMixin):
    """A stock cache layer that holds fewer rows than the sequence has tokens.

    Attributes:
        inner: the stock layer that stores keys and values.
        missing: logical length minus physical length.
        seen: bool ``(batch, logical length at the last prefill)``, the attention mask that describes the stored rows
            once the first ``missing`` columns are skipped; ``None`` if every stored row may be attended.
        shift: int64 ``(batch,)``, how far renumbering moved positions down; ``None`` if they kept their values.
        decoded_from: logical length after the last pruned turn, from where decoding steps count.
        prefilled: logical length when tokens were last pruned; after it, every row is one token.
        turn: the rows of the turn that ended there, ``None`` if they are no longer known.
        marks: values ``(batch, rows)`` of stored rows; rows after them, generated later, count as 0.
        filled: whether some of its rows only fill up a batch of which other sequences have more.
        short: whether this layer, or another one of its cache, holds less than the caller passed.
        admitted: whether the next rows come from a pruned decoder. Only such a decoder knows the positions and masks
            of what is left here.
        state: what policies keep with this layer between calls; tensors with the batch first.
        like: number of the first layer that holds the same tokens with the same bookkeeping; -1 if it is empty.
        spared: slots by which a static layer was made smaller; ``None`` if it cannot be.
        seen_slots: `seen` of a static layer, over all its slots: bool ``(slots,)``, those that it describes, and bool
            ``(batch, slots)``, their values; ``None`` where `seen` is.
        twin: what guided decoding compares with, in the first layer that holds rows.
    """

    def __init__(self, inner: CacheLayerMixin):
        self.inner = inner
        # a sliding layer's slots are its window, which does not depend on how many tokens there are
        sparable = (
            type(inner) is not DynamicLayer
            and storage.is_static(inner)
            and not storage.is_sliding(inner)
            and not inner.is_initialized
        )
        self.spared: int | None = 0 if sparable else None
        self._forget()

    def _forget(self) -> None:
        self.missing = 0
        self.seen: torch.Tensor | None = None
        self.seen_slots: tuple[torch.Tensor, torch.Tensor] | None = None
        self.like = -1
        self.shift: torch.Tensor | None = None
        self.prefilled = self.decoded_from = 0
        self.turn: Rows | None = None
        self.filled = self.short = self.admitted = False
        self.marks: dict[str, torch.Tensor] = {}
        self.state: dict[str, torch.Tensor] = {}
        self.twin: Twin | None = None

    def __getattr__(self, name: str) -> Any:
        # only reached for attributes that are not set here: dtype, device, is_initialized, ...
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def keys(self) -> torch.Tensor | None:
        """Stored keys ``(batch, heads, physical length, head_dim)``."""
        return self.inner.keys

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self.inner.keys = keys

    @property
    def values(self) -> torch.Tensor | None:
        """Stored values, shaped like `keys`."""
        return self.inner.values

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self.inner.values = values

    @property
    def is_sliding(self) -> bool:
        """As the stock layer."""
        return storage.is_sliding(self.inner)

    @property
    def is_compileable(self) -> bool:
        """As the stock layer."""
        return bool(self.inner.is_compileable)

    @property
    def is_croppable(self) -> bool:
        """As the stock layer."""
        return bool(getattr(self.inner, "is_croppable", True))

    @property
    def physical(self) -> int:
        """Rows that were really computed, including those that have left a window.

        Static layers count on their device, which this waits for.
        """
        return int(self.inner.get_seq_length())

    @property
    def logical(self) -> int:
        """The number of tokens that the caller has passed."""
        return self.physical + self.missing

    @property
    def slots(self) -> int:
        """The number of slots of a static layer."""
        return int(self.inner.max_cache_len)

    @property
    def dense_share(self) -> tuple[int, int]:
        """What this layer holds, and what it would hold without pruning: in rows, or in slots of a static layer."""
        if type(self.inner) is DynamicLayer:
            rows = self.inner.get_seq_length()
            return rows, rows + self.missing
        if storage.is_static(self):
            return self.slots, self.slots + (self.spared or 0)
        if self.is_sliding:
            return min(self.physical, self.sliding_window - 1), min(self.logical, self.sliding_window - 1)
        return self.physical, self.logical

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As the stock layer."""
        self.inner.lazy_initialization(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows; as the stock layer. Raises if they are not those of a pruned decoder."""
        if not torch.compiler.is_compiling():
            if self.short and not self.admitted:
                raise UnsupportedCallError(
                    "This cache holds a prompt whose visual tokens were pruned. The model that continues it is not "
                    "pruned, or no longer, and does not know positions and mask of what is left. Continue inside the "
                    "`with pruned(...)` block, prune this model, or start with a new cache."
                )
            self.admitted = False
        return self.inner.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> Any:
        """Logical length: the number of tokens that the caller has passed. A tensor where the stock layer gives one."""
        return self.inner.get_seq_length() + self.missing

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows that attention will see, and the logical number of the first one."""
        rows, offset = self.inner.get_mask_sizes(query_length)
        return rows, offset + self.missing

    def get_max_length(self) -> int:
        """The number of tokens that may be passed; -1 if there is no limit."""
        if self.is_sliding:
            return int(getattr(self.inner, "sliding_window", self.slots if storage.is_static(self) else -1))
        return self.slots + self.missing if storage.is_static(self) else -1

    get_max_cache_shape = get_max_length  # its name in older versions of transformers

    def shorten(self, dropped: int) -> None:
        """Make an uninitialised static layer smaller by the slots of ``dropped`` tokens."""
        if self.spared is not None:
            self.inner.max_cache_len -= dropped - self.spared
            self.spared = dropped

    def offload(self) -> None:
        """As the stock layer."""
        self.inner.offload()

    def prefetch(self) -> None:
        """As the stock layer."""
        self.inner.prefetch()

    def reset(self) -> None:
        """Empty the layer; it is an unpruned one again, of its original size."""
        self.inner.reset()
        if self.spared or type(self.inner) is DynamicLayer:  # which transformers 5.4 only fills with zeros
            self.shorten(0)
            self.inner.keys, self.inner.values, self.inner.is_initialized = None, None, False
        self._forget()

    def describe_slots(self) -> None:
        """Set `seen_slots` from what is `seen`."""
        self.seen_slots = None
        if self.seen is not None and storage.is_static(self) and not self.is_sliding:
            seen = self.seen[:, self.missing :]
            known = torch.arange(self.slots, device=seen.device) < seen.shape[1]
            self.seen_slots = known, torch.nn.functional.pad(seen, (0, self.slots - seen.shape[1]))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as assisted decoding does. Raises when that would cut into a pruned prompt."""
        size = self.logical
        # transformers before 5.20 names the size to keep, later ones the negative number to remove
        kept = tokens_to_remove if tokens_to_remove > 0 else size + tokens_to_remove
        if kept >= size:
            if getattr(
                self.inner, "record_past", False
            ):  # it kept more than its window so that this call can undo
                self.inner.crop(0)
            return
        if kept < self.prefilled:
            self._crop_turn(kept, size)
        drop = size - kept
        if self.twin is not None:
            self.twin.crop(drop)
        self.inner.crop(tokens_to_remove if tokens_to_remove <= 0 else self.physical - drop)

    def _crop_turn(self, kept: int, size: int) -> None:
        """Remove the end of the last pruned turn, if none of it was dropped (as in assisted decoding)."""
        cut = self.prefilled - kept
        if self.turn is None or cut > self.turn.tail():
            raise UnsupportedCallError(
                f"Cropping this cache from {size} to {kept} tokens would cut into a prompt of {self.prefilled} tokens "
                "whose visual tokens were pruned. Crop the text after the last image only, or start again with a "
                "new cache."
            )
        self.prefilled, self.turn = kept, self.turn.without_tail(cut)
        self.seen = None if self.seen is None else self.seen[:, :kept]
        self.marks = {name: x[:, : kept - self.missing] for name, x in self.marks.items()}
        self.describe_slots()

    @property
    def steps(self) -> int:
        """Tokens since the last pruned turn."""
        return self.logical - self.decoded_from

    def drop(self, live: torch.Tensor, count: int, ragged: bool, mask: torch.Tensor | None) -> None:
        """Remove all stored rows except the ``live`` ones: bool ``(batch, rows)``, or ``(batch, kv_heads, rows)``.

        ``count`` rows stay in the longest sequence, ``ragged`` says that others have fewer. ``mask`` is the caller's
        padding mask. What is left represents all tokens so far, so that no crop may cut into them any more.
        """
        physical, logical = self.physical, self.logical
        seen = past_mask(self, mask, logical)
        index = live_order(live.flatten(0, -2), count).unflatten(0, live.shape[:-1])
        by_row = index if index.dim() == 2 else index[:, 0]
        there = live if live.dim() == 2 else live[:, 0]
        valid = there.gather(1, by_row) if ragged else None
        if seen is not None:
            known = seen[:, self.missing :].gather(1, by_row)
            valid = known if valid is None else valid & known
        self.marks = {
            name: torch.nn.functional.pad(x, (0, physical - x.shape[1])).gather(1, by_row)
            for name, x in self.marks.items()
        }
        keys, values = storage.read(self.inner, physical)
        storage.write(self.inner, *pick_kv(keys, values, index), None)
        self.missing = logical - count
        self.seen = None if valid is None else torch.nn.functional.pad(valid, (self.missing, 0), value=False)
        self.prefilled, self.turn, self.filled = logical, None, self.filled or ragged

    def _batch(self, move: Callable[[torch.Tensor], torch.Tensor], twin: Callable[[Cache], Any]) -> None:
        """Apply a change of the batch to the bookkeeping of each sequence."""
        for name in ("seen", "shift"):
            if (state := getattr(self, name)) is not None:
                setattr(self, name, move(state))
        self.marks = {name: move(x) for name, x in self.marks.items()}
        self.state = {name: move(x) for name, x in self.state.items()}
        if self.twin is not None:
            self.twin.rearrange(move, twin)
        self.describe_slots()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch for beam search."""
        self.inner.reorder_cache(beam_idx)
        self._batch(lambda x: x[beam_idx.to(x.device)], lambda cache: cache.reorder_cache(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self.inner.batch_repeat_interleave(repeats)
        self._batch(
            lambda x: x.repeat_interleave(repeats, 0), lambda cache: cache.batch_repeat_interleave(repeats)
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of the batch."""
        self.inner.batch_select_indices(indices)
        self._batch(lambda x: x[indices.to(x.device)], lambda cache: cache.batch_select_indices(indices))


class PrunedHybridLayer(PrunedLayer, *storage.LINEAR):  # type: ignore[misc]
    """A `PrunedLayer` around a layer that has a linear-attention state in addition to its rows."""

    def __init__(self, inner: CacheLayerMixin):
        PrunedLayer.__init__(self, inner)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the stock layer."""
        states: torch.Tensor = self.inner.update_conv_state(*args, **kwargs)
        return states

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the stock layer."""
        states: torch.Tensor = self.inner.update_recurrent_state(*args, **kwargs)
        return states

    def activate_past_recording(self) -> None:
        """As the stock layer."""
        self.inner.activate_past_recording()


@dataclass
class Twin:
    """What guided decoding remembers of the sequences in a cache, and the cache of its second pass over them.

    It stays with the cache that it belongs to: what happens to the rows of that one's batch, or to its end, happens
    here too.

    Attributes:
        active: bool ``(batch,)``, sequences that have an image by now; others are not guided.
        cache: the second pass's own; ``None`` if there is no such pass.
        mask: int64 ``(batch, tokens)``, which of the tokens in ``cache`` are real; ``None`` if all are.
    """

    active: torch.Tensor
    cache: Cache | None = None
    mask: torch.Tensor | None = None

    def crop(self, count: int) -> None:
        """Remove the last ``count`` tokens."""
        self.mask = None if self.mask is None else self.mask[:, : self.mask.shape[1] - count]
        if self.cache is not None:
            self.cache.crop(-count)

    def rearrange(self, rows: Callable[[torch.Tensor], torch.Tensor], cache: Callable[[Cache], Any]) -> None:
        """Let the sequences follow those of the cache that this belongs to."""
        self.active = rows(self.active)
        self.mask = None if self.mask is None else rows(self.mask)
        if self.cache is not None:
            cache(self.cache)


def twin_of(cache: Cache | None) -> Twin | None:
    """The second pass's part of a cache, if there has been one."""
    layer = first_layer(cache)
    return None if layer is None else layer.twin


def attach_twin(cache: Cache, twin: Twin) -> None:
    """Let ``twin`` stay with the first layer of ``cache`` that holds rows."""
    index = next(n for n, layer in enumerate(cache.layers) if storage.has_rows(layer))
    wrap(cache, index).twin = twin


def first_layer(cache: Cache | None) -> PrunedLayer | None:
    """The first layer of a cache that holds rows, if it holds a pruned prompt."""
    layers = getattr(cache, "layers", ())  # the paged cache of continuous batching has none
    first = next((layer for layer in layers if storage.has_rows(layer)), None)
    return first if isinstance(first, PrunedLayer) else None


def pruned_layers(cache: Cache | None) -> list[PrunedLayer]:
    """The layers of a cache that hold a pruned prompt; empty for a stock cache."""
    layers = getattr(cache, "layers", ())  # the paged cache of continuous batching has none
    return [x for x in layers if type(x) is not DynamicLayer and isinstance(x, PrunedLayer)]


def wrap(cache: Cache, index: int) -> PrunedLayer:
    """Layer ``index`` of a cache as a `PrunedLayer`, made one in place if it is not."""
    while len(cache.layers) <= index:  # a DynamicCache made without config grows its layers as they are used
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if type(layer) is DynamicLayer:  # by far the most: what follows asks abstract classes
        cache.layers[index] = layer = PrunedLayer(layer)
    elif not isinstance(layer, PrunedLayer):
        made = PrunedHybridLayer if isinstance(layer, storage.LINEAR) else PrunedLayer
        cache.layers[index] = layer = made(layer)
    return layer


def spare_slots(cache: Cache | None, index: int, rows: Rows, trimmed: bool = False) -> None:
    """Make layer ``index`` of a cache that gets its first tokens, if it is static, for ``rows`` only.

    One that will be ``trimmed`` after prefill can be shortened then.
    """
    if cache is None or (rows.whole and not trimmed) or index >= len(cache.layers):
        return
    layer = cache.layers[index]
    if storage.is_static(layer) and not storage.is_sliding(layer) and not layer.is_initialized:
        wrap(cache, index).shorten(rows.length - rows.count)


def admit(layers: list[PrunedLayer]) -> None:
    """A pruned decoder begins to compute: accept what it appends next to each of these layers."""
    if not torch.compiler.is_compiling():
        for layer in layers:
            layer.admitted = True


SHARED = ("seen", "missing", "shift", "prefilled", "decoded_from", "turn", "filled")
"""What layers that hold the same tokens know alike."""


def record_turn(cache: Cache, layer_rows: list[Rows], mask: torch.Tensor | None) -> None:
    """Record in every layer of the cache which rows of the turn that just ended really exist.

    ``mask`` is the caller's attention mask. A turn without dropped tokens leaves a stock cache unchanged.
    """
    if all(rows.whole for rows in layer_rows) and not pruned_layers(cache):
        return
    alike: dict[tuple[int, int, int], int] = {}
    for index, rows in enumerate(layer_rows):
        if index < len(cache.layers) and not storage.holds_rows(cache.layers[index]):
            continue  # a state summarises all tokens, and a layer that reuses another layer's keys stores nothing
        layer = wrap(cache, index)
        before = layer.logical - rows.count
        like = alike.setdefault((id(rows), layer.like, before), index)
        if like < index:
            first = cache.layers[like].__dict__
            layer.__dict__.update({name: first[name] for name in SHARED})
        else:
            dropped = rows.length - rows.count
            seen = join_masks(past_mask(layer, mask, before), rows.mask, before, rows.count)
            layer.seen = None if seen is None else torch.nn.functional.pad(seen, (dropped, 0), value=False)
            layer.missing += dropped
            if rows.shift is not None:
                layer.shift = rows.shift if layer.shift is None else layer.shift + rows.shift
            layer.prefilled = layer.decoded_from = before + rows.length
            layer.turn, layer.filled = rows, layer.filled or rows.valid is not None
        layer.like = like
        if layer.seen_slots is not None or type(layer.inner) is not DynamicLayer:
            layer.describe_slots()
    layers = pruned_layers(cache)
    short = any(layer.missing or layer.seen is not None for layer in layers)
    for layer in layers:
        layer.short = short


def stored_index(rows: Rows, final: Rows, physical: int) -> torch.Tensor:
    """Which of a layer's ``physical`` stored rows are from before this turn, or hold a token of ``final``.

    int64 ``(batch, rows)``; the last of them are this turn's ``rows``.
    """
    place = final.order.new_zeros(len(final.order), rows.length)
    place.scatter_(1, rows.order, numbers(rows.count, place.device).expand_as(rows.order))
    index = place.gather(1, final.order)
    if past := physical - rows.count:
        index = torch.cat([numbers(past, index.device).expand(len(index), -1), index + past], 1)
    return index


def trim(layer: PrunedLayer, rows: Rows, final: Rows, index: torch.Tensor | None = None) -> None:
    """Take out of a layer the rows of this turn that were dropped later: ``rows`` it holds, ``final`` remain.

    ``index`` is their `stored_index`, if it is known.
    """
    physical = layer.physical
    index = stored_index(rows, final, physical) if index is None else index
    layer.marks = {name: x.gather(1, index.to(x.device)) for name, x in layer.marks.items()}
    keys, values = storage.read(layer.inner, physical)
    keys, values = gather_kv(keys, values, index.to(keys.device))
    if smaller := layer.spared is not None and physical == rows.count:
        layer.shorten(rows.length - final.count)
    storage.write(layer.inner, keys, values, layer.slots if smaller else None)


def pick_kv(
    keys: torch.Tensor, values: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``index`` ``(batch, kept)``, or ``(batch, kv_heads, kept)``, of keys and values."""
    if index.dim() == 2:
        return gather_kv(keys, values, index.to(keys.device))
    index = index[..., None].to(keys.device)
    return keys.gather(2, index.expand(-1, -1, -1, keys.shape[3])), values.gather(
        2, index.expand(-1, -1, -1, values.shape[3])
    )


def evict_rows(
    layer: PrunedLayer,
    rows: Rows,
    live: torch.Tensor,
    counts: list[int],
    merged: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Rows:
    """Remove from a layer those of this turn's ``rows`` that are not ``live``; returns what it holds of the turn.

    ``live`` is bool ``(batch, rows)``, or ``(batch, kv_heads, rows)`` with ``counts`` in every head of a sequence.
    What stays has the ``merged`` keys and values ``(batch, kv_heads, rows, head_dim)``, if there are any.
    """
    if live.dim() == 2 and merged is not None:
        live = live[:, None].expand(-1, merged[0].shape[1], -1)
    if live.dim() == 2:
        left, _ = rows.pick(live, counts)
        trim(layer, rows, left)
        return left
    left, by_row = rows.pick(live[:, 0], counts)
    index = live_order(live.flatten(0, 1), max(counts)).unflatten(0, live.shape[:2])
    past = layer.physical - rows.count
    before = torch.arange(past, device=index.device).expand(*live.shape[:2], -1)
    keys, values = storage.read(layer.inner, layer.physical)
    if merged is not None:
        pairs = (keys, merged[0]), (values, merged[1])
        keys, values = (torch.cat([x[:, :, :past], new.to(x)], 2) for x, new in pairs)
    keys, values = pick_kv(keys, values, torch.cat([before, index + past], 2))
    by_row = torch.cat([before[:, 0], by_row + past], 1)
    layer.marks = {name: x.gather(1, by_row.to(x.device)) for name, x in layer.marks.items()}
    if smaller := layer.spared is not None and past == 0:
        layer.shorten(rows.length - left.count)
    storage.write(layer.inner, keys, values, layer.slots if smaller else None)
    return left


def kv_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes of storage of a cache's keys and values, and what they would be without pruning."""
    held = dense = 0
    for layer in cache.layers:
        here = storage.kv_bytes(layer)
        rows, of = layer.dense_share if type(layer) in (PrunedLayer, PrunedHybridLayer) else (1, 1)
        held, dense = held + here, dense + here * of // rows
    return held, dense
