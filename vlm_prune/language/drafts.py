"""The first call of assisted decoding: a prompt with drafts of its answer after it.

A policy that acts in the decoder looks at the end of the prompt, and drafts are not part of the prompt. So such a call
is computed in two steps, as without an assistant: the prompt, and then the drafts.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch

_expected: ContextVar[tuple[Any, int] | None] = ContextVar("vlm_prune_drafts", default=None)


def expect_drafts(count: int, owner: Any) -> None:
    """The forward of ``owner`` that begins now has ``count`` drafts after its prompt."""
    if count or _expected.get() is not None:
        _expected.set((owner, count) if count else None)


def take_drafts(owner: Any) -> int:
    """How many drafts the forward of ``owner`` that has just begun contains."""
    found = _expected.get()
    if found is None or found[0] is not owner:
        return 0
    _expected.set(None)
    return found[1]


def split(kwargs: dict[str, Any], count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a decoder for the prompt and for the ``count`` tokens after it."""
    prompt, drafts = dict(kwargs), dict(kwargs)
    for name, dim in (("inputs_embeds", 1), ("position_ids", -1), ("visual_pos_masks", 1)):
        if isinstance(x := kwargs.get(name), torch.Tensor):
            at = x.shape[dim] - count
            prompt[name], drafts[name] = x.narrow(dim, 0, at), x.narrow(dim, at, count)
    prompt["attention_mask"], drafts["attention_mask"] = _split_mask(kwargs.get("attention_mask"), count)
    for name in ("visual_pos_masks", "deepstack_visual_embeds"):
        if name in drafts:
            drafts[name] = None  # no visual tokens after the prompt
    return prompt, drafts


def _split_mask(mask: Any, count: int) -> tuple[Any, Any]:
    if isinstance(mask, dict):
        parts = {name: _split_mask(x, count) for name, x in mask.items()}
        return {name: x[0] for name, x in parts.items()}, {name: x[1] for name, x in parts.items()}
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        return mask[:, :, :-count], mask[:, :, -count:]
    return (None if mask is None else mask[:, :-count]), mask


def join(prompt: Any, drafts: Any) -> Any:
    """The decoder's output for both, from those of the two steps."""
    drafts.last_hidden_state = torch.cat([prompt.last_hidden_state, drafts.last_hidden_state], 1)
    if drafts.hidden_states is not None:
        pairs = zip(prompt.hidden_states, drafts.hidden_states, strict=True)
        drafts.hidden_states = tuple(None if a is None else torch.cat([a, b], 1) for a, b in pairs)
    return drafts
