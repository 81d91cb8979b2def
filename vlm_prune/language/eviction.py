"""The decode stage: visual rows are evicted from the KV cache after a prefill and at chosen decoding steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..cache.layers import PrunedLayer, evict_rows, stored_index, trim, wrap
from ..cache.masks import past_mask
from ..cache.storage import is_static, read
from ..call.budget import Budget
from ..call.forward_call import ForwardCall
from ..call.rows import Rows
from ..contract.policy import Policy
from ..contract.views import AttentionView, CacheView
from ..errors import PolicyError, UnsupportedCallError

VISUAL = "visual"
Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values ``(batch, kv_heads, rows, head_dim)``."""


class Eviction:
    """The policies of a composition that drop rows of the KV cache.

    ``keyed`` says for each decoder layer whether its cache holds rows, not a state.

    Attributes:
        layers: decoder layer -> the policies that evict from its cache, with their budgets.
        steps: whether any of them also does so while decoding.
        attention: the inputs of the layers' attention in the current decoding step.

    Raises:
        PolicyError: two policies evict from one layer, and one of them chooses by head.
    """

    def __init__(self, keyed: Sequence[bool], policies: Sequence[tuple[Policy, Budget]]):
        self.depth = depth = len(keyed)
        self.layers: dict[int, list[tuple[Policy, Budget]]] = {}
        for policy, budget in policies:
            for layer in filter(keyed.__getitem__, policy.evicted_layers(depth)):
                self.layers.setdefault(layer, []).append((policy, budget))
        for entries in self.layers.values():
            names = [policy.name for policy, _ in entries]
            chooser = next((policy.name for policy, _ in entries if policy.by_head), None)
            if chooser is not None and len(entries) > 1:
                raise PolicyError(
                    f"{' and '.join(names)} drop rows of the same KV cache, and {chooser} chooses them for each head: "
                    "of what both keep, heads would hold different numbers, which a cache cannot. Keep one of them."
                )
        evicting = {id(p): p for entries in self.layers.values() for p, _ in entries}.values()
        self.steps = any(type(p).evicts_at is not Policy.evicts_at for p in evicting)

    def __bool__(self) -> bool:
        return bool(self.layers)

    def check_cache(self, cache: Cache | None) -> None:
        """Raise if rows cannot be evicted from this cache while decoding."""
        if self.steps and cache is not None and any(is_static(layer) for layer in cache.layers):
            raise UnsupportedCallError(
                "This policy drops rows of the KV cache while decoding, and a static cache cannot become shorter. Use "
                "the default cache of generate, or a policy that drops rows after prefill."
            )

    def after_prefill(
        self, call: ForwardCall, cache: Cache, held: list[Rows], final: Rows, targets: dict[int, torch.Tensor]
    ) -> list[Rows]:
        """Ask about the rows of this turn that each layer ``held``; returns the rows that it holds now.

        ``final`` are the rows that reached the last layer, ``targets`` the budget of each policy by its ``id``. Waits
        for the device once, unless all that stay are those that reached the last layer.
        """
        lives: dict[int, torch.Tensor] = {}
        merged: dict[int, Pair] = {}
        reached: dict[int, torch.Tensor] = {}  # layers between two cuts hold the same rows
        trimmed: dict[tuple[int, int], torch.Tensor] = {}
        left = list(held)
        for number, entries in self.layers.items():
            rows, stored = held[number], wrap(cache, number)
            if rows.visual is None:
                continue
            if id(rows) not in reached:
                reached[id(rows)] = _reached(final, rows)
            keys, values = (x[:, :, -rows.count :] for x in read(stored.inner, stored.physical))
            device = keys.device  # of this layer, where the layers of a model are spread over several
            visual, remaining = rows.visual.to(device), reached[id(rows)].to(device)
            mask = None if rows.mask is None else rows.mask.to(device)
            keep: torch.Tensor | None = None
            for policy, _ in entries:
                scores = {
                    layer: x.to(device) for (layer, owner), x in call.scores.items() if owner == id(policy)
                }
                view = CacheView(
                    layer=number,
                    depth=self.depth,
                    visual=visual,
                    valid=mask,
                    remaining=remaining,
                    target=targets[id(policy)].to(device),
                    scores=scores.get(number),
                    all_scores=scores,
                    keys=keys,
                    values=values,
                )
                mine, pair = _apart(policy, view, policy.evict(view))
                keep = _both(keep, mine)
                if pair is not None:  # which the next policy sees, and may merge on
                    merged[number] = keys, values = pair
            if keep is remaining and number not in merged:
                left[number] = final
                if rows is not final:  # even if the longest sequence loses none
                    key = id(rows), stored.physical
                    if key not in trimmed:
                        trimmed[key] = stored_index(rows, final, stored.physical)
                    trim(stored, rows, final, trimmed[key])
            elif keep is not None:
                lives[number] = _live(keep, visual, mask).to(rows.order.device)
            if self.steps:
                stored.state |= {_target_of(p): targets[id(p)] for p, _ in entries}
        self._remember(cache, left)
        for number, counts in zip(lives, _counts(list(lives.values())), strict=True):
            live, rows, stored = lives[number], held[number], wrap(cache, number)
            if min(counts) == rows.count and number not in merged:
                continue
            left[number] = evict_rows(stored, rows, live, counts, merged.get(number))
        return left

    def _remember(self, cache: Cache, held: Sequence[Rows]) -> None:
        """Mark the visual rows of each layer, for later decoding steps."""
        for number in self.layers if self.steps else ():
            rows, stored = held[number], wrap(cache, number)
            if rows.visual is not None:
                past = stored.marks.get(VISUAL, rows.visual[:, :0])
                past = torch.nn.functional.pad(past, (0, stored.physical - rows.count - past.shape[1]))
                stored.marks[VISUAL] = torch.cat([past, rows.visual], 1)

    def after_step(self, call: ForwardCall, cache: Cache) -> None:
        """Ask the policies that evict after this decoding step. Waits for the device once, if there are any."""
        lives: dict[int, torch.Tensor] = {}
        for number, entries in self.layers.items():
            stored = cache.layers[number] if number < len(cache.layers) else None
            if not isinstance(stored, PrunedLayer) or VISUAL not in stored.marks:
                continue
            step = stored.steps
            asked = [policy for policy, _ in entries if policy.evicts_at(step)]
            if not asked:
                continue
            physical = stored.physical
            visual = stored.marks[VISUAL]
            visual = torch.nn.functional.pad(visual, (0, physical - visual.shape[1]))
            mask = past_mask(stored, call.mask, stored.logical)
            keys, values = read(stored.inner, physical)
            keep: torch.Tensor | None = None
            for policy in asked:
                view = CacheView(
                    layer=number,
                    depth=self.depth,
                    visual=visual,
                    valid=None if mask is None else mask[:, stored.missing :],
                    remaining=torch.ones_like(visual),
                    target=stored.state[_target_of(policy)],
                    scores=None,
                    keys=keys,
                    values=values,
                    step=step,
                    attention=call.step_attention.get(number),
                )
                keep = _both(keep, _checked(policy, view, policy.evict(view)))
            if keep is not None:
                stored.marks[VISUAL] = visual
                lives[number] = _live(keep, visual, None)
        for (number, live), counts in zip(lives.items(), _counts(list(lives.values())), strict=True):
            if min(counts) < live.shape[-1]:
                cache.layers[number].drop(live, max(counts), min(counts) < max(counts), call.mask)
                cache.layers[number].like = number

    def see(self, call: ForwardCall, number: int, attention: AttentionView) -> None:
        """Record the inputs of a layer's attention in a decoding step, if its policies may be asked after it."""
        if self.steps and number in self.layers:
            call.step_attention[number] = attention


