"""The KV cache of a pruned sequence: stock layers, told how long the sequence is for everyone else.

A cache layer knows two lengths. *Physical* is the rows it holds. *Logical* is what transformers would have seen
without pruning: ``get_seq_length`` says the logical one, so that ``generate``, position ids, attention masks and a
later turn stay right; ``get_mask_sizes`` says ``(physical + new, missing)``, the same offset by which transformers
masks sliding windows.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .errors import UnsupportedCallError
from .rows import Rows


class PrunedLayer(CacheLayerMixin):
    """A stock cache layer that holds fewer rows than the sequence has tokens.

    Attributes:
        inner: the stock layer that stores keys and values.
        missing: logical length minus physical length.
        seen: bool ``(batch, logical length at the last prefill)``, the attention mask that describes the stored rows
            once the first ``missing`` columns are skipped; ``None`` if every stored row may be attended.
        shift: int64 ``(batch,)``, how far positions moved down by renumbering; ``None`` if they kept their values.
        prefilled: logical length when tokens were last pruned; what follows stands for one token a row.
        turn: the rows of the turn that ended there, ``None`` if they are not known any more.
        marks: values ``(batch, rows)`` of stored rows; rows behind them, generated later, count as 0.
        state: what policies keep with this layer between calls; tensors with the batch first.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, inner: CacheLayerMixin):
        self.inner = inner
        self.missing = 0
        self.seen: torch.Tensor | None = None
        self.shift: torch.Tensor | None = None
        self.prefilled = 0
        self.turn: Rows | None = None
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
    def physical(self) -> int:
        """Rows that really exist."""
        return int(self.inner.get_seq_length())

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As the stock layer."""
        self.inner.lazy_initialization(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows; as the stock layer."""
        return self.inner.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        """Logical length: as many tokens as the caller has passed."""
        return self.physical + self.missing

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Physical length including the new rows, and the logical number of the first one."""
        return self.physical + query_length, self.missing

    def get_max_length(self) -> int:
        """As the stock layer."""
        return int(self.inner.get_max_length())

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in older versions of transformers."""
        return int(self.inner.get_max_cache_shape())

    def reset(self) -> None:
        """Empty the layer; it is an unpruned one again."""
        self.inner.reset()
        self.missing, self.seen, self.shift, self.prefilled, self.turn = 0, None, None, 0, None
        self.marks, self.state = {}, {}

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as assisted decoding does. Raises when that would cut into a pruned prompt."""
        size = self.get_seq_length()
        # transformers before 5.20 names the size to keep, later ones the negative number to remove
        kept = tokens_to_remove if tokens_to_remove > 0 else size + tokens_to_remove
        if kept >= size:
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
                "whose visual tokens were pruned. Crop the text behind the last image only, or start again with a "
                "new cache."
            )
        self.prefilled, self.turn = kept, self.turn.without_tail(cut)
        self.seen = None if self.seen is None else self.seen[:, :kept]
        self.marks = {name: x[:, : kept - self.missing] for name, x in self.marks.items()}

    def _rows(self, index: torch.Tensor) -> None:
        for name in ("seen", "shift"):
            if (state := getattr(self, name)) is not None:
                setattr(self, name, state[index.to(state.device)])
        self.marks = {name: x[index.to(x.device)] for name, x in self.marks.items()}
        self.state = {name: x[index.to(x.device)] for name, x in self.state.items()}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch for beam search."""
        self.inner.reorder_cache(beam_idx)
        self._rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        batch = self.inner.keys.shape[0]
        self.inner.batch_repeat_interleave(repeats)
        self._rows(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of the batch."""
        self.inner.batch_select_indices(indices)
        self._rows(indices)


def check_cache(cache: Cache | None) -> None:
    """Raise if pruned rows cannot be stored in this kind of cache."""
    for layer in cache.layers if cache is not None else ():
        inner = layer.inner if isinstance(layer, PrunedLayer) else layer
        if type(inner) is not DynamicLayer:
            raise UnsupportedCallError(
                f"A pruned model cannot use a cache of {type(inner).__name__} layers yet: it supports DynamicCache "
                "(the default of generate). Leave cache_implementation and past_key_values at their defaults."
            )


def pruned_layers(cache: Cache | None) -> list[PrunedLayer]:
    """The layers of a cache that a pruned prompt went through; empty for a stock cache."""
    return [layer for layer in cache.layers if isinstance(layer, PrunedLayer)] if cache is not None else []


def wrap(cache: Cache, index: int) -> PrunedLayer:
    """Layer ``index`` of a cache as a `PrunedLayer`, made one in place if it is not."""
    while len(cache.layers) <= index:  # a DynamicCache made without config grows its layers as they are used
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if not isinstance(layer, PrunedLayer):
        cache.layers[index] = layer = PrunedLayer(layer)
    return layer


def past_mask(layer: PrunedLayer | None, mask: torch.Tensor | None, logical: int) -> torch.Tensor | None:
    """What of a layer's first ``logical`` tokens may be attended: bool ``(batch, logical)``, ``None`` if all.

    ``mask`` is the caller's; it counts for a stock layer, and behind what the layer remembers itself.
    """
    seen = layer.seen if layer is not None else None
    if seen is None:
        return None if mask is None else mask[:, :logical].bool()
    if mask is None:
        return torch.nn.functional.pad(seen, (0, logical - seen.shape[1]), value=True)
    return torch.cat([seen, mask[:, seen.shape[1] : logical].bool()], 1)


def join_masks(
    past: torch.Tensor | None, now: torch.Tensor | None, logical: int, new: int
) -> torch.Tensor | None:
    """One mask of ``logical`` past and ``new`` present tokens, where ``None`` stands for all True."""
    if past is None and now is None:
        return None
    if past is None:
        past = now.new_ones(len(now), logical)  # type: ignore[union-attr, arg-type]
    if now is None:
        now = past.new_ones(len(past), new)
    return torch.cat([past, now], 1)


def record_turn(cache: Cache, layer_rows: list[Rows], mask: torch.Tensor | None) -> None:
    """Note in every layer of the cache which rows of the turn that just went through it really exist.

    ``mask`` is the caller's attention mask. A turn of which nothing was dropped leaves a stock cache stock.
    """
    if all(rows.whole for rows in layer_rows) and not pruned_layers(cache):
        return
    for index, rows in enumerate(layer_rows):
        layer = wrap(cache, index)
        before = layer.get_seq_length() - rows.count
        dropped = rows.length - rows.count
        past = past_mask(layer, mask, before)
        seen = join_masks(past, rows.mask, before, rows.count)
        layer.seen = None if seen is None else torch.nn.functional.pad(seen, (dropped, 0), value=False)
        layer.missing += dropped
        if rows.shift is not None:
            layer.shift = rows.shift if layer.shift is None else layer.shift + rows.shift
        layer.prefilled, layer.turn = layer.get_seq_length(), rows


def trim(layer: PrunedLayer, rows: Rows, final: Rows) -> None:
    """Take out of a layer the rows of this turn that were dropped later: ``rows`` it holds, ``final`` remain."""
    place = final.order.new_zeros(len(final.order), rows.length)
    place.scatter_(1, rows.order, torch.arange(rows.count, device=place.device).expand_as(rows.order))
    index = place.gather(1, final.order) + layer.physical - rows.count
    past = torch.arange(layer.physical - rows.count, device=index.device).expand(len(index), -1)
    index = torch.cat([past, index], 1)
    layer.marks = {name: x.gather(1, index) for name, x in layer.marks.items()}
    index = index[:, None, :, None]
    for name in ("keys", "values"):
        stored = getattr(layer, name)
        setattr(layer, name, stored.gather(2, index.expand(-1, stored.shape[1], -1, stored.shape[3])))


def kv_bytes(cache: Cache) -> int:
    """Bytes of storage behind a cache's keys and values."""
    stores = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for layer in cache.layers
        for t in (layer.keys, layer.values)
        if t is not None
    }
    return sum(stores.values())
