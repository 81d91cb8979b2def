"""The encode stage inside a vLLM model: our `Encoder`, with hooks on vLLM's modules.

Policies get the same views, and the same code cuts tokens, as in a pruned Hugging Face model. Three things differ:
where queries and keys are read, a tower returns a tensor, and kept rows are returned without holes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..call import stream
from ..contract.policy import Policy
from ..encode.fixed import Encoder
from ..errors import UnsupportedCallError
from .stage import Gather, ServedStage
from .towers import Parts


@dataclass(eq=False)
class _TowerOutput:
    """What `Encoder.leave_tower` expects of a tower: a model output of transformers."""

    last_hidden_state: torch.Tensor


class ServedEncoder(ServedStage, Encoder):
    """Encoder hooks on the modules of a vLLM model; the arguments are those of `ServedStage`."""

    still = False  # a batch mixes tiles of several requests

    def __init__(self, parts: Parts, gather: Gather, policy: Policy):
        super().__init__(parts, gather, policy)
        tower = parts.tower
        tower.module.register_forward_pre_hook(self.enter_tower, with_kwargs=True)
        parts.stack.register_forward_hook(self.leave_stack, always_call=True)
        for number, layer in enumerate(tower.layers):
            layer.register_forward_hook(partial(self.leave_layer, number))
        for number in range(min(self.asked, default=len(tower.layers)), len(tower.layers)):
            self._watch(tower.attentions[number], number)
        parts.projector.register_forward_pre_hook(self.enter_projector)
        parts.projector.register_forward_hook(self.leave_projector, always_call=True)

    def enter_tower(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Begin an encode call, inside `keeping` only."""
        return super().enter_tower(module, args, kwargs) if self.active else None

    def leave_stack(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """`leave_tower`, for a module that returns its hidden states as a tensor."""
        if not isinstance(output, torch.Tensor):
            return super().leave_tower(module, args, output)
        found = _TowerOutput(output)
        super().leave_tower(module, args, found)
        return found.last_hidden_state

    def _watch(self, attention: Any, number: int) -> None:
        """Pass an attention module's queries, keys and values to `see_attention`; mask the padding of ragged tiles."""
        stock = attention.forward

        def forward(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any, **kwargs: Any
        ) -> Any:
            if not self.active:
                return stock(query, key, value, *more, **kwargs)
            states = torch.stack([query, key, value])
            own = states.unflatten(-1, (-1, attention.head_size)).transpose(2, 3)
            seen = self.all_heads(states, attention.head_size) if number in self.asked else own
            live = self.see_attention(number, seen[0], seen[1], seen[2], attention.scale)
            if live is None:
                return stock(query, key, value, *more, **kwargs)
            output = nn.functional.scaled_dot_product_attention(
                own[0], own[1], own[2], attn_mask=live[:, None, None], scale=attention.scale
            )
            return output.transpose(1, 2).flatten(2)

        attention.forward = forward


def live_rows(embeds: torch.Tensor, tokens: int) -> torch.Tensor:
    """The rows without the holes: ``(tiles, rows, channels)`` -> ``(tiles, tokens, channels)``.

    Raises:
        UnsupportedCallError: a tile has more or fewer of them than the prompt has room for.
    """
    live = ~stream.find_holes(embeds)
    check_counts(live.sum(-1).tolist(), tokens)
    return stream.compact(embeds, stream.live_order(live, tokens))


def check_counts(counts: list[int], tokens: int) -> None:
    """Raise unless ``tokens`` were kept of every tile."""
    if set(counts) != {tokens}:
        raise UnsupportedCallError(
            f"The policy kept {sorted(set(counts))} tokens of the tiles of a batch where the prompt has room for "
            f"{tokens} each. In vLLM a policy has to keep exactly its budget; otherwise prune the Hugging Face model, "
            "and send its embeddings (vlm_prune.serving.image_embeds). If tokens became NaN, load the model in "
            "bfloat16."
        )