def _target_of(policy: Policy) -> str:
    return f"{policy.name}.target"


def _reached(final: Rows, rows: Rows) -> torch.Tensor:
    """Which of ``rows`` hold a token that ``final`` has too: bool ``(batch, rows)``."""
    held = torch.ones_like(final.order, dtype=torch.bool) if final.valid is None else final.valid
    there = held.new_zeros(len(held), final.length).scatter(1, final.order, held)
    return there.gather(1, rows.order)


def _both(keep: torch.Tensor | None, answer: torch.Tensor | None) -> torch.Tensor | None:
    """What two policies keep; ``None`` keeps all."""
    if keep is None or answer is None:
        return answer if keep is None else keep
    if keep.dim() != answer.dim():
        keep, answer = (x[:, None] if x.dim() == 2 else x for x in (keep, answer))
    return keep & answer


def _apart(policy: Policy, view: CacheView, answer: Any) -> tuple[torch.Tensor | None, Pair | None]:
    """A keep mask, checked, and the keys and values of the rows that stay, where a policy merges."""
    if not isinstance(answer, tuple):
        return _checked(policy, view, answer), None
    given, needed = [_shape(x) for x in answer], [tuple(x.shape) for x in (view.keys, view.values)]
    if given[0] is None or given[1:] != needed:
        raise PolicyError(
            f"{policy.name}.evict returned a tuple of shapes {given}: a keep mask, and merged rows of keys and values "
            f"{needed} are needed."
        )
    keep, keys, values = answer
    return _checked(policy, view, keep), (keys, values)


def _shape(x: Any) -> tuple[int, ...] | None:
    return tuple(x.shape) if isinstance(x, torch.Tensor) else None


def _checked(policy: Policy, view: CacheView, keep: Any) -> torch.Tensor | None:
    shapes = [tuple(view.visual.shape), tuple(view.keys.shape[:3])]
    if keep is None or (
        isinstance(keep, torch.Tensor) and keep.dtype == torch.bool and tuple(keep.shape) in shapes
    ):
        return keep
    given = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, torch.Tensor) else type(keep).__name__
    raise PolicyError(
        f"{policy.name}.evict returned {given}: a bool keep mask {shapes[0]} is needed, or {shapes[1]} by head."
    )


def _live(keep: torch.Tensor, visual: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Rows that stay: text always does; padding is dropped where sequences may differ anyway."""
    by_head = keep.dim() == 3
    live = keep | (~visual[:, None] if by_head else ~visual)
    if mask is None or len(mask) == 1:
        return live
    return live & (mask[:, None] if by_head else mask)


def _counts(lives: list[torch.Tensor]) -> list[list[int]]:
    """Rows that stay in each sequence of each layer. Waits for the device once. Raises if heads of one differ."""
    if not lives:
        return []
    found = [live.sum(-1) if live.dim() == 3 else live.sum(-1, keepdim=True) for live in lives]
    numbers = torch.stack([torch.stack([n.amin(-1), n.amax(-1)]) for n in found]).tolist()
    for least, most in numbers:
        if least != most:
            raise PolicyError(
                "A policy keeps different numbers of rows in the heads of one layer, which a cache cannot hold: keep "
                "equally many in each."
            )
    return [most for _, most in numbers]
