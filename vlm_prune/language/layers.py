"""Inside the decoder: dropping tokens between layers, and editing what attention returns.

Stock code makes one mask and one set of rotary embeddings for all layers. Where a layer's rows or its cache differ
from the first layer's, the pre-hook here gives it separate ones, made by the same stock functions and shared by all
layers that agree.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from ..cache.layers import PrunedLayer, first_layer, spare_slots, wrap
from ..cache.masks import join_masks, past_mask, slots_of
from ..cache.storage import is_static, stored_rows
from ..call import stream
from ..call.budget import Budget
from ..call.forward_call import RESUME, ForwardCall, current_forward
from ..call.rows import Rows
from ..composition import Composition
from ..contract.policy import Policy
from ..contract.views import AttentionView, PrefillView
from ..errors import UnsupportedCallError
from ..kernels import to_device
from ..sites import Site
from ..versions import HOOKS_RUN_AGAIN, cache_of
from .attention import DecoderAttention
from .checks import runs_again
from .eviction import Eviction
from .kinds import FULL, STATES, layer_kinds, layer_mask
from .look_ahead import look_ahead
from .standard import check_layers


class DecoderLayers:
    """The hooks on single decoder layers for policies that act in prefill, on the cache, or on attention.

    After the first ``deepstack`` layers stock code adds features to visual rows. ``session`` is the pruning that calls
    of their model belong to. ``blocks`` says that tokens of an image may attend to each other.
    """

    def __init__(
        self,
        decoder: Any,
        layers: list[Any],
        composition: Composition,
        deepstack: int,
        session: Any,
        blocks: bool = False,
    ):
        self.decoder, self.layers, self.deepstack, self.session = decoder, layers, deepstack, session
        self.policies = policies = [(policy, composition.share(policy)) for policy in composition.policies]
        self.depth, self.kinds = len(layers), layer_kinds(decoder.config)
        self.like = [self.kinds.index(kind) for kind in self.kinds]
        self.pruned: dict[int, list[tuple[Policy, Budget]]] = {}
        self.observed: dict[int, list[tuple[Policy, Budget]]] = {}
        self.modulated: dict[int, list[Policy]] = {}
        for policy, budget in policies:
            for layer in policy.prefill_layers(self.depth):
                self.pruned.setdefault(layer, []).append((policy, budget))
            for layer in policy.observed_layers(self.depth):
                self.observed.setdefault(layer, []).append((policy, budget))
            for layer in policy.modulate_layers(self.depth):
                self.modulated.setdefault(layer, []).append(policy)
        for editors in self.modulated.values():
            editors.sort(key=lambda policy: ("logits", "probabilities", "outputs").index(policy.modulates))
        self.ahead = {
            number + 1
            for number, asked in self.pruned.items()
            if any(policy.reads_ahead for policy, _ in asked)
        }
        self.eviction = Eviction([kind not in STATES for kind in self.kinds], policies)
        self.needs_text_only = any(policy.needs_text_only for policy, _ in policies)
        watched_by = {number: names for number in range(self.depth) if (names := self._watching(number))}
        check_layers(decoder, layers, composition.policies, watched_by, blocks)
        watched = {*self.pruned, *self.observed}
        self.attention = DecoderAttention(self.depth, watched, self.modulated, self.eviction, session)
        self.sites: list[Site] = []

    def _watching(self, number: int) -> list[str]:
        """Names of the policies that look at the attention of layer ``number``, or edit it."""
        names = [policy.name for policy, _ in self.pruned.get(number, []) if policy.reads_attention]
        names += [policy.name for policy, _ in self.pruned.get(number - 1, []) if policy.reads_ahead]
        names += [policy.name for policy, _ in self.observed.get(number, [])]
        names += [policy.name for policy in self.modulated.get(number, [])]
        if self.eviction.steps:
            names += [policy.name for policy, _ in self.eviction.layers.get(number, [])]
        return names

    def __bool__(self) -> bool:
        return bool(self.pruned or self.modulated or self.eviction)

    def install(self, handles: list[Any]) -> None:
        """Register hooks and attention sites; what must be undone goes to ``handles`` and `sites` at once."""
        for number, layer in enumerate(self.layers):
            handles.append(
                layer.register_forward_pre_hook(partial(self.enter_layer, number), with_kwargs=True)
            )
            if self._watching(number):
                edit = self.attention.edit if number in self.modulated else None
                self.sites.append(Site(layer.self_attn, number, self.attention.see, edit))
            # after a cut, what stock code adds to the first layers' visual rows is added here
            cut = number in self.pruned or (self.pruned and number < self.deepstack)
            if cut or number in self.observed:
                # before transformers' own hooks that collect hidden states
                handles.append(
                    layer.register_forward_hook(
                        partial(self.leave_layer, number), prepend=True, with_kwargs=True
                    )
                )

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
        """Refuse to train layers that would run again in the backward pass and ask the policies a second time."""
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
        """Before layer ``number``: record its rows, give it the mask and positions it needs."""
        under_way = current_forward(self.session)
        call = under_way or kwargs.get(RESUME)
        if call is None or call.probing:
            return None
        hidden: torch.Tensor = args[0]
        call.positions = None  # stock code has made its rotary embeddings by now
        cache: Cache | None = cache_of(kwargs)
        modulated = number in self.modulated
        if call.rows is not None:
            call.layer_rows.append(call.rows)
            if cache is not None and modulated:
                wrap(cache, number)
            if not _grows(cache, number):
                spare_slots(cache, number, call.rows, trimmed=number in self.eviction.layers)
        layer = _pruned_layer(cache, number)
        call.observed = {"hidden": hidden, "layer": layer}
        if (modulated or (self.sites and call.rows is not None)) and not _grows(cache, number):
            stored = getattr(cache, "layers", ())[number : number + 1]
            if stored and is_static(stored[0]):
                call.observed["rows"] = stored_rows(stored[0]) + hidden.shape[1]
        changed: dict[str, Any] = {}
        if under_way is None:
            kwargs = {name: x for name, x in kwargs.items() if name != RESUME}
        if number == 0:
            call.first = _key(call.entered, first_layer(cache))
        if not self._stock_fits(call, number, layer, cache):
            key = (self.kinds[number], *_key(call.rows, layer))
            if key not in call.fitted:
                call.fitted[key] = self._fit(call, number, hidden, layer, first_layer(cache), kwargs)
            changed = call.fitted[key]
        if modulated:
            call.observed["mask"] = {**kwargs, **changed}.get("attention_mask")
        if modulated and (under_way is None or runs_again(module)):
            changed = {**changed, RESUME: replace(call)}
        return (args, {**kwargs, **changed}) if changed or under_way is None else None

    def _stock_fits(
        self, call: ForwardCall, number: int, layer: PrunedLayer | None, cache: Cache | None
    ) -> bool:
        """Whether what stock code made for all layers of one kind fits layer ``number``."""
        if self.kinds[number] in STATES:
            return call.rows is call.entered
        if _key(call.rows, layer) != call.first:
            return False
        like = self.like[number]
        return like in (0, number) or _key(call.rows, _pruned_layer(cache, like)) == call.first

    def _fit(
        self,
        call: ForwardCall,
        number: int,
        hidden: torch.Tensor,
        layer: PrunedLayer | None,
        first: PrunedLayer | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Attention mask, position ids and rotary embeddings for this call's rows after those of layer ``number``."""
        shifts = [x.shift for x in (first, layer) if x is not None and x.shift is not None]
        # those of a decoding step were made for layer 0, and fit all layers if none was renumbered
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
            mask = self._mask(call, number, hidden, layer, cache_of(kwargs), mask)
        else:
            mask = slots_of(slots, layer, first)
        if mask is not None:
            mask = mask.to(hidden.device)
        if not moved:
            return {"attention_mask": mask}
        return {
            "attention_mask": mask,
            "position_ids": None,  # only the rotary embeddings use them, see `Decoder.place`
            "position_embeddings": self._rotary(number, hidden, places),
        }

    def _rotary(self, number: int, hidden: torch.Tensor, places: torch.Tensor | None) -> Any:
        """Rotary embeddings of these positions; some decoders have different ones for each kind of layer."""
        rotary = self.decoder.rotary_emb
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            return rotary(hidden, places, self.kinds[number])
        return rotary(hidden, places)

    def _mask(
        self,
        call: ForwardCall,
        number: int,
        hidden: torch.Tensor,
        layer: PrunedLayer | None,
        past: Cache | None,
        given: Any,
    ) -> torch.Tensor | None:
        """The mask of layer ``number``; ``given`` is what stock code made for the first layer of its kind."""
        kind, config = self.kinds[number], self.decoder.config
        if kind in STATES and call.rows is not None:
            return layer_mask(config, kind, hidden, call.rows.mask, None, None)
        count = hidden.shape[1]
        # a stock layer may hold tokens too, from earlier turns without an image
        stored = past.layers[number] if past is not None and number < len(past.layers) else DynamicLayer()
        logical = int(stored.get_seq_length())
        if self._needs_no_mask(call, number, layer, given, count):
            return None
        now = None if call.rows is None else call.rows.mask
        if call.rows is None and call.mask is not None:
            now = call.mask[:, logical:].bool()
        mask = join_masks(past_mask(layer, call.mask, logical), now, logical, count)
        cache = None if past is None else Cache(layers=[stored])
        mask = None if mask is None else mask.to(hidden.device)
        return layer_mask(config, kind, hidden, mask, cache, None)

    def _needs_no_mask(
        self, call: ForwardCall, number: int, layer: PrunedLayer | None, given: Any, count: int
    ) -> bool:
        """Whether stock code would make no mask, known without asking the device once more whether there is padding.

        It asked for layer 0, and made none: so no row there is masked out, and what layer ``number`` holds are some of
        these and no fill. A single row needs no mask then, nor do the rows of a prompt that nothing comes before.
        """
        if given is not None or self.kinds[number] != FULL or self.like[number] != 0 or call.owner is None:
            return False
        if 0 in self.eviction.layers or (call.rows is not None and call.rows.valid is not None):
            return False
        if layer is not None and (layer.filled or is_static(layer)):
            return False
        return count == 1 or layer is None or layer.physical == 0

    def leave_layer(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """After layer ``number`` of a prefill: ask the policies, drop rows."""
        call = current_forward(self.session)
        if call is None or call.probing or call.rows is None:
            return None
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        home = call.rows.order.device
        rows = call.rows.to(hidden.device)
        visual = rows.visual
        if visual is None:
            return None
        gone: torch.Tensor | None = None
        closed_up: torch.Tensor | None = None
        left = self._left(call, number) if number in self.pruned else None
        merged = hidden
        for policy, budget in self.pruned.get(number, []):  # all see the layer before any cut
            view = self._view(call, rows, visual, policy, budget, number, hidden)
            view.left = None if left is None else to_device(left, hidden.device)
            if policy.reads_ahead:
                view.next_attention = partial(self._next_attention, call, number, hidden, kwargs)
            keep = policy.prefill(view)
            if isinstance(keep, tuple):
                keep, merged = keep
            rows.carry.update(view.carry)
            call.rows.carry.update({name: x.to(home) for name, x in view.carry.items()})
            if keep is not None:
                dropped = visual & ~keep
                gone = dropped if gone is None else gone | dropped
                if policy.positions == "compact":
                    closed_up = dropped if closed_up is None else closed_up | dropped
        hidden = merged
        for policy, budget in self.observed.get(number, []):
            scores = policy.observe(self._view(call, rows, visual, policy, budget, number, hidden))
            if scores is not None:
                call.scores[number, id(policy)] = scores.to(home)
        if call.deepstack is not None:
            hidden = call.deepstack.add(number, hidden)
        if number in self.pruned:
            gone = torch.zeros_like(visual) if gone is None else gone
            hidden = self._drop(call, number, rows, visual, hidden, gone, closed_up, left)
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
        initial, target = self._target(call, policy, budget, visual)
        return PrefillView(
            layer=number,
            depth=self.depth,
            hidden=hidden,
            visual=visual,
            valid=rows.mask,
            initial=initial.to(hidden.device),
            target=target.to(hidden.device),
            attention=call.observed.get("attention"),
            carry=dict(rows.carry),
            norm=lambda x: self.decoder.norm(x).to(x.device),
            unpadded=partial(self._unpadded, rows),
            input=call.observed["hidden"].to(hidden.device),
            most_text=call.text_width,
        )

    def _unpadded(self, rows: Rows, key: torch.Tensor) -> torch.Tensor:
        """Rotate keys ``(batch, heads, rows, head_dim)`` back by the padding that their positions count."""
        padding = rows.padding
        if padding is None:
            return key
        cos, sin = (x[:, None] for x in self.decoder.rotary_emb(key, padding[:, None]))
        turned, rest = key.split([cos.shape[-1], key.shape[-1] - cos.shape[-1]], -1)
        first, second = turned.chunk(2, -1)
        return torch.cat([turned * cos + torch.cat([second, -first], -1) * sin, rest], -1)

    def _next_attention(
        self, call: ForwardCall, number: int, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> AttentionView:
        """The attention inputs of layer ``number + 1`` if all rows ``hidden`` of layer ``number`` went on."""
        if call.rows is None:
            raise RuntimeError(f"layer {number} is not in a prefill, so nothing is cut after it")
        layer, cache, home = self.layers[number + 1], cache_of(kwargs), hidden.device
        if call.deepstack is not None:
            hidden = call.deepstack.foreseen(number, hidden)
        weights = next(layer.parameters()).device
        there = home if weights.type == "meta" else weights  # accelerate loads weights that are on disk
        held = next(iter(getattr(cache, "layers", ())[number + 1 : number + 2]), None)
        pruned, positions = _pruned_layer(cache, number + 1), call.rows.positions
        if pruned is not None and pruned.shift is not None:
            positions = positions - pruned.shift[:, None]
        _, places = stream.split_positions(positions.to(home))
        rotary = tuple(x.to(there) for x in self.decoder.rotary_emb(hidden, places))
        here, call.observed, call.looking = call.observed, {"layer": pruned}, True
        try:
            look_ahead(layer, hidden.to(there), rotary, held)
            seen: AttentionView = call.observed["attention"]
        finally:
            call.observed, call.looking = here, False
        tensors: dict[str, Any] = {
            name: x.to(home) for name, x in vars(seen).items() if isinstance(x, torch.Tensor)
        }
        return replace(seen, **tensors)

    def _target(
        self, call: ForwardCall, policy: Policy, budget: Budget, visual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Visual tokens that entered layer 0, and how many the budget keeps in the end: two int64 ``(batch,)``."""
        if id(policy) in call.targets:
            return call.targets[id(policy)]
        entered = call.entered.visual if call.entered is not None else None
        initial = visual.sum(-1) if entered is None else entered.sum(-1)
        mask = call.image_mask
        dense = initial if mask is None else mask.sum(-1)
        # a policy of several stages keeps a share of all tokens, not of what its own encode stage left
        call.targets[id(policy)] = initial, budget.of_visual(dense if policy.encodes else initial, call)
        return call.targets[id(policy)]

    def _drop(
        self,
        call: ForwardCall,
        number: int,
        rows: Rows,
        visual: torch.Tensor,
        hidden: torch.Tensor,
        gone: torch.Tensor,
        closed_up: torch.Tensor | None,
        left: list[int] | None,
    ) -> torch.Tensor:
        """Remove the rows ``gone`` from ``hidden``, and padding too where sequences differ anyway.

        Positions close up over the rows ``closed_up``, if any. ``left`` is what `_left` returns.
        """
        live = ~gone
        if rows.mask is not None and len(hidden) > 1:
            live = live & rows.mask
        if left is not None:
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
                f"Of a prompt of this call nothing is left after decoder layer {number}: it has images alone, and "
                f"{names} drops all visual tokens there. Add text to the prompt, or choose a policy that keeps some."
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
        """Visual tokens of each sequence that are left after layer ``number``; ``None`` if only the device knows."""
        (policy, budget), *others = self.pruned[number]
        if others or call.unknown_features or type(policy).left is Policy.left:
            return None
        if not call.accounted:
            return None
        entered, counts = call.count().visual, []
        for here, now, spans in zip(entered, call.left or entered, call.spans_by_sequence(), strict=True):
            dense = sum(span.rows for span in spans)
            target = budget.of_prompt(dense if policy.encodes else here, [span.tiles for span in spans])
            plain = [span.plain for span in spans if span.plain is not None]
            tiles = plain if len(plain) == len(spans) else []
            left = policy.left(number, self.depth, here, target, tiles) if here else 0
            if left is None:
                return None
            counts.append(min(left, now))
        return counts

    def evict(self, call: ForwardCall, cache: Cache, layer_rows: list[Rows], final: Rows) -> list[Rows]:
        """After a prefill, let policies drop rows of the cache; returns the rows that each layer holds now."""
        if not self.eviction or final.visual is None:
            return list(layer_rows)
        policies = {id(p): (p, b) for entries in self.eviction.layers.values() for p, b in entries}
        targets = {key: self._target(call, p, b, final.visual)[1] for key, (p, b) in policies.items()}
        return self.eviction.after_prefill(call, cache, layer_rows, final, targets)


def _pruned_layer(cache: Cache | None, number: int) -> PrunedLayer | None:
    stored = getattr(cache, "layers", ())[number : number + 1]
    if not stored or type(stored[0]) is DynamicLayer:  # instances of abstract classes take longer to tell
        return None
    return stored[0] if isinstance(stored[0], PrunedLayer) else None


def _grows(cache: Cache | None, number: int) -> bool:
    """Whether a cache layer is, or wraps, the plain kind that grows: it has no slots to spare or to count."""
    stored = getattr(cache, "layers", ())[number : number + 1]
    return bool(stored) and type(getattr(stored[0], "inner", stored[0])) is DynamicLayer


def _key(rows: Rows | None, layer: PrunedLayer | None) -> tuple[int, int]:
    """Layers with equal keys can share mask and positions."""
    return (0 if rows is None else id(rows), -1 if layer is None else layer.like)
