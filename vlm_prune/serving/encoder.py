"""The encode stage inside a vLLM model: the engine's `Encoder`, fed by vLLM's modules.

Policies see the same views, and the same code cuts, as in a pruned Hugging Face model. What differs is where queries and
keys are read, that a tower returns a tensor, and that the kept rows leave without holes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .. import stream
from ..adapters.base import Tower
from ..budget import Budget
from ..errors import UnsupportedCallError
from ..policies.base import Policy
from ..tower import Encoder

Gather = Callable[[torch.Tensor], torch.Tensor]
"""Joins the last dimension of a tensor over the tensor-parallel ranks."""


class _NoReceipt:
    """vLLM reports through its own metrics: the receipts of the engine go nowhere."""

    def new_receipt(self, *args: Any) -> Any:
        return SimpleNamespace(record_tower=lambda *args: None)

    def publish(self, receipt: Any) -> None:
        pass


class ServedEncoder(Encoder):
    """Encoder hooks on the modules of a vLLM model.

    Args:
        tower: vLLM's modules; ``attentions`` are its encoder attention modules, called with query, key and value
            ``(tiles, tokens, heads * head size)``.
        stack: the module that runs the tower's layers and returns their last hidden states.
        projector: as in `adapters.base.Anatomy`.
        heads: of a tower layer, over all tensor-parallel ranks.
        gather: used where a rank holds a share of the heads.
        policy: of the encode stage.
    """

    def __init__(
        self, tower: Tower, stack: nn.Module, projector: nn.Module, heads: int, gather: Gather, policy: Policy
    ):
        super().__init__(tower, projector, [policy], Budget(ratio=1.0), _NoReceipt())
        self.heads, self.gather = heads, gather
        self.active = False
        handles: list[Any] = []
        handles.append(tower.module.register_forward_pre_hook(self.enter_tower, with_kwargs=True))
        handles.append(stack.register_forward_hook(self.leave_stack, always_call=True))
        for number, layer in enumerate(tower.layers):
            handles.append(layer.register_forward_hook(partial(self.leave_layer, number)))
        for number in range(min(self.asked, default=len(tower.layers)), len(tower.layers)):
            self._watch(tower.attentions[number], number)
        handles.append(projector.register_forward_pre_hook(self.enter_projector))
        handles.append(projector.register_forward_hook(self.leave_projector, always_call=True))

    @contextmanager
    def keeping(self, units: int) -> Iterator[None]:
        """Within the block, the tower keeps this many units of each tile. Outside of it, it is a stock tower."""
        self.active, self.budget = True, Budget(tokens=units)
        try:
            yield
        finally:
            self.active = False

    def enter_tower(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Begin an encode call, inside `keeping` only."""
        return super().enter_tower(module, args, kwargs) if self.active else None

    def leave_stack(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """`leave_tower`, for a module that returns its hidden states as a tensor."""
        if not isinstance(output, torch.Tensor):
            return super().leave_tower(module, args, output)
        box = SimpleNamespace(last_hidden_state=output)
        super().leave_tower(module, args, box)
        return box.last_hidden_state

    def _watch(self, attention: Any, number: int) -> None:
        """Show what an attention module computes with to `see_attention`, and let ragged tiles mask their fill."""
        stock = attention.forward

        def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any, **kwargs: Any) -> Any:
            if not self.active:
                return stock(query, key, value, *more, **kwargs)
            size = attention.head_size
            local = [x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (query, key, value)]
            shown = local
            if number in self.asked and local[0].shape[1] < self.heads:
                # every rank needs the scores of all heads: they have to agree on which tokens stay
                whole = self.gather(torch.stack([query, key, value]))
                shown = list(whole.unflatten(-1, (-1, size)).transpose(2, 3).unbind(0))
            live = self.see_attention(number, *shown, attention.scale)
            if live is None:
                return stock(query, key, value, *more, **kwargs)
            output = nn.functional.scaled_dot_product_attention(
                *local, attn_mask=live[:, None, None], scale=attention.scale
            )
            return output.transpose(1, 2).flatten(2)

        attention.forward = forward


def live_rows(embeds: torch.Tensor, tokens: int) -> torch.Tensor:
    """The rows that are no holes: ``(tiles, rows, channels)`` -> ``(tiles, tokens, channels)``.

    Raises:
        UnsupportedCallError: a tile has another number of them than the prompt has room for.
    """
    live = ~stream.find_holes(embeds)
    counts = set(live.sum(-1).tolist())
    if counts != {tokens}:
        raise UnsupportedCallError(
            f"The policy kept {sorted(counts)} tokens of the tiles of a batch where the prompt has room for {tokens} each. "
            "In vLLM a policy has to keep exactly its budget; let the Hugging Face model decide instead and send its "
            "embeddings (vlm_prune.serving.image_embeds). If tokens became NaN, load the model in bfloat16."
        )
    return stream.compact(embeds, stream.live_order(live, tokens))
