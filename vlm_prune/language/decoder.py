"""Entry and exit of the language model: its layers run on the live rows only, callers see the full length.

The pre-hook of the decoder closes the holes in ``inputs_embeds`` and adapts ``attention_mask`` and ``position_ids``;
the hook after it restores the full length and records it in the cache. What happens at single layers in between is in
``layers.py``.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..cache.layers import PrunedLayer, admit, first_layer, kv_bytes, pruned_layers, record_turn, spare_slots
from ..cache.masks import behind, is_prepared, join_masks, padding_mask, past_mask, slot_mask, slots_of
from ..cache.storage import check_cache
from ..call import stream
from ..call.deepstack import Deepstack, shorten
from ..call.forward_call import RESUME, ForwardCall, current_forward, next_forward
from ..call.receipt import DECODER_PART, JoinedReceipt
from ..call.rows import Rows
from ..call.timing import Stopwatch
from ..errors import UnsupportedCallError
from ..kernels import numbers
from ..versions import cache_of
from .drafts import join, split
from .entry import Entry
from .kinds import MaskMaker, forgets, layer_kinds
from .layers import DecoderLayers

OF_THEIR_OWN = (
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "visual_pos_masks",
    "deepstack_visual_embeds",
)
"""Arguments of a decoder that are adapted to its rows separately."""


class Decoder:
    """The two hooks on a decoder.

    ``positions`` is the rule for the RoPE positions of tokens kept by the encode stage ("original" or "compact").
    ``layers`` are the hooks of the policies that act inside the decoder, ``entry`` asks the one that chooses at its
    entry; ``None`` if none does. ``masks`` makes the masks of a model whose image tokens attend to each other, ``None``
    if the decoder makes its own. ``session`` is what the calls of its model belong to.
    """

    def __init__(
        self,
        module: nn.Module,
        depth: int,
        positions: str,
        layers: DecoderLayers | None,
        session: Any,
        entry: Entry | None = None,
        masks: MaskMaker | None = None,
    ):
        self.module, self.depth, self.positions, self.session = module, depth, positions, session
        self.layers, self.entry, self.masks = layers, entry, masks
        kinds = layer_kinds(module.config)
        self.chunked, self.indexed = "chunked_attention" in kinds, "indexed_attention" in kinds
        self.rotary = [child for name, child in module.named_children() if name.startswith("rotary_emb")]
        # the newest Mistral models also scale queries by position
        rope = getattr(module.config, "rope_parameters", None) or {}
        scaling = any(hasattr(child, "softmax_scaling") for child in module.modules())
        self.scales = scaling or "llama_4_scaling_beta" in rope
        # OPT looks positions up in a table, by what its padding mask leaves
        table = getattr(module, "embed_positions", None)
        self.counts = table is not None and "attention_mask" in inspect.signature(table.forward).parameters
        self.ends: weakref.WeakKeyDictionary[Cache, torch.Tensor] = weakref.WeakKeyDictionary()

    def install(self, handles: list[Any]) -> None:
        """Register the hooks; their handles go to ``handles``."""
        handles.append(self.module.register_forward_pre_hook(self.enter, with_kwargs=True))
        handles.append(self.module.register_forward_hook(self.leave))
        handles += [child.register_forward_pre_hook(self.place, with_kwargs=True) for child in self.rotary]

    def place(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Make the rotary embeddings those of the remaining rows.

        Nothing else sees these positions. To the rest of stock code, positions with gaps would look like several packed
        sequences: flash attention, and masks made without a cache, would then separate them.
        """
        call = current_forward(self.session)
        if call is None or call.probing or call.positions is None:
            return None
        return (args[0], call.positions, *args[2:]), {k: x for k, x in kwargs.items() if k != "position_ids"}

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Close the holes of a prefill; fit a later call to a cache that holds a pruned prompt."""
        under_way = current_forward(self.session)
        call = (
            under_way or ForwardCall()
        )  # a decoder called directly, or a compiled step, has no visual tokens
        embeds, past = kwargs.get("inputs_embeds"), cache_of(kwargs)
        if embeds is None or call.probing:
            return None
        # where a model is spread over devices, what describes the rows is on the device of the decoder's input
        given = {name: kwargs[name] for name in ("attention_mask", "position_ids") if name in kwargs}
        moved: dict[str, Any] = {
            name: x.to(embeds.device) for name, x in given.items() if isinstance(x, torch.Tensor)
        }
        kwargs = {**kwargs, **moved}
        call.image_masks = [mask.to(embeds.device) for mask in call.image_masks]
        if call.drafts and call.has_visual_tokens():
            kwargs, call = self._compute_prompt(call, kwargs)
            embeds = kwargs["inputs_embeds"]
        if call.kinds and not call.encoded:
            raise UnsupportedCallError(
                "This call brings images that the model does not encode by its feature method, so none of their tokens "
                "can be dropped. unprune(model) to continue with the stock model, and please report it."
            )
        continued = pruned_layers(past)
        if self.layers is None and len({layer.like for layer in continued}) > 1:
            raise UnsupportedCallError(
                "This cache holds a prompt of which each decoder layer has different tokens, because a policy dropped "
                "some inside the decoder. This model is pruned by a policy of the encode stage alone, which cannot "
                "continue it: prune it by the policy that made the cache, or start with a new one."
            )
        admit(continued)
        if call.encoded:
            call.stopwatch = Stopwatch(embeds.device)
        holes = call.may_have_holes(embeds)
        choosing = self.entry is not None and self.entry.offered(call)
        inside = embeds.shape[1] > 1 and self.layers is not None and call.has_visual_tokens()
        if not (holes or choosing or inside or continued):
            return (args, kwargs) if call.prompt is not None else None
        if not (holes or choosing or inside):
            self._continue(call, kwargs, past)
            self._unwrap(call, kwargs, past)
            if under_way is None and self.layers is not None:
                kwargs[RESUME] = call
            return args, kwargs
        check_cache(past, module.config)
        if self.layers is not None:
            self.layers.eviction.check_cache(past)
        blocks = self._blocks(call, kwargs)
        kwargs["attention_mask"] = call.mask = mask = self._padding(call, kwargs, past)
        rows = self._rows(call, kwargs, holes, choosing, inside)
        call.rows = call.entered = rows
        for layer in range(self.depth):  # a later layer may turn out to need fewer still
            spare_slots(past, layer, rows)
        self._fit(call, kwargs, rows, first_layer(past), mask)
        if blocks is not None and self.masks is not None:
            joined = kwargs["attention_mask"]
            kwargs["attention_mask"] = self.masks(
                kwargs["inputs_embeds"], joined, past, _types(rows, blocks, past)
            )
        self._unwrap(call, kwargs, past)
        if inside and self.layers is not None:
            self.layers.begin(call, kwargs)
        return args, kwargs

    def _blocks(self, call: ForwardCall, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The types ``(batch, length)`` of this call's tokens, if the masks in ``kwargs`` were made from them."""
        if self.masks is None or call.types is None or not is_prepared(kwargs.get("attention_mask")):
            return None
        embeds = kwargs["inputs_embeds"]
        return call.types[:, -embeds.shape[1] :].to(embeds.device)

    def _padding(self, call: ForwardCall, kwargs: dict[str, Any], past: Cache | None) -> torch.Tensor | None:
        """The padding mask of a call; some models turn it into other masks before their decoder."""
        mask = kwargs.get("attention_mask")
        if is_prepared(mask) and call.owner is not None and not is_prepared(call.given):
            mask = call.given
        mask, embeds = padding_mask(mask, past, blocks=call.types is not None), kwargs["inputs_embeds"]
        if (
            mask is None and self.chunked
        ):  # chunks begin after what is masked out, and so after what is missing
            logical = int(past.get_seq_length()) if past is not None else 0
            mask = embeds.new_ones(len(embeds), logical + embeds.shape[1], dtype=torch.bool)
        return None if mask is None else mask.to(embeds.device)

    def _compute_prompt(
        self, call: ForwardCall, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], ForwardCall]:
        """Compute the prompt before the drafts separately; returns what is left to compute, and its call."""
        prompt, drafts = split(kwargs, call.drafts)
        call.image_masks = [mask[:, : -call.drafts] for mask in call.image_masks]
        call.drafts = 0
        step = ForwardCall(prompt=self.module(**prompt))
        next_forward(step, self.session)
        return drafts, step

    def _continue(self, call: ForwardCall, kwargs: dict[str, Any], past: Cache) -> None:
        """Fit a call without new visual tokens to what earlier, pruned ones left in the cache."""
        embeds, layer, mask = kwargs["inputs_embeds"], first_layer(past), kwargs.get("attention_mask")
        slots, length = slot_mask(mask, past), embeds.shape[1]
        if self.counts and layer is not None and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = self._numbers(embeds, mask, layer.get_seq_length())
        if slots is None or (self.layers is not None and self.layers.modulated):
            call.mask = self._padding(call, kwargs, past)
        if slots is None:
            kwargs["attention_mask"] = call.mask
        if layer is None:
            return
        if layer.shift is not None:
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = self._numbers(embeds, mask, layer.get_seq_length())
            kwargs["position_ids"] = positions - layer.shift[:, None]
        if slots is not None:
            kwargs["attention_mask"] = slots_of(slots, layer, layer)
        elif layer.seen is not None:
            kwargs["attention_mask"] = behind(layer.seen, call.mask, lambda: layer.logical + length)

    def _numbers(self, embeds: torch.Tensor, mask: torch.Tensor | None, logical: int) -> torch.Tensor:
        """The positions that stock code gives rows of which none are said: int64 ``(batch or 1, rows)``.

        ``logical`` rows are before them.
        """
        length = embeds.shape[1]
        if self.counts and mask is not None and mask.dim() == 2:
            return (mask.long().cumsum(-1) * mask - 1)[:, -length:]
        return numbers(logical + length, embeds.device)[None, logical:]

    def _unwrap(self, call: ForwardCall, kwargs: dict[str, Any], past: Cache | None) -> None:
        """Show stock cache layers to a decoder whose indexers query their length.

        All of its layers hold the same rows, since none may be dropped between them.
        """
        first, mask = first_layer(past), kwargs.get("attention_mask")
        if first is None or not self.indexed or call.owner is None or is_prepared(mask):
            return
        if kwargs.get("position_ids") is None:
            length, device = kwargs["inputs_embeds"].shape[1], kwargs["inputs_embeds"].device
            kwargs["position_ids"] = torch.arange(length, device=device)[None] + first.get_seq_length()
        kwargs["attention_mask"] = None if mask is None else mask[:, first.missing :]
        call.unwrap(past)

    def _fit(
        self,
        call: ForwardCall,
        kwargs: dict[str, Any],
        rows: Rows,
        layer: PrunedLayer | None,
        mask: torch.Tensor | None,
    ) -> None:
        """Make ``kwargs`` describe ``rows`` after what the first layer of the cache holds."""
        past: Cache | None = cache_of(kwargs)
        logical = int(past.get_seq_length()) if past is not None else 0
        positions = rows.positions
        if layer is not None and layer.shift is not None:
            positions = positions - layer.shift[:, None]
        _, call.positions = stream.split_positions(positions)
        kwargs["position_ids"] = call.positions
        if positions.dim() == 2 and self.rotary and not self.scales:
            kwargs["position_ids"] = None
        kwargs["attention_mask"] = join_masks(past_mask(layer, mask, logical), rows.mask, logical, rows.count)

    def _rows(
        self, call: ForwardCall, kwargs: dict[str, Any], holes: bool, choosing: bool, inside: bool
    ) -> Rows:
        """Shorten the call's inputs, in ``kwargs``; returns what is left."""
        embeds: torch.Tensor = kwargs["inputs_embeds"]
        past: Cache | None = cache_of(kwargs)
        mask: torch.Tensor | None = kwargs.get("attention_mask")
        batch, length, _ = embeds.shape
        logical = int(past.get_seq_length()) if past is not None else 0
        now = None if mask is None else mask[:, -length:].bool()
        positions, given = kwargs.get("position_ids"), None
        if positions is None:
            positions = self._numbers(embeds, mask, logical)
            given = None if self.counts else mask
        # padding goes too where rows differ anyway; at batch 1 it stays, since counting it would wait for the device
        gone = call.holes(embeds) if holes else None
        alive = None if gone is None else ~gone
        if choosing and self.entry is not None:
            chosen, embeds = self.entry.choose(call, embeds, now)
            alive = chosen if alive is None else alive & chosen
            gone = None
        live = alive if alive is None or now is None or batch == 1 else alive & now
        if alive is not None:
            overflow = embeds[..., 0].isnan() & alive if batch > 1 and holes else None
            call.count(live, alive, overflow)
        rows = Rows(
            length=length,
            order=numbers(length, embeds.device).expand(batch, -1),
            positions=positions,
            mask=now,
            given=given,
        )
        if inside:
            rows = call.mark_visual(rows)
        features: list[torch.Tensor] | None = kwargs.get("deepstack_visual_embeds")
        if alive is None or live is None:
            if features and inside:
                self._note_deepstack(call, kwargs, kwargs["visual_pos_masks"], list(features))
            return rows

        census = call.count()
        gone = None if self.positions != "compact" else ~alive if gone is None else gone
        if logical and not census.even and forgets(self.module.config):
            raise UnsupportedCallError(
                f"The sequences of this batch are left with different numbers of tokens ({min(census.live)} to "
                f"{max(census.live)}) after what their cache holds. They would be padded in the middle, where "
                "windows and linear-attention states of this decoder count what is not there. Call it with one "
                "sequence at a time, with images of the same number and budget for each, or without the cache."
            )
        rows, kwargs["inputs_embeds"], order = rows.close(embeds, live, census.width, not census.even, gone)
        kwargs.update(_cut_along(kwargs, embeds, order))
        if features:
            masks = shorten(kwargs["visual_pos_masks"], features, order, rows.valid)
            self._note_deepstack(call, kwargs, *masks)
        return rows

    def _note_deepstack(
        self, call: ForwardCall, kwargs: dict[str, Any], visual: torch.Tensor, features: list[torch.Tensor]
    ) -> None:
        kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"] = visual, features
        call.deepstack = Deepstack(visual, features)

    def _end(self, last: torch.Tensor, rows: Rows, cache: Cache | None) -> torch.Tensor:
        """The hidden state that predicts each sequence's next token: ``last`` ``(batch, channels)`` of this turn.

        If nothing is left of the last chunk of a chunked prompt, it is the last state of the chunk before.
        """
        before = self.ends.get(cache) if cache is not None else None
        if rows.valid is None or before is None or before.shape != last.shape:
            return last
        return torch.where(rows.valid[:, -1:].to(last.device), last, before.to(last.device, last.dtype))

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Restore the full length and note in the cache what is missing."""
        call = current_forward(self.session)
        if call is None or call.probing:
            return None
        call.wrap_again()
        length = output.last_hidden_state.shape[1]
        counts = [length] * self.depth
        cache: Cache | None = cache_of(output)
        if (rows := call.rows) is not None and call.entered is not None:
            length, call.rows = rows.length, None
            by_layer = call.layer_rows or [call.entered] * self.depth
            counts = [r.count for r in by_layer]
            if not rows.whole:
                live = output.last_hidden_state
                if live.shape[1] == rows.count:  # some decoders compute the last rows only
                    output.last_hidden_state = rows.restore(live)
                    # the last remaining row predicts the next token, even if the prompt ends with a dropped one
                    output.last_hidden_state[:, -1] = self._end(live[:, -1], rows, cache)
                self.session.leave_live_rows(rows)
                if output.hidden_states is not None:
                    states = zip(output.hidden_states, [call.entered, *by_layer[1:], rows], strict=True)
                    output.hidden_states = tuple(h if h is None else r.restore(h) for h, r in states)
            if cache is not None:
                if self.layers is not None:
                    by_layer = self.layers.evict(call, cache, by_layer, rows)
                record_turn(cache, by_layer, call.mask)
        elif self.layers is not None and cache is not None:
            self.layers.eviction.after_step(call, cache)
        if cache is not None and not torch.compiler.is_compiling():
            end = output.last_hidden_state[:, -1].detach()
            self.ends[cache] = end.clone() if length > 1 else end
        weight = None if cache is None or not call.encoded else kv_bytes(cache)
        for number, encoded in enumerate(call.encoded):
            encoded.receipt.record_prefill(len(output.last_hidden_state), length, counts, weight)
            encoded.receipt.trace = call.trace(number)
            if call.captured is not None:
                encoded.receipt.captured[DECODER_PART] = call.captured
            encoded.receipt._prefill_ms = call.stopwatch.stop() if call.stopwatch else None
        if len(call.encoded) > 1 and call.owner is not None:
            call.owner.publish(JoinedReceipt.of([encoded.receipt for encoded in call.encoded]))
        return output if call.prompt is None else join(call.prompt, output)


def _cut_along(kwargs: dict[str, Any], embeds: torch.Tensor, order: torch.Tensor) -> dict[str, torch.Tensor]:
    """The other per-row arguments ``(batch, length, ...)``, such as inputs of single layers."""
    return {
        name: stream.compact(x, order.to(x.device))
        for name, x in kwargs.items()
        if name not in OF_THEIR_OWN and isinstance(x, torch.Tensor) and x.shape[:2] == embeds.shape[:2]
    }


def _types(rows: Rows, types: torch.Tensor, past: Cache | None) -> torch.Tensor:
    """Types of all rows that masks are made from: no token of this turn shares a block with cached ones."""
    logical = int(past.get_seq_length()) if past is not None else 0
    left = types.expand(len(rows.order), -1).gather(1, rows.order)
    return torch.nn.functional.pad(
        left if rows.valid is None else left.masked_fill(~rows.valid, 0), (logical, 0)
    )
