"""Scores that several papers share, computed from one layer's attention without building the N x N map."""

from __future__ import annotations

import torch

from .. import kernels
from ..contract.keep import top_mask
from ..contract.views import AttentionView
from ..kernels import numbers

__all__ = [
    "attention_mass",
    "cosine_distance",
    "global_attention",
    "global_similarity",
    "last_row",
    "top_mask",
]


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for scores: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _softmax_over_tokens(logits: torch.Tensor, view: AttentionView) -> torch.Tensor:
    """Softmax of ``(batch, heads, tokens)`` over real tokens, averaged over heads, CLS dropped."""
    if view.valid is not None:
        logits = logits.masked_fill(~view.valid[:, None], -torch.inf)
    mean = logits.softmax(-1).mean(1)
    return mean[:, 1:] if view.has_cls else mean


def global_attention(view: AttentionView, dtype: torch.dtype | None = None) -> torch.Tensor:
    """CLS attention: from CLS to each patch, averaged over heads: ``(batch, patches)``.

    The softmax runs over CLS and patches, and the CLS column is dropped afterwards, so a row sums to less than 1.
    A tower without CLS uses its mean query instead. ``dtype`` defaults to fp32, or fp64 for fp64 inputs.
    """
    return _softmax_over_tokens(global_logits(view, dtype or exact_dtype(view.query.dtype)), view)


def global_logits(view: AttentionView, dtype: torch.dtype) -> torch.Tensor:
    """The logits of `global_attention`: ``(batch, heads, tokens)`` in ``dtype``, not masked."""
    if view.has_cls:
        query = view.query[:, :, 0].to(dtype)
    elif view.valid is None:
        query = view.query.to(dtype).mean(2)
    else:
        real = view.valid[:, None, :, None]
        query = (view.query.to(dtype) * real).sum(2) / real.sum(2)
    return _rows(query * view.scaling, view.key.to(dtype))


def global_similarity(view: AttentionView, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Softmax of the dot products of CLS's value with each patch's, averaged over heads: ``(batch, patches)``.

    No scaling by the head size, and CLS takes part in the softmax (both as in FlowCut's released CLIP code).
    """
    dtype = dtype or torch.promote_types(view.value.dtype, torch.float32)
    value = view.value.to(dtype)
    return _softmax_over_tokens(_rows(value[:, :, 0], value), view)


def last_row(valid: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Each sequence's last real row, bool ``(batch, rows)``.

    ``valid`` ``(batch, rows)`` marks real rows, ``None`` means all; ``like`` gives shape and device.
    """
    number = numbers(like.shape[1] + 1, like.device)[1:]
    if valid is None:
        return (number == like.shape[1]).expand_as(like)
    real = valid * number
    return (real == real.amax(-1, keepdim=True)) & valid


def attention_mass(
    view: AttentionView, voters: torch.Tensor, width: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention from the ``voters`` to each row in a decoder layer: sum and maximum, two ``(batch, rows)``.

    Only the voters' rows of the attention map are computed, some of them at a time. Each is a causal softmax over all
    valid keys, in fp32 or better, averaged over the query heads.

    Args:
        view: ``query`` ``(batch, heads, rows, head_dim)``, ``key`` ``(batch, key heads, keys, head_dim)``, not repeated
            where key heads are shared. The last ``rows`` keys belong to the query rows, earlier ones to earlier turns;
            ``valid`` is ``(batch, keys)`` or ``None``.
        voters: bool ``(batch, rows)``, the query rows. A sequence without voters gets zeros.
        width: an upper bound on the voters of a sequence; ``None`` waits for the device to count them.
    """
    width = max(1, int(voters.sum(-1).max())) if width is None else width
    index = voters.view(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :width]
    votes = voters.gather(1, index)
    return kernels.attention_mass(view.query, view.key, index, votes, view.valid, view.scaling)


def cosine_distance(features: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One minus the cosine of every pair of tokens: ``(batch, tokens, channels)`` -> ``(batch, tokens, tokens)``.

    ``dtype`` defaults to fp32, or fp64 for fp64 inputs. A row of zeros is at distance 1 from all tokens.
    """
    features = features.to(dtype or torch.promote_types(features.dtype, torch.float32))
    unit = features / (features.norm(dim=-1, keepdim=True) + 1e-8)
    return 1.0 - unit @ unit.mT


def _rows(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Dot products of one query per head ``(batch, heads, dim)`` with all keys: ``(batch, heads, tokens)``."""
    return (key @ query.unsqueeze(-1)).squeeze(-1)
