"""Plain attention for CPU training, in bfloat16 where the processor multiplies it, faster than the stock functions.

The stock eager function goes through float32 and the fused one has a slow backward pass on CPU. This one is
used in training only; the shipped models never name it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

NAME = "tiny_plain"

NATIVE_BF16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether this processor multiplies bfloat16; one that does not is some fifty times faster in float32."""


def autocast() -> torch.autocast:
    """The context that all training runs in: bfloat16 where that is fast, else float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=NATIVE_BF16)


def plain_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Softmax attention in bfloat16, or in float32 where the processor lacks the other.

    Args:
        module: the attention module, unused.
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, kv_heads, keys, head_dim)`; heads are repeated to match those of the query.
        value: as `key`.
        attention_mask: additive `(batch, 1, queries, keys)`, or None for full attention.
        scaling: factor on the scores.
        kwargs: what other implementations need, ignored.

    Returns:
        `(batch, queries, heads, head_dim)`, and None for the attention map.
    """
    if NATIVE_BF16:
        query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query * scaling) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores + attention_mask.to(scores.dtype)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def register() -> str:
    """Make the function known to transformers and return the name to put into `attn_implementation`."""
    AttentionInterface.register(NAME, plain_attention)
    return NAME
