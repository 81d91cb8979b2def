"""Inside the decoder: dropping tokens between layers, and editing what attention returns.

Stock code makes one mask and one set of rotary embeddings for all layers. Where a layer's rows or its cache differ
from the first layer's, the pre-hook here hands it its own, made by the same stock functions and shared by all layers
that agree.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask

from ..cache.layers import PrunedLayer, spare_slots, trim, wrap
from ..cache.masks import join_masks, past_mask, slots_of
from ..cache.storage import is_static, stored_rows
from ..call import stream
from ..call.budget import Budget
from ..call.forward_call import RESUME, ForwardCall, current_forward
from ..call.rows import Rows
from ..contract.policy import Policy
from ..contract.views import PrefillView
from ..errors import UnsupportedCallError, UnsupportedModelError
from ..sites import Site
from ..versions import CACHE, HOOKS_RUN_AGAIN, cache_of
from .attention import DecoderAttention
from .checks import runs_again


class DecoderLayers:
    """The hooks on single decoder layers for policies that prune in prefill or modulate attention.

    ``policies`` are (policy, budget) pairs in the written order of the composition. Behind the first ``deepstack``
    layers stock code adds features to visual rows. ``session`` is what the calls of their model belong to.
    """

    def __init__(
        self,
        decoder: Any,
        layers: list[Any],
        policies: list[tuple[Policy, Budget]],
        deepstack: int,
        session: Any,
    ):
        self.decoder, self.layers, self.policies, self.deepstack = decoder, layers, policies, deepstack
        self.session = session
        self.depth = len(layers)
        self.pruned: dict[int, list[tuple[Policy, Budget]]] = {}
        self.modulated: dict[int, list[Policy]] = {}
        for policy, budget in policies:
            for layer in policy.prefill_layers(self.depth):
                self.pruned.setdefault(layer, []).append((policy, budget))
            for layer in policy.modulate_layers(self.depth):
                self.modulated.setdefault(layer, []).append(policy)
        for editors in self.modulated.values():
            editors.sort(key=lambda policy: ("logits", "probabilities", "outputs").index(policy.modulates))
        self.trimmed = {layer for policy, _ in policies for layer in policy.trimmed_layers(self.depth)}
        self.needs_text_only = any(policy.needs_text_only for policy, _ in policies)
        self.attention = DecoderAttention(self.depth, self.pruned, self.modulated, session)
        self.sites: list[Site] = []

    def __bool__(self) -> bool:
        return bool(self.pruned or self.modulated)

    def install(self, handles: list[Any]) -> None:
        """Register hooks and attention sites; what has to be undone goes to ``handles`` and `sites` at once."""
        for number, layer in enumerate(self.layers):
            handles.append(
                layer.register_forward_pre_hook(partial(self.enter_layer, number), with_kwargs=True)
            )
            reads = any(policy.reads_attention for policy, _ in self.pruned.get(number, []))
            if reads or number in self.modulated:
                edit = self.attention.edit if number in self.modulated else None
                self.sites.append(Site(layer.self_attn, number, self.attention.see, edit))
            # behind a cut, what stock code adds to the first layers' visual rows is added here
            if number in self.pruned or (self.pruned and number < self.deepstack):
                # in front of the hooks by which transformers collects hidden states
                handles.append(layer.register_forward_hook(partial(self.leave_layer, number), prepend=True))

    def begin(self, call: ForwardCall, kwargs: dict[str, Any]) -> None:
        """A prefill begins; ``kwargs`` are the decoder's. Runs the pass without the image if a policy needs it."""
        rows = call.entered
        if not self.needs_text_only or rows is None or rows.visual is None:
            return
        text = ~rows.visual if rows.mask is None else ~rows.visual & rows.mask
        _, embeds, order = rows.close(kwargs["inputs_embeds"], text, call.text_width() or 1, True, None)
        valid = text.gather(1, order)
        call.probing = True
        try:
            with torch.no_grad():
                self.decoder(
                    inputs_embeds=embeds,
                    attention_mask=valid,
                    position_ids=(valid.cumsum(-1) - 1).clamp(min=0),
                    use_cache=False,
                )
        finally:
            call.probing = False

    def check_recompute(self) -> None:
        """Refuse to train layers that would run again in the backward pass and ask the policies again there."""
        if HOOKS_RUN_AGAIN and any(
            runs_again(self.layers[number]) for number in {*self.pruned, *self.modulated}
        ):
            raise UnsupportedCallError(
                "The decoder has gradient checkpointing on, and this policy acts between its layers: in transformers "
                f"{transformers.__version__} these would run again in the backward pass without what was dropped. "
                "Upgrade transformers (5.23 is known to work), turn gradient checkpointing off, or choose a policy of "
                "the encode stage alone."
            )

    # --- layer boundaries ---

    def enter_layer(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before layer ``number``: note its rows, give it the mask and positions it needs."""
        under_way = current_forward(self.session)
        call = under_way or kwargs.get(RESUME)
        if call is None or call.probing:
            return None
        hidden: torch.Tensor = args[0]
        call.observed = {"hidden": hidden}
        call.positions = None  # stock code has made its rotary embeddings by now
        cache: Cache | None = cache_of(kwargs)
        if call.rows is not None:
            call.layer_rows.append(call.rows)
            if cache is not None and number in self.modulated:
                wrap(cache, number)
            spare_slots(cache, number, call.rows, trimmed=number in self.trimmed)
        layer, first = _pruned_layer(cache, number), _pruned_layer(cache, 0)
        call.observed["layer"] = layer
        looked_at = number in self.modulated or (self.sites and call.rows is not None)
        stored = getattr(cache, "layers", ())[number : number + 1]
        if looked_at and stored and is_static(stored[0]):
            call.observed["rows"] = stored_rows(stored[0]) + hidden.shape[1]
        changed: dict[str, Any] = {}
        if under_way is None:
            kwargs = {name: x for name, x in kwargs.items() if name != RESUME}
        key = _key(call.rows, layer)
        if number == 0:
            call.first = _key(call.entered, first)
        elif key != call.first:
            if key not in call.fitted:
                call.fitted[key] = self._fit(call, number, hidden, layer, first, kwargs)
            changed |= call.fitted[key]
        if number in self.modulated and (under_way is None or runs_again(module)):
            changed[RESUME] = replace(call)
        return (args, {**kwargs, **changed}) if changed or under_way is None else None

    def _fit(
        self,
        call: ForwardCall,
        number: int,
        hidden: torch.Tensor,
        layer: PrunedLayer | None,
        first: PrunedLayer | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Attention mask, position ids and rotary embeddings for this call's rows behind those of layer ``number``."""
        shifts = [x.shift for x in (first, layer) if x is not None and x.shift is not None]
        # those of a step are what stock code made for layer 0, and good for all where no layer was renumbered
        moved = call.rows is not None or bool(shifts)
        positions = kwargs.get("position_ids") if call.rows is None else call.rows.positions
        if moved and positions is not None:
            if call.rows is None and first is not None and first.shift is not None:
                positions = positions + first.shift[:, None]
            if layer is not None and layer.shift is not None:
                positions = positions - layer.shift[:, None]
        places = None if positions is None else stream.split_positions(positions.to(hidden.device))[1]
        mask = kwargs.get("attention_mask")
        slots = mask if isinstance(mask, torch.Tensor) and mask.dim() == 4 else None
        if slots is None or call.rows is not None or layer is None or not is_static(layer):
            mask = self._mask(call, number, hidden, layer, cache_of(kwargs))
        else:
            mask = slots_of(slots, layer, first)
        if mask is not None:
            mask = mask.to(hidden.device)
        if not moved:
            return {"attention_mask": mask}
        return {
            "attention_mask": mask,
            "position_ids": None,  # only the rotary embeddings are told, see `Decoder.place`
            "position_embeddings": self.decoder.rotary_emb(hidden, places),
        }

    def _mask(
        self,
        call: ForwardCall,
        number: int,
        hidden: torch.Tensor,
        layer: PrunedLayer | None,
        past: Cache | None,
    ) -> torch.Tensor | None:
        count = hidden.shape[1]
        # a stock layer too may hold tokens, those of earlier turns without an image
        stored = past.layers[number] if past is not None and number < len(past.layers) else DynamicLayer()
        logical = int(stored.get_seq_length())
        now = None if call.mask is None else call.mask[:, logical:].bool()
        if call.rows is not None:
            now = call.rows.mask
        mask = join_masks(past_mask(layer, call.mask, logical), now, logical, count)
        cache = None if past is None else Cache(layers=[stored])
        made: torch.Tensor | None = create_causal_mask(
            config=self.decoder.config,
            inputs_embeds=hidden,
            attention_mask=None if mask is None else mask.to(hidden.device),
            **{CACHE: cache},
            position_ids=None,
        )
        return made

    def leave_layer(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Behind layer ``number`` of a prefill: ask the policies, drop rows."""
        call = current_forward(self.session)
        if call is None or call.probing or call.rows is None:
            return None
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        home = call.rows.order.device
        rows = call.rows.to(hidden.device)
        visual = rows.visual
        if visual is None:
            return None
        gone = torch.zeros_like(visual)
        closed_up: torch.Tensor | None = None
        for policy, budget in self.pruned.get(number, []):  # all see the layer as it was
            view = self._view(call, rows, visual, policy, budget, number, hidden)
            keep = policy.prefill(view)
            rows.carry.update(view.carry)
            call.rows.carry.update({name: x.to(home) for name, x in view.carry.items()})
            if keep is not None:
                gone = gone | (visual & ~keep)
                if policy.positions == "compact":
                    closed_up = visual & ~keep if closed_up is None else closed_up | (visual & ~keep)
        if call.deepstack is not None:
            hidden = call.deepstack.add(number, hidden)
        if number in self.pruned:
            hidden = self._drop(call, number, rows, visual, hidden, gone, closed_up)
            call.rows = call.rows.to(home)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _view(
        self,
        call: ForwardCall,
        rows: Rows,
        visual: torch.Tensor,
        policy: Policy,
        budget: Budget,
        number: int,
        hidden: torch.Tensor,
    ) -> PrefillView:
        entered = call.entered.visual if call.entered is not None else None
        initial = visual.sum(-1) if entered is None else entered.sum(-1)
        mask = call.image_mask
        dense = initial if mask is None else mask.sum(-1)
        # the share that a policy of several stages keeps is one of all tokens, not of what its own encode stage left
        base = dense if "encode" in policy.stages else initial
        return PrefillView(
            layer=number,
            depth=self.depth,
            hidden=hidden,
            visual=visual,
            valid=rows.mask,
            initial=initial.to(hidden.device),
            target=budget.of_visual(base, call).to(hidden.device),
            attention=call.observed.get("attention"),
            carry=dict(rows.carry),
        )

    def _drop(
        self,
        call: ForwardCall,
        number: int,
        rows: Rows,
        visual: torch.Tensor,
        hidden: torch.Tensor,
        gone: torch.Tensor,
        closed_up: torch.Tensor | None,
    ) -> torch.Tensor:
        """Take the rows ``gone`` out of ``hidden``, and padding with them where sequences differ anyway.

        Positions move down over the places ``closed_up``, if any.
        """
        live = ~gone
        if rows.mask is not None and len(hidden) > 1:
            live = live & rows.mask
        if (left := self._left(call, number)) is not None:
            dropped = sum(call.left or ()) - sum(left)
            counts = [text + kept for text, kept in zip(call.count().text, left, strict=True)]
        else:
            counts, left, lost = torch.stack([x.sum(-1) for x in (live, live & visual, gone)]).tolist()
            dropped = sum(lost)
        call.left = left
        if not dropped:
            return hidden
        if not min(counts):
            names = " and ".join(policy.name for policy, _ in self.pruned[number])
            raise UnsupportedCallError(
                f"Of a prompt of this call nothing is left behind decoder layer {number}: it holds images alone, and "
                f"{names} drops all visual tokens there. Put text into the prompt, or choose a policy that keeps some."
            )
        call.observed.pop("attention", None)
        if call.deepstack is not None and call.deepstack.stock:
            call.deepstack.take_over()
            hidden = call.deepstack.add(number, hidden)
        ragged = min(counts) < max(counts)
        call.rows, hidden, order = rows.close(hidden, live, max(counts), ragged, closed_up)
        if call.deepstack is not None:
            call.deepstack.cut(order, call.rows.valid)
        return hidden

    def _left(self, call: ForwardCall, number: int) -> list[int] | None:
        """Visual tokens of each sequence that are left behind layer ``number``; ``None`` if only the device knows."""
        (policy, budget), *others = self.pruned[number]
        if others or call.unknown_features or type(policy).left is Policy.left:
            return None
        if not call.accounted:
            return None
        entered, counts = call.count().visual, []
        for here, now, spans in zip(entered, call.left or entered, call.spans_by_sequence(), strict=True):
            dense = sum(span.rows for span in spans)
            target = budget.of_prompt(
                dense if "encode" in policy.stages else here, [span.tiles for span in spans]
            )
            plain = [span.plain for span in spans if span.plain is not None]
            tiles = plain if len(plain) == len(spans) else []
            left = policy.left(number, self.depth, here, target, tiles) if here else 0
            if left is None:
                return None
            counts.append(min(left, now))
        return counts

    def trim_cache(self, cache: Cache, layer_rows: list[Rows], final: Rows) -> list[Rows]:
        """After prefill, take dropped tokens out of earlier layers too; returns the rows that each layer now holds."""
        held = list(layer_rows)
        for number in self.trimmed:
            if held[number] is not final:  # even of as many rows, where another sequence is the longest
                trim(wrap(cache, number), held[number], final)
                held[number] = final
        return held


def check_decoder(decoder: Any) -> None:
    """Raise if the decoder's layers remember anything else than all tokens."""
    for layer in DynamicCache(config=decoder.config).layers:
        if type(layer) is not DynamicLayer:
            raise UnsupportedModelError(
                f"The language model {type(decoder).__name__} has cache layers of kind {type(layer).__name__}, such as "
                "sliding windows have: only decoders with full attention in every layer can be pruned."
            )


def _pruned_layer(cache: Cache | None, number: int) -> PrunedLayer | None:
    stored = getattr(cache, "layers", ())[number : number + 1]
    return stored[0] if stored and isinstance(stored[0], PrunedLayer) else None


def _key(rows: Rows | None, layer: PrunedLayer | None) -> tuple[int, int]:
    """Layers with equal keys can share mask and positions."""
    return (0 if rows is None else id(rows), -1 if layer is None else layer.like)
