"""Entry and exit of the language model: stock layers run on the live rows only, callers see the full length.

Everything here happens in two hooks of the decoder. The pre-hook closes the holes in ``inputs_embeds`` and lets
``attention_mask`` and ``position_ids`` follow; the hook behind it restores the full length and tells the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from . import stream
from .cache import PrunedLayer, check_cache, pruned_layers, record_pruned
from .calls import ForwardCall, current_forward
from .errors import UnsupportedCallError
from .timing import Stopwatch


@dataclass
class Shortened:
    """How the sequence of one decoder call was shortened.

    ``order`` is as in `stream.live_order`; ``valid`` marks its real rows, ``None`` if all are. ``seen`` and ``shift``
    are what the cache has to remember, see `cache.PrunedLayer`.
    """

    length: int
    order: torch.Tensor
    valid: torch.Tensor | None
    seen: torch.Tensor | None
    shift: torch.Tensor | None

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Rows at full length, zeros where tokens were dropped."""
        return stream.restore(x, self.order, self.length, self.valid)


class Decoder:
    """The two hooks on a decoder.

    ``positions`` is the policy's rule for what a kept token's RoPE position is ("original" or "compact").
    """

    def __init__(self, module: nn.Module, layers: int, positions: str):
        self.module, self.layers, self.positions = module, layers, positions

    def install(self) -> list[Any]:
        """Register the hooks; returns their handles."""
        return [
            self.module.register_forward_pre_hook(self.enter, with_kwargs=True),
            self.module.register_forward_hook(self.leave, with_kwargs=True),
        ]

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Close the holes of a prefill; let a later call fit a cache that a pruned prompt went through."""
        call, embeds, past = current_forward(), kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        if call is not None and call.encoded:
            call.stopwatch = Stopwatch(embeds.device)
        continued = pruned_layers(past)
        holes = call is not None and embeds is not None and embeds.shape[1] > 1 and call.may_have_holes(embeds)
        if not holes and not continued:
            return None
        kwargs = dict(kwargs)
        if continued:
            _continue(kwargs, continued[0])
        if holes:
            _check_mask(kwargs.get("attention_mask"))
            check_cache(past)
            call.shortened = self._shorten(call, kwargs)
        return args, kwargs

    def _shorten(self, call: ForwardCall, kwargs: dict[str, Any]) -> Shortened:
        embeds: torch.Tensor = kwargs["inputs_embeds"]
        past: Cache | None = kwargs.get("past_key_values")
        mask: torch.Tensor | None = kwargs.get("attention_mask")
        batch, length, _ = embeds.shape
        logical = past.get_seq_length() if past is not None else 0

        alive = ~stream.find_holes(embeds)
        # padding goes too where rows differ anyway; at batch 1 it stays, since counting it would wait for the device
        live = alive & mask[:, -length:].bool() if mask is not None and batch > 1 else alive
        rows, even = call.live_rows(alive, live)
        order = stream.live_order(live, rows)
        valid = None if even else live.gather(1, order)

        short = stream.compact(embeds, order)
        kwargs["inputs_embeds"] = short if valid is None else short.masked_fill(~valid[..., None], 0)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(logical, logical + length, device=embeds.device)[None]
        shift = pruned_layers(past)[0].shift if pruned_layers(past) else None
        if self.positions == "compact":
            before = (~alive).cumsum(-1)
            positions = positions - before
            shift = before[:, -1] if shift is None else shift + before[:, -1]
        kwargs["position_ids"] = stream.compact(positions, order)

        now = valid
        if now is None and mask is not None:
            now = mask[:, -length:].bool().gather(1, order)
        seen = None
        if now is not None:
            old = now.new_ones(batch, logical) if mask is None else mask[:, :logical].bool()
            kwargs["attention_mask"] = torch.cat([old, now], 1)
            seen = torch.cat([now.new_zeros(batch, length - rows), old, now], 1)
        elif not _caches(kwargs, self.module):
            # without cache and mask, stock code takes a jump in the positions for the start of a packed sequence
            kwargs["attention_mask"] = order.new_ones(batch, rows)
        if call.shift_labels is not None:
            call.shift_labels.copy_(stream.retarget(call.shift_labels, order, live))
        return Shortened(length, order, valid, seen, shift)

    def leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Restore the full length and note in the cache what is missing."""
        call = current_forward()
        if call is None:
            return None
        rows = length = output.last_hidden_state.shape[1]
        cache: Cache | None = output.past_key_values
        if (short := call.shortened) is not None:
            call.shortened, length = None, short.length
            output.last_hidden_state = short.restore(output.last_hidden_state)
            if output.hidden_states is not None:
                output.hidden_states = tuple(h if h is None else short.restore(h) for h in output.hidden_states)
            if cache is not None:
                record_pruned(cache, length - rows, short.seen, short.shift)
        for encoded in call.encoded:
            encoded.receipt.record_prefill(len(output.last_hidden_state), length, [rows] * self.layers, cache)
            encoded.receipt._prefill_ms = call.stopwatch.stop() if call.stopwatch else None
        return output


def _caches(kwargs: dict[str, Any], module: nn.Module) -> bool:
    use = kwargs.get("use_cache")
    return bool(module.config.use_cache if use is None else use)


def _continue(kwargs: dict[str, Any], layer: PrunedLayer) -> None:
    """Make a call fit what earlier, pruned tokens left in the cache: the mask of stored rows, shifted positions."""
    embeds = kwargs["inputs_embeds"]
    logical, (batch, length, _) = layer.get_seq_length(), embeds.shape
    if layer.shift is not None:
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(logical, logical + length, device=embeds.device)[None]
        kwargs["position_ids"] = positions - layer.shift[:, None]
    if layer.seen is not None:
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = layer.seen.new_ones(batch, logical + length)
        _check_mask(mask)
        kwargs["attention_mask"] = torch.cat([layer.seen, mask[:, layer.seen.shape[1] :].bool()], 1)


def _check_mask(mask: Any) -> None:
    """Refuse, before any layer runs, a mask that dropped tokens cannot be taken out of."""
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        form = f"a {mask.dim()}-D tensor" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        raise UnsupportedCallError(
            f"attention_mask is {form}: a pruned model needs the 2-D padding mask (batch, length) that processors "
            "return, because dropped tokens have to be taken out of it."
        )
