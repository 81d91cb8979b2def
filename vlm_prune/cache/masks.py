"""Attention masks of a pruned sequence, in the two forms that stock code uses.

*Padding masks* ``(batch, tokens)`` say which tokens exist; processors make them, and stock decoders turn them into the
other form. *Slot masks* ``(batch, 1, queries, slots)`` say what each query may attend to. ``generate`` makes these
itself for static caches, from the padding mask and the first cache layer, before a pruned model sees the call; where a
decoder has several kinds of layers, it makes a dict of one for each. Some models make such a dict themselves, before
their decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache

from ..errors import UnsupportedCallError
from .storage import has_rows, is_sliding, is_static, stored_rows


class Held(Protocol):
    """What masks must know about a pruned cache layer, see `layers.PrunedLayer`."""

    missing: int
    seen: torch.Tensor | None
    seen_slots: tuple[torch.Tensor, torch.Tensor] | None

    @property
    def slots(self) -> int:
        """The number of slots of a static layer."""


def is_prepared(mask: Any) -> bool:
    """Whether a mask says for each query what it may attend to, in any form that stock code passes to a decoder."""
    return isinstance(mask, dict) or (isinstance(mask, torch.Tensor) and mask.dim() == 4)


def slot_mask(mask: Any, cache: Cache | None) -> torch.Tensor | None:
    """``mask`` if it is the slot mask that ``generate`` makes for a static cache of full attention, else ``None``."""
    if cache is None or not cache.layers or not all(is_static(x) and not is_sliding(x) for x in cache.layers):
        return None
    if isinstance(mask, dict) and set(mask) == {"full_attention"}:
        mask = mask["full_attention"]
    return mask if isinstance(mask, torch.Tensor) and mask.dim() == 4 else None


def padding_mask(mask: Any, cache: Cache | None, blocks: bool = False) -> torch.Tensor | None:
    """The padding mask ``(batch, tokens)`` of a call, also where slot masks were made from it; ``None`` if all exist.

    ``blocks`` says that these may also let tokens of one block attend to each other.

    Raises:
        UnsupportedCallError: dropped tokens cannot be removed from this mask.
    """
    rows = [layer for layer in cache.layers if has_rows(layer)] if cache is not None else []
    if is_prepared(mask) and rows and is_static(rows[0]):
        return _from_slots(mask, rows, blocks)
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        form = f"a {mask.dim()}-D tensor" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        raise UnsupportedCallError(
            f"attention_mask is {form}: a pruned model needs the 2-D padding mask (batch, length) that processors "
            "return, because dropped tokens must be removed from it."
        )
    return mask


def _from_slots(mask: Any, layers: list[Any], blocks: bool) -> torch.Tensor | None:
    """The padding mask that slot masks were made from for these static cache ``layers``."""
    masks = list(mask.values()) if isinstance(mask, dict) else [mask]
    slots = [x for x in masks if isinstance(x, torch.Tensor) and x.dim() == 4]
    # full attention shows all padding; a window, as far as any of its queries reaches
    full = [layer for layer in layers if not is_sliding(layer)]
    for layer in (*full[:1], *layers[:1]):
        for x in slots:
            width, offset = layer.get_mask_sizes(x.shape[2])
            if x.shape[3] == int(width):
                return _padding(x, layer, int(offset), blocks or layer.is_sliding)
    return next((x for x in masks if isinstance(x, torch.Tensor) and x.dim() == 2), None)


def _padding(slots: torch.Tensor, layer: Any, offset: int, blocks: bool) -> torch.Tensor:
    allowed = _allowed(slots)[:, 0]
    missing, queries = int(getattr(layer, "missing", 0)), slots.shape[2]
    past = stored_rows(layer) - (offset - missing)
    exists = allowed.any(1)[:, : past + queries]
    query = torch.arange(past, past + queries, device=slots.device)
    causal = torch.arange(slots.shape[3], device=slots.device) <= query[:, None]
    made = causal & torch.nn.functional.pad(exists, (0, slots.shape[3] - exists.shape[1]))[:, None]
    if not blocks and not torch.equal(made, allowed):
        raise UnsupportedCallError(
            "attention_mask is a 4-D tensor that hides more than the future and padding: a pruned model needs the 2-D "
            "padding mask (batch, length) that processors return, because dropped tokens must be removed from it."
        )
    # the cache describes the rows that it holds; columns of tokens missing from it are never read
    return torch.nn.functional.pad(exists, (offset, 0), value=True)


def _allowed(slots: torch.Tensor) -> torch.Tensor:
    return slots if slots.dtype == torch.bool else slots == 0


def slots_of(slots: torch.Tensor, layer: Held, first: Held | None) -> torch.Tensor:
    """The slot mask of one static cache layer, from the one that was made for the ``first`` layer by the caller.

    Slots filled in prefill are described by the layer itself, those after them by the caller. Only tensors are
    involved, so that ``torch.compile`` makes one graph for all prompts.
    """
    pad = torch.nn.functional.pad
    free: Any = True if slots.dtype == torch.bool else 0.0
    blocked: Any = False if slots.dtype == torch.bool else torch.finfo(slots.dtype).min
    moved = layer.missing - (first.missing if first is not None else 0)
    slots = pad(slots, (0, layer.slots - slots.shape[3] + moved), value=blocked)
    slots = pad(slots, (-moved, 0), value=free)  # where more is left than of the first, it all exists
    seen = layer.seen_slots
    if seen is None:
        return slots
    exists = seen[1] if slots.dtype == torch.bool else torch.where(seen[1], 0.0, blocked).to(slots.dtype)
    return torch.where(seen[0], exists[:, None, None], slots)


def past_mask(layer: Held | None, mask: torch.Tensor | None, logical: int) -> torch.Tensor | None:
    """Which of a layer's first ``logical`` tokens may be attended: bool ``(batch, logical)``, ``None`` if all.

    ``mask`` is the caller's; it applies to a stock layer, and after the tokens that the layer describes itself.
    """
    if not logical:
        return None
    seen = layer.seen if layer is not None else None
    if seen is None:
        return None if mask is None else mask[:, :logical].bool()
    if mask is None:
        return torch.nn.functional.pad(seen, (0, logical - seen.shape[1]), value=True)
    return torch.cat([seen, mask[:, seen.shape[1] : logical].bool()], 1)


def behind(seen: torch.Tensor, mask: torch.Tensor | None, total: Callable[[], int]) -> torch.Tensor:
    """A padding mask of ``total()`` tokens: what a layer has ``seen``, and what the caller's mask says after it."""
    if mask is not None:
        return torch.cat([seen, mask[:, seen.shape[1] :].bool()], 1)
    return torch.nn.functional.pad(seen, (0, total() - seen.shape[1]), value=True)


def join_masks(
    past: torch.Tensor | None, now: torch.Tensor | None, logical: int, new: int
) -> torch.Tensor | None:
    """One mask of ``logical`` past and ``new`` present tokens, where ``None`` means all True."""
    if (past is None and now is None) or not logical:
        return now
    if past is None:
        past = now.new_ones(len(now), logical)  # type: ignore[union-attr, arg-type]
    if now is None:
        now = past.new_ones(len(past), new)
    return torch.cat([past, now], 1)
