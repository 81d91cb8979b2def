"""What policies look at and edit in the attention of single decoder layers: the observer and editor of their sites."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..cache.layers import PrunedLayer
from ..cache.masks import join_masks, past_mask
from ..call.forward_call import ForwardCall, current_forward
from ..contract.policy import Policy
from ..contract.views import AttentionView, ModulateView
from .eviction import Eviction
from .look_ahead import SeenError


class DecoderAttention:
    """Shows the attention of layers ``pruned`` to their policies, and lets those of layers ``modulated`` edit it.

    ``depth`` is the number of decoder layers, ``session`` what the calls of their model belong to. The attention inputs
    of decoding steps go to ``eviction``.
    """

    def __init__(
        self,
        depth: int,
        pruned: Container[int],
        modulated: Mapping[int, Sequence[Policy]],
        eviction: Eviction,
        session: Any,
    ):
        self.depth, self.pruned, self.modulated = depth, pruned, modulated
        self.eviction, self.session = eviction, session

    def see(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> None:
        """Record the inputs of a layer's attention until its policies are asked.

        Raises:
            SeenError: the call was made only to observe its inputs.
        """
        call = current_forward(self.session)
        if call is None or call.probing:
            return
        if call.rows is not None and not call.looking and layer not in self.pruned:
            return
        key, value = _filled(call, key, value)
        valid = self._valid(call, call.observed.get("layer"), query, key)
        seen = AttentionView(query, key, value, scaling, has_cls=False, valid=valid)
        if call.rows is None:
            self.eviction.see(call, layer, seen)
        else:
            call.observed["attention"] = seen
        if call.looking:
            raise SeenError

    # what policies do depends on values, and their state changes with every token
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def edit(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Let the policies edit the head outputs ``(batch, queries, heads, head_dim)`` of one layer."""
        call = current_forward(self.session)
        if call is None:
            return output
        if call.probing:
            call.text_only[layer] = output[:, -1]
            return output
        stored: PrunedLayer | None = call.observed.get("layer")
        if call.rows is None and (stored is None or "visual" not in stored.marks):
            return output  # no image in this prompt
        key, value = _filled(call, key, value)
        marks = self._marks(call, stored, query, key)
        logit_edits: list[Any] = []
        brings: torch.Tensor | None = None
        if call.rows is not None and call.entered is not None and call.entered.visual is not None:
            bringing = call.entered.visual
            if len(output) > 1:
                brings = call.once("brings", lambda: bringing.any(-1).to(query.device), bringing)
        for policy in self.modulated[layer]:
            view = ModulateView(
                layer=layer,
                depth=self.depth,
                query=query,
                key=key,
                value=value,
                scaling=scaling,
                output=output,
                hidden=call.observed["hidden"].to(query.device) if policy.reads_hidden else None,
                visual=marks["visual"],
                valid=self._valid(call, stored, query, key),
                prefill=call.rows is not None,
                state=stored.state if stored is not None else {},
                carry={name: x for name, x in marks.items() if name != "visual"},
                text_only=call.text_only.get(layer),
                logit_edits=logit_edits,
                brings=brings,
                most_text=call.text_width,
                once=call.once,
            )
            edited = policy.modulate(view)
            output = output if edited is None else edited
            marks.update(view.carry)
        if stored is not None:
            stored.marks = marks
        return output

    def _marks(
        self, call: ForwardCall, stored: PrunedLayer | None, query: torch.Tensor, key: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Facts about each key ``(batch, keys)``: whether it is a visual token, and what the encode stage left."""
        queries, keys = query.shape[2], key.shape[2]
        known, pad = stored.marks if stored is not None else {}, torch.nn.functional.pad
        if call.rows is None:
            return {
                name: call.once(("marks", keys), partial(pad, x, (0, keys - x.shape[1])), x)
                for name, x in known.items()
            }
        rows = call.rows.to(query.device)
        now = dict(rows.carry)
        if rows.visual is not None:
            now["visual"] = rows.visual
        marks: dict[str, torch.Tensor] = {}
        for name in {**known, **now}:
            new = now.get(name)
            if new is not None and keys == queries:  # nothing came before
                marks[name] = new
                continue
            new = known[name].new_zeros(len(known[name]), queries) if new is None else new
            past = known.get(name, new.new_zeros(len(new), 0))
            past = pad(past, (0, keys - queries - past.shape[1]))
            marks[name] = torch.cat([past, new], 1)
        return marks

    def _valid(
        self, call: ForwardCall, stored: PrunedLayer | None, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor | None:
        """Keys of a layer that may be attended, bool ``(batch, keys)``; ``None`` if all may."""
        queries, keys = query.shape[2], key.shape[2]
        missing = stored.missing if stored is not None else 0
        if queries == 1 and call.rows is None and call.observed.get("mask", query) is None:
            return None  # stock code looked, and made no mask
        seen = stored.seen if stored is not None else None
        shared = None if call.rows is None else call.rows.mask
        return call.once(
            ("valid", missing, queries, keys, query.device),
            lambda: self._joined(call, stored, query, queries, keys),
            seen,
            call.mask,
            shared,
        )

    @staticmethod
    def _joined(
        call: ForwardCall, stored: PrunedLayer | None, query: torch.Tensor, queries: int, keys: int
    ) -> torch.Tensor | None:
        missing = stored.missing if stored is not None else 0
        logical = keys - queries + missing
        now = call.rows.mask if call.rows is not None else None
        if call.rows is None and call.mask is not None:
            now = call.mask[:, logical:].bool()
        mask = join_masks(past_mask(stored, call.mask, logical), now, logical, queries)
        return None if mask is None else mask[:, missing:].to(query.device)


def _filled(call: ForwardCall, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values without the empty slots of a static cache."""
    rows = call.observed.get("rows")
    return key[:, :, :rows], value[:, :, :rows]
