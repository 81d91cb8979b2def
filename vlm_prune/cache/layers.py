"""The KV cache of a pruned sequence: stock layers, told how long the sequence is for everyone else.

A cache layer knows two lengths. *Physical* is the rows it holds. *Logical* is what transformers would have seen
without pruning: ``get_seq_length`` says the logical one, so that ``generate``, position ids, attention masks and a
later turn stay right; ``get_mask_sizes`` says ``(physical + new, missing)``, the same offset by which transformers
masks sliding windows. A static layer has slots instead, and is made with fewer of them.
"""

from __future__ import annotations

from collections.abc import Callable
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
        shift: int64 ``(batch,)``, how far positions moved down by renumbering; ``None`` if they kept their values.
        decoded_from: logical length after the last pruned turn, from where decoding steps count.
        prefilled: logical length when tokens were last pruned; what follows stands for one token a row.
        turn: the rows of the turn that ended there, ``None`` if they are not known any more.
        marks: values ``(batch, rows)`` of stored rows; rows after them, generated later, count as 0.
        filled: whether some of its rows only fill up a batch of which other sequences have more.
        short: whether this layer, or another one of its cache, holds less than the caller passed.
        admitted: whether the rows that come next are those of a pruned decoder. Only such a one knows the positions and
            masks of what is left here.
        state: what policies keep with this layer between calls; tensors with the batch first.
        like: number of the first layer that holds the same tokens and remembers the same of them; -1 if nothing.
        spared: slots that a static layer was made without; ``None`` if it cannot be made smaller.
        seen_slots: `seen` of a static layer, over all its slots: bool ``(slots,)``, those that it describes, and bool
            ``(batch, slots)``, what it says of them; ``None`` where `seen` is.
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

    def __getattr__(self, name: str) -> Any:
        # Only reached for what is not set here: dtype, device, is_initialized, ...
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
        """Rows that were really computed, those that have left a window included.

        Static layers count on their device, which this waits for.
        """
        return int(self.inner.get_seq_length())

    @property
    def logical(self) -> int:
        """As many tokens as the caller has passed."""
        return self.physical + self.missing

    @property
    def slots(self) -> int:
        """Rows that a static layer has room for."""
        return int(self.inner.max_cache_len)

    @property
    def dense_share(self) -> tuple[int, int]:
        """What this layer holds, and what it would hold without pruning: rows, or the slots of a static layer."""
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
                    "This cache holds a prompt whose visual tokens were pruned. The model that goes on with it is not "
                    "pruned, or not any more, and knows neither positions nor mask of what is left. Go on inside the "
                    "`with pruned(...)` block, prune this model, or start with a new cache."
                )
            self.admitted = False
        return self.inner.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> Any:
        """Logical length: as many tokens as the caller has passed. A tensor where the stock layer gives one."""
        return self.inner.get_seq_length() + self.missing

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows that attention will see, and the logical number of the first one."""
        rows, offset = self.inner.get_mask_sizes(query_length)
        return rows, offset + self.missing

    def get_max_length(self) -> int:
        """As many tokens as may be passed; -1 if there is no limit."""
        if self.is_sliding:
            return int(getattr(self.inner, "sliding_window", self.slots if storage.is_static(self) else -1))
        return self.slots + self.missing if storage.is_static(self) else -1

    get_max_cache_shape = get_max_length  # its name in older versions of transformers

    def shorten(self, dropped: int) -> None:
        """A static layer that is not made yet will lack the slots of ``dropped`` tokens, which it will not be given."""
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
        """Empty the layer; it is an unpruned one again, of the size that it was made for."""
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
            ):  # it kept more than its window, for this call to take back
                self.inner.crop(0)
            return
        if kept < self.prefilled:
            self._crop_turn(kept, size)
        drop = size - kept
        self.inner.crop(tokens_to_remove if tokens_to_remove <= 0 else self.physical - drop)

    def _crop_turn(self, kept: int, size: int) -> None:
        """Forget the end of the last pruned turn, if all of it has rows (as candidates of assisted decoding have)."""
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
        """Take out all stored rows but the ``live`` ones: bool ``(batch, rows)``, or ``(batch, kv_heads, rows)``.

        ``count`` rows stay in the sequence with most, ``ragged`` says that others have fewer. ``mask`` is the caller's
        padding mask. What is left stands for all tokens so far, so that no crop can cut into them any more.
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

    def _batch(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Let what is known of each sequence follow its rows."""
        for name in ("seen", "shift"):
            if (state := getattr(self, name)) is not None:
                setattr(self, name, move(state))
        self.marks = {name: move(x) for name, x in self.marks.items()}
        self.state = {name: move(x) for name, x in self.state.items()}
        self.describe_slots()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch for beam search."""
        self.inner.reorder_cache(beam_idx)
        self._batch(lambda x: x[beam_idx.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self.inner.batch_repeat_interleave(repeats)
        self._batch(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of the batch."""
        self.inner.batch_select_indices(indices)
        self._batch(lambda x: x[indices.to(x.device)])


class PrunedHybridLayer(PrunedLayer, *storage.LINEAR):  # type: ignore[misc]
    """A `PrunedLayer` around a layer that has a linear-attention state beside its rows."""

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


def first_layer(cache: Cache | None) -> PrunedLayer | None:
    """The first layer of a cache that holds rows, if a pruned prompt went through it."""
    layers = getattr(cache, "layers", ())  # the paged cache of continuous batching has none
    first = next((layer for layer in layers if storage.has_rows(layer)), None)
    return first if isinstance(first, PrunedLayer) else None


def pruned_layers(cache: Cache | None) -> list[PrunedLayer]:
    """The layers of a cache that a pruned prompt went through; empty for a stock cache."""
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
    """Let layer ``index`` of a cache that gets its first tokens, if it is static, be made for ``rows`` only.

    One that will be ``trimmed`` after prefill can be made smaller then.
    """
    if cache is None or (rows.whole and not trimmed) or index >= len(cache.layers):
        return
    layer = cache.layers[index]
    if storage.is_static(layer) and not storage.is_sliding(layer) and not layer.is_initialized:
        wrap(cache, index).shorten(rows.length - rows.count)


def admit(layers: list[PrunedLayer]) -> None:
    """A pruned decoder begins to compute: what it appends next to each of these layers is welcome."""
    if not torch.compiler.is_compiling():
        for layer in layers:
            layer.admitted = True


SHARED = ("seen", "missing", "shift", "prefilled", "decoded_from", "turn", "filled")
"""What layers that hold the same tokens know alike."""


def record_turn(cache: Cache, layer_rows: list[Rows], mask: torch.Tensor | None) -> None:
    """Note in every layer of the cache which rows of the turn that just went through really exist.

    ``mask`` is the caller's attention mask. A turn of which nothing was dropped leaves a stock cache stock.
    """
    if all(rows.whole for rows in layer_rows) and not pruned_layers(cache):
        return
    alike: dict[tuple[int, int, int], int] = {}
    for index, rows in enumerate(layer_rows):
        if index < len(cache.layers) and not storage.holds_rows(cache.layers[index]):
            continue  # a state is all that went through it, and who borrows keys of another layer knows nothing
        layer = wrap(cache, index)
        before = layer.logical - rows.count
        like = alike.setdefault((id(rows), layer.like, before), index)
        if like < index:
            first = vars(cache.layers[like])
            vars(layer).update({name: first[name] for name in SHARED})
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


def evict_rows(layer: PrunedLayer, rows: Rows, live: torch.Tensor, counts: list[int]) -> Rows:
    """Take out of a layer those of this turn's ``rows`` that are not ``live``; returns what it holds of the turn.

    ``live`` is bool ``(batch, rows)``, or ``(batch, kv_heads, rows)`` with ``counts`` in every head of a sequence.
    """
    if live.dim() == 2:
        left, _ = rows.pick(live, counts)
        trim(layer, rows, left)
        return left
    left, by_row = rows.pick(live[:, 0], counts)
    index = live_order(live.flatten(0, 1), max(counts)).unflatten(0, live.shape[:2])
    past = layer.physical - rows.count
    before = torch.arange(past, device=index.device).expand(*live.shape[:2], -1)
    keys, values = pick_kv(*storage.read(layer.inner, layer.physical), torch.cat([before, index + past], 2))
    by_row = torch.cat([before[:, 0], by_row + past], 1)
    layer.marks = {name: x.gather(1, by_row.to(x.device)) for name, x in layer.marks.items()}
    if smaller := layer.spared is not None and past == 0:
        layer.shorten(rows.length - left.count)
    storage.write(layer.inner, keys, values, layer.slots if smaller else None)
    return left


def kv_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes of storage behind a cache's keys and values, and what they would be without pruning."""
    held = dense = 0
    for layer in cache.layers:
        here = storage.kv_bytes(layer)
        rows, of = layer.dense_share if type(layer) in (PrunedLayer, PrunedHybridLayer) else (1, 1)
        held, dense = held + here, dense + here * of // rows
    return held, dense
