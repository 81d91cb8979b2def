"""Scores that several papers share, computed from one layer's attention without ever building the N x N map."""

from __future__ import annotations

import torch

from .views import AttentionView


def _softmax_over_tokens(logits: torch.Tensor, view: AttentionView) -> torch.Tensor:
    """Softmax of ``(batch, heads, tokens)`` over real tokens, averaged over heads, CLS dropped."""
    if view.valid is not None:
        logits = logits.masked_fill(~view.valid[:, None], -torch.inf)
    mean = logits.softmax(-1).mean(1)
    return mean[:, 1:] if view.has_cls else mean


def global_attention(view: AttentionView, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Attention that CLS pays to each patch, averaged over heads: ``(batch, patches)``.

    The softmax runs over CLS and patches, the CLS column is dropped afterwards, so a row sums to less than 1.
    A tower without CLS is asked with its mean query instead. ``dtype`` defaults to fp32, or fp64 for fp64 inputs.
    """
    dtype = dtype or torch.promote_types(view.query.dtype, torch.float32)
    if view.has_cls:
        query = view.query[:, :, 0].to(dtype)
    elif view.valid is None:
        query = view.query.to(dtype).mean(2)
    else:
        real = view.valid[:, None, :, None]
        query = (view.query.to(dtype) * real).sum(2) / real.sum(2)
    return _softmax_over_tokens(_rows(query * view.scaling, view.key.to(dtype)), view)


def global_similarity(view: AttentionView, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Softmax of the dot products of CLS's value with each patch's, averaged over heads: ``(batch, patches)``.

    No scaling by the head size, and CLS takes part in the softmax (both as in FlowCut's released CLIP code).
    """
    dtype = dtype or torch.promote_types(view.value.dtype, torch.float32)
    value = view.value.to(dtype)
    return _softmax_over_tokens(_rows(value[:, :, 0], value), view)


def _rows(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Dot products of one query per head ``(batch, heads, dim)`` with all keys: ``(batch, heads, tokens)``."""
    return (key @ query.unsqueeze(-1)).squeeze(-1)
