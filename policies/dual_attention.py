"""Which visual tokens the text attends to: MustDrop's filter inside the decoder, and a budgeted form of it.

Follows the released ``modelling_sparse_llama.py`` (``dual_attention_filter``) and ``clip_encoder.py`` (key set).
"""

from __future__ import annotations

import torch

from .scores import top_mask

PUBLISHED_THRESHOLDS = {
    "textvqa-192": (0.001, 0.001),
    "textvqa-128": (0.0012, 0.001),
    "textvqa-64": (0.011, 0.01),
    "vizwiz-64": (0.005, 0.001),
}
"""(global, individual) thresholds in the released scripts, for LLaVA-1.5-7B and its 576 tokens."""


def key_set(attention: torch.Tensor, ratio: float, alive: torch.Tensor | None = None) -> torch.Tensor:
    """The ``ceil(ratio x tokens)`` tokens that CLS attends to most: bool like ``attention`` ``(batch, tokens)``.

    ``alive`` (bool) marks real tokens; each row counts its own.
    """
    alive = torch.ones_like(attention, dtype=torch.bool) if alive is None else alive
    return top_mask(attention, torch.ceil(alive.sum(-1).double() * ratio).long(), alive)


def dual_attention_filter(
    total: torch.Tensor, peak: torch.Tensor, visual: torch.Tensor, global_share: float, individual: float
) -> torch.Tensor:
    """Tokens that the text attends to, together or by one word: bool ``(batch, rows)``.

    A token is dropped if its share of all ``total`` attention on visual rows is below ``global_share`` and its ``peak``
    is below ``individual``. Official: ``dual_attention_filter``.
    """
    mass = total.masked_fill(~visual, 0).sum(-1, keepdim=True)
    return visual & ~((total < global_share * mass) & (peak < individual))


def scaled_layers(depth: int) -> list[int]:
    """The released cuts, after layers 2, 6, 10 and 14 of 32, at the same relative depth of another decoder."""
    return sorted({layer for k in (2, 6, 10, 14) if (layer := int(k * depth / 32 + 0.5)) < depth})


def step_count(initial: torch.Tensor, target: torch.Tensor, step: int, steps: int) -> torch.Tensor:
    """Tokens left after ``step`` of ``steps`` cuts that each keep the same share: int64 like ``initial``.

    The last step leaves exactly ``target`` (all, where that is more than there are).
    """
    share = (target.double() / initial.clamp(min=1)).clamp(max=1)
    return (initial * share ** (step / steps)).round().long()


def check_thresholds(thresholds: object) -> None:
    """Raise ValueError unless given ``None``, a name of `PUBLISHED_THRESHOLDS`, or two numbers of at least 0."""
    if isinstance(thresholds, str) and thresholds not in PUBLISHED_THRESHOLDS:
        known = ", ".join(PUBLISHED_THRESHOLDS)
        raise ValueError(
            f"thresholds={thresholds!r}: published are {known}; or give the pair (global, individual)"
        )
    if thresholds is None or isinstance(thresholds, str):
        return
    pair = thresholds if isinstance(thresholds, tuple) else ()
    if len(pair) != 2 or not all(isinstance(x, int | float) and x >= 0 for x in pair):
        raise ValueError(f"thresholds={thresholds!r}: give (global, individual), two numbers of at least 0")
