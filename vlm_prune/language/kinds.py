"""The kinds of layers that a decoder has, and the mask that stock code makes for each.

Windows, sliding and chunked ones, count rows: stock masks compare the numbers of rows, never positions. On a shortened
prompt a window thus reaches further into the image than on the full one, exactly as in the stock model given what is
left. Layers with a state get the padding mask alone, which keeps fill rows out of the state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import masking_utils
from transformers.cache_utils import Cache, DynamicCache

from ..cache.storage import is_known
from ..errors import PolicyError, UnsupportedModelError
from ..versions import CACHE
from .checks import TOKEN_TYPES

FULL = "full_attention"
STATES = ("linear_attention", "conv")
BY_POSITION = "minimax_m3_sparse"
"""Layers that use a key's position as its index."""


def layer_kinds(config: Any) -> list[str]:
    """The kind of each decoder layer, as ``config.layer_types`` names it."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    kind = FULL
    if getattr(config, "sliding_window", None) is not None:
        kind = "sliding_attention"
    elif getattr(config, "attention_chunk_size", None) is not None:
        kind = "chunked_attention"
    return [kind] * int(config.num_hidden_layers)


def forgets(config: Any) -> bool:
    """Whether fill rows would do harm in the middle of a sequence.

    Attention masks them, but they advance a state, and take slots of a window.
    """
    return any(kind != FULL and kind != "indexed_attention" for kind in layer_kinds(config))


def layer_mask(
    config: Any,
    kind: str,
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    cache: Cache | None,
    positions: torch.Tensor | None,
) -> torch.Tensor | None:
    """The mask that stock code makes for a layer of this kind, from a padding mask ``(batch, tokens)``.

    ``hidden`` ``(batch, rows, channels)`` is the layer's input, ``cache`` holds that layer alone.
    """
    make = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind]
    made: torch.Tensor | None = make(
        config=config, inputs_embeds=hidden, attention_mask=mask, **{CACHE: cache}, position_ids=positions
    )
    return made


def shared_between_layers(decoder: Any, layers: list[Any]) -> str | None:
    """Why no token may be dropped between the layers of a decoder, as a clause; ``None`` if tokens may be."""
    config = decoder.config
    if getattr(config, "hidden_size_per_layer_input", 0):
        return "each has inputs of its own for every token of the prompt"
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_source_layers", None):
        return "some borrow the keys and values of earlier ones"
    if "prev_topk_indices" in inspect.signature(layers[0].forward).parameters:
        return "they hand on which tokens their attention has chosen"
    made = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
    if own := sorted({kind for kind in layer_kinds(config) if not callable(made.get(kind))}):
        return f"what masks its {' and '.join(own)} layers need is known to the decoder alone"
    if getattr(config, "hc_mult", None) or getattr(config, "altup_num_inputs", None):
        return "they hand on several streams of hidden states"
    return None


MaskMaker = Callable[..., Any]
"""``(hidden, padding mask, cache, token types)`` -> the masks of a decoder, as its model makes them."""


def mask_maker(model: Any) -> MaskMaker | None:
    """How a model makes its decoder's masks from token types; ``None`` if these do not matter."""
    made = getattr(type(model), "create_masks_for_generate", None)
    if made is None or not set(TOKEN_TYPES) & set(inspect.signature(made).parameters):
        return None

    def make(
        hidden: torch.Tensor, mask: torch.Tensor | None, cache: Cache | None, types: torch.Tensor
    ) -> Any:
        named = dict.fromkeys(TOKEN_TYPES, types)
        return model.create_masks_for_generate(
            config=model.config,
            inputs_embeds=hidden,
            attention_mask=mask,
            **{CACHE: cache},
            position_ids=None,
            is_first_iteration=True,
            **named,
        )

    return make


def check_decoder(decoder: Any, positions: str) -> None:
    """Raise if a decoder layer stores tokens in an unknown way, or in one that does not work with these positions."""
    if BY_POSITION in layer_kinds(decoder.config) and positions == "original":
        raise PolicyError(
            f'positions="original": {type(decoder).__name__} finds blocks of keys by their position, so that what is '
            'left of a prompt has to be renumbered. Give positions="compact".'
        )
    for layer in DynamicCache(config=decoder.config).layers:
        if not is_known(type(layer)):
            raise UnsupportedModelError(
                f"The language model {type(decoder).__name__} has cache layers of kind {type(layer).__name__}, of "
                "which it is not known what they keep of a shortened prompt: decoders of full, sliding, chunked, "
                "indexed and linear attention can be pruned."
            )
