"""Stock cache layers of every kind that can hold a pruned sequence: what they hold, how to replace it, its size.

Growing layers (``DynamicLayer``) hold tensors as long as the sequence. Static ones hold slots for the longest
sequence, filled from the left. Quantised ones hold codes, and the last rows unquantised. Sliding ones of either kind
hold the rows of a window only, and indexed ones a second kind of keys. Linear-attention layers hold no rows but a state
of one size (or of a convolution), which a shortened sequence simply updates; layers that reuse the keys of
another hold nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, StaticLayer

from ..errors import UnsupportedCallError


def _stock(*names: str) -> tuple[type, ...]:
    """Classes of ``transformers.cache_utils`` that its version has."""
    return tuple(getattr(cache_utils, name) for name in names if hasattr(cache_utils, name))


PLAIN = (DynamicLayer, StaticLayer)
SLIDING = _stock("DynamicSlidingWindowLayer", "StaticSlidingWindowLayer")
INDEXED = _stock("DynamicIndexedLayer", "StaticIndexedLayer")
STATE = _stock("LinearAttentionLayer")
NOTHING = _stock("DummyLayer")
BOTH = _stock(
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionAndStaticFullAttentionLayer",
    "LinearAttentionAndStaticSlidingWindowAttentionLayer",
)
LINEAR = _stock("LinearAttentionCacheLayerMixin")
KNOWN = (*PLAIN, *SLIDING, *INDEXED, *STATE, *NOTHING, *BOTH)
"""Kinds of layers a decoder may have: full attention, windows of either form (sliding and chunked), attention with an
indexer, linear attention, none, and linear attention together with another."""


def is_known(kind: type) -> bool:
    """Whether this is a known class of layers: those of transformers, and others that append all rows."""
    if kind in KNOWN:
        return True
    appends = DynamicLayer if issubclass(kind, DynamicLayer) else StaticLayer
    return all(getattr(kind, name, None) is getattr(appends, name) for name in ("update", "get_mask_sizes"))


def has_rows(layer: Any) -> bool:
    """Whether a layer holds a key for each token, or for each of a window."""
    return isinstance(layer, CacheLayerMixin)


def holds_rows(layer: Any) -> bool:
    """Whether a layer holds rows of a prompt."""
    if type(layer) is DynamicLayer:
        return bool(layer.is_initialized)
    return has_rows(layer) and bool(layer.is_initialized)


def is_sliding(layer: Any) -> bool:
    """Whether a layer drops rows that have left its window."""
    return bool(getattr(layer, "is_sliding", False))


def is_static(layer: Any) -> bool:
    """Whether a stock layer, or the `cache.PrunedLayer` around one, has a fixed number of slots."""
    inner = getattr(layer, "inner", layer)
    return type(inner) is not DynamicLayer and isinstance(inner, StaticLayer)


def is_quantised(layer: Any) -> bool:
    """Whether a stock layer holds codes instead of keys and values."""
    return isinstance(layer, DynamicLayer) and hasattr(layer, "_dequantize")


def check_cache(cache: Cache | None, config: Any) -> None:
    """Raise if pruned rows cannot be stored in this kind of cache, or a decoder of this config does not fit it.

    A decoder with windows may keep all rows, as in a ``DynamicCache()`` made without its config; one without may not
    lose any.
    """
    if cache is None:
        return
    inners = [getattr(layer, "inner", layer) for layer in cache.layers]
    if all((is_known(type(inner)) or is_quantised(inner)) and not is_sliding(inner) for inner in inners):
        return
    fit = [type(layer) for layer in DynamicCache(config=config).layers]
    for number, inner in enumerate(inners):
        stock = fit[number] if number < len(fit) else DynamicLayer
        known = is_known(type(inner)) or is_quantised(inner)
        if not known or (is_sliding(inner) and not getattr(stock, "is_sliding", False)):
            raise UnsupportedCallError(
                f"A pruned model cannot use a cache of {type(inner).__name__} layers here, where this decoder has "
                f"{stock.__name__}: it supports layers of full attention, as in DynamicCache (the default of "
                "generate), StaticCache and QuantizedCache, offloaded or not, and other kinds where the decoder has "
                "them: make the cache from the model's config."
            )


def stored_rows(layer: Any) -> int:
    """The rows that a layer really holds. Static layers count on their device, so this waits for it."""
    return int(layer.physical if hasattr(layer, "inner") else layer.get_seq_length())


def read(inner: CacheLayerMixin, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``(batch, heads, rows, head_dim)`` that a stock layer of ``rows`` rows holds."""
    keys, values = inner.keys, inner.values
    if is_quantised(inner):
        coded = inner._dequantize(inner._quantized_keys), inner._dequantize(inner._quantized_values)
        rest = [x if x.dim() == 4 else like[:, :, :0] for x, like in zip((keys, values), coded, strict=True)]
        keys, values = (torch.cat(pair, 2) for pair in zip(coded, rest, strict=True))
    return keys[:, :, :rows], values[:, :, :rows]


def write(inner: CacheLayerMixin, keys: torch.Tensor, values: torch.Tensor, slots: int | None) -> None:
    """Replace the rows of a stock layer by these. ``slots`` is the new size of a static one, if it may change."""
    if type(inner) is DynamicLayer:
        inner.keys, inner.values = keys, values
        return
    if is_static(inner):
        inner.cumulative_length.zero_()
        if slots is not None:
            inner.max_cache_len, inner.is_initialized = slots, False
    else:
        inner.cumulative_length, inner.is_initialized = 0, False
    inner.update(keys, values)


def _tensors(x: Any) -> list[torch.Tensor]:
    """The plain tensors that store keys or values, in whatever form."""
    if isinstance(x, tuple | list):
        return [t for part in x for t in _tensors(part)]
    if isinstance(x, dict):
        return [t for part in x.values() for t in _tensors(part)]
    if not isinstance(x, torch.Tensor):
        return []
    if hasattr(x, "__tensor_flatten__"):
        return [t for name in x.__tensor_flatten__()[0] for t in _tensors(getattr(x, name))]
    return [x]


def kv_bytes(layer: Any) -> int:
    """Bytes of storage of a layer's keys and values, or of its state."""
    inner = getattr(layer, "inner", layer)
    if type(inner) in PLAIN and type(inner.keys) is type(inner.values) is torch.Tensor:
        return inner.keys.untyped_storage().nbytes() + inner.values.untyped_storage().nbytes()
    names = ("keys", "values", "indexer_keys", "conv_states", "recurrent_states")
    parts = [getattr(inner, name, None) for name in names]
    if is_quantised(inner):
        parts += [inner._quantized_keys, inner._quantized_values]
    stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(parts)}
    return sum(stores.values())
