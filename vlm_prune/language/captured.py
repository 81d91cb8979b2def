"""The prefill of the language model, captured: the decoder's forward on the live rows, in buckets of lengths.

Inputs are padded on the left to their bucket. A graph computes hidden states, keys and values of the whole bucket;
those of real rows are copied to the caller and, by the cache's ``update`` method, into a cache of any kind.
Decoding is left to transformers: ``generate(cache_implementation="static")`` compiles it.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from ..call import stream
from ..call.forward_call import ForwardCall, calls_hidden, current_forward
from ..call.receipt import DECODER_PART
from ..capture.buckets import bucket, pad_left, square_mask
from ..capture.device import NotCapturable
from ..capture.graphs import Graphs, Recorded
from ..capture.region import Region
from ..versions import CACHE, cache_of
from .kinds import FULL, layer_kinds

ATTENTION = ("sdpa", "eager")
"""Implementations that take any mask, which padding inside a bucket needs."""
IGNORED = ("use_cache", "return_dict", "logits_to_keep", "num_items_in_batch")
"""Arguments of a decoder that do not change what it computes."""
MOST_ROWS = 4096
"""The most rows, over all sequences, with which a prefill is captured. A graph holds their keys and values."""
OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


class CapturedPrefill:
    """Replaces the ``forward`` of a decoder until `remove` is called.

    ``why_not`` says why no prefill of this model can be captured, ``None`` if some can. ``own`` are ids of our hooks.
    """

    def __init__(self, decoder: Any, graphs: Graphs, session: Any, own: set[int], why_not: str | None):
        self.decoder, self.graphs, self.session = decoder, graphs, session
        self.why_not = why_not or unfit(decoder)
        self.__signature__ = inspect.signature(decoder.forward)
        if "forward" in vars(decoder):
            self.why_not = "its forward is replaced on the instance (offloaded by accelerate?)"
            self.before: Any = decoder.forward
        else:
            self.before = None
        self.region = Region([decoder], own, stand_ins=(CapturedPrefill,))
        object.__setattr__(decoder, "forward", self)

    def remove(self) -> None:
        """Restore the module's forward."""
        if vars(self.decoder).get("forward") is not self:
            return  # other code has replaced it since
        object.__delattr__(self.decoder, "forward")
        if self.before is not None:
            object.__setattr__(self.decoder, "forward", self.before)

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.decoder).forward(self.decoder, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the decoder's forward returns."""
        embeds = kwargs.get("inputs_embeds")
        if torch.compiler.is_compiling() or args or embeds is None or embeds.shape[1] == 1:
            return self.stock(*args, **kwargs)
        call = current_forward(self.session)
        try:
            output, outcome = self._captured(call, embeds, kwargs), "captured"
        except NotCapturable as reason:
            output, outcome = None, f"eager: {reason}"
        if call is not None:
            call.captured = outcome
        return self.stock(**kwargs) if output is None else output

    def _captured(self, call: ForwardCall | None, embeds: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        if self.why_not is not None:
            raise NotCapturable(self.why_not)
        if call is not None and call.probing:
            raise NotCapturable("it is a pass without the image")
        past, mask, positions = check_arguments(kwargs, self.decoder.config)
        version = self.region.check()
        if call is not None and call.positions is not None:
            positions = call.positions
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
        rows, length = embeds.shape[1], bucket(embeds.shape[1])
        if len(embeds) * length > MOST_ROWS:
            raise NotCapturable(
                f"{len(embeds) * length} rows keep the device busy anyway, and a graph would hold them"
            )
        there = torch.ones_like(embeds[..., 0], dtype=torch.bool) if mask is None else mask.bool()
        inputs = {
            "embeds": pad_left(embeds, length, 1),
            "positions": pad_left(stream.split_positions(positions)[1], length, positions.dim() - 1),
            "there": pad_left(there.to(embeds.device), length, 1),
        }
        attention = self.decoder.config._attn_implementation
        key = (DECODER_PART, version, attention)
        caching = kwargs.get("use_cache")
        if caching is None:
            caching = getattr(self.decoder.config, "use_cache", False)
        if caching and past is None:
            past = DynamicCache(config=self.decoder.config)

        def take(recorded: Recorded) -> ModelOutput:
            hidden, held = recorded.result
            if past is not None:
                for layer, (keys, values) in enumerate(held):
                    past.update(keys[:, :, -rows:], values[:, :, -rows:], layer)
            return BaseModelOutputWithPast(last_hidden_state=hidden[:, -rows:].clone(), **{CACHE: past})

        return self.graphs.run(key, inputs, partial(self._compute, attention), take)

    def _compute(
        self, attention: str, static: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Hidden states of a bucket, and its keys and values in each layer."""
        embeds, mask = static["embeds"], square_mask(static["there"])
        if attention == "eager":
            mask = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(
                ~mask, torch.finfo(embeds.dtype).min
            )
        cache = DynamicCache(config=self.decoder.config)
        with calls_hidden():
            output = self.stock(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=static["positions"],
                use_cache=True,
                **{CACHE: cache},
            )
        if more := [name for name in output if name not in ("last_hidden_state", CACHE, "past_key_values")]:
            raise NotCapturable(f"the decoder also returns {more[0]}")
        return output.last_hidden_state, [(layer.keys, layer.values) for layer in cache.layers]


def unfit(decoder: nn.Module) -> str | None:
    """Why no prefill of a decoder can be captured, or ``None``."""
    config: Any = decoder.config
    if others := sorted({kind for kind in layer_kinds(config) if kind != FULL}):
        return f"its decoder has layers of {' and '.join(others).replace('_', ' ')}"
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        return f"{kind} rotary embeddings depend on the prompt's length"
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "hidden_size_per_layer_input", 0):
        return "its decoder's layers share keys, or have per-layer inputs"
    return None


def check_arguments(
    kwargs: dict[str, Any], config: Any
) -> tuple[Cache | None, torch.Tensor | None, torch.Tensor | None]:
    """Cache, padding mask ``(batch, rows)`` and positions of a prefill that can be captured.

    Raises:
        NotCapturable: it asks for more than a graph does.
    """
    past = cache_of(kwargs)
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if config._attn_implementation not in ATTENTION:
        raise NotCapturable(f"{config._attn_implementation} attention takes no padding inside a bucket")
    for name in OUTPUTS:
        wanted = kwargs.get(name)
        if wanted if wanted is not None else getattr(config, name, False):
            raise NotCapturable(f"{name} is asked for")
    if kwargs.get("return_dict") is False:
        raise NotCapturable("a tuple is asked for")
    known = (
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "cache",
        "past_key_values",
        *IGNORED,
        *OUTPUTS,
    )
    if more := [name for name, x in kwargs.items() if name not in known and x is not None]:
        raise NotCapturable(f"the decoder gets the argument {more[0]}")
    if past is not None and any(getattr(layer, "is_initialized", True) for layer in past.layers):
        raise NotCapturable("it continues from a cache that holds tokens")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        raise NotCapturable("its attention mask is prepared already, not a 2-D padding mask")
    if mask is not None and mask.shape != kwargs["inputs_embeds"].shape[:2]:
        raise NotCapturable("its attention mask and its input differ in length")
    if positions is not None and mask is None and past is None:
        raise NotCapturable("its positions may be those of several packed sequences")
    return past, mask, positions
