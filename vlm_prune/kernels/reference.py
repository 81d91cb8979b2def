"""Every op of this package in plain torch: the ground truth for the kernels, and what runs without a GPU."""

from __future__ import annotations

import math

import torch

from .plans import numbers, planned

CHUNK = 128
"""Rows of the attention map computed at a time."""

Closed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def live_order(live: torch.Tensor, length: int) -> torch.Tensor:
    """Where the rows of the shortened sequence come from: int64 ``(batch, length)``.

    ``live`` is bool ``(batch, full length)``. Live rows keep their order, right-aligned; sequences with fewer than
    ``length`` of them are padded on the left with dead rows, each used once.
    """
    return live.view(torch.uint8).argsort(dim=-1, stable=True)[:, live.shape[1] - length :]


def gather_rows(
    x: torch.Tensor, index: torch.Tensor, valid: torch.Tensor | None = None, fill: float = 0.0
) -> torch.Tensor:
    """See `vlm_prune.kernels.gather_rows`."""
    rows = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    return rows if valid is None else rows.masked_fill(~valid[..., None], fill)


def hole(like: torch.Tensor) -> torch.Tensor:
    """The row that marks a hole, ``(channels,)``, for rows ``(..., channels)``: NaN, then inf and -inf alternating.

    The pattern survives casts, copies, other devices and scaling, and no overflow looks like it.
    """
    channels, dtype, device = like.shape[-1], like.dtype, like.device

    def make() -> torch.Tensor:
        row = torch.full((channels,), torch.inf, dtype=dtype, device=device)
        row[2::2] = -torch.inf
        row[:1] = torch.nan
        return row

    return planned(("hole", channels, dtype, device), make)


def place_rows(
    rows: torch.Tensor, index: torch.Tensor, valid: torch.Tensor | None, length: int, fill: float
) -> torch.Tensor:
    """See `vlm_prune.kernels.place_rows`."""
    other = hole(rows) if math.isnan(fill) else rows.new_full(rows.shape[-1:], fill)
    if valid is not None:
        rows = torch.where(valid[..., None], rows, other)
    full = other.expand(rows.shape[0], length, -1)
    return full.scatter(1, index[..., None].expand_as(rows), rows)


def close_holes(
    x: torch.Tensor,
    live: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    gone: torch.Tensor | None,
    length: int,
    ragged: bool = True,
) -> Closed:
    """See `vlm_prune.kernels.close_holes`."""
    batch = len(x)
    order = live_order(live, length).contiguous()
    kept = live.gather(1, order) if ragged or mask is None else mask.gather(1, order)
    rows = gather_rows(x, order, kept if ragged else None)
    if ragged and mask is not None:
        kept = kept & mask.gather(1, order)
    if gone is not None:
        before = gone.cumsum(-1)
        positions, shift = positions - before, gone.sum(-1)
    else:
        shift = order.new_zeros(batch)
    positions = positions.expand(*positions.shape[:-2], batch, -1)
    index = order.expand(*positions.shape[:-2], -1, -1)
    return rows, order, kept, positions.gather(-1, index), shift


def merge_rows(x: torch.Tensor, into: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    """See `vlm_prune.kernels.merge_rows`."""
    exact = torch.promote_types(x.dtype, torch.float32)
    joins = into >= 0
    weighted = (x.to(exact) * weight.to(exact)[..., None]).masked_fill(~joins[..., None], 0)
    index = into.clamp(min=0)[..., None].expand_as(weighted)
    return weighted.new_zeros(len(x), count, x.shape[2]).scatter_add(1, index, weighted)


def gather_kv(
    keys: torch.Tensor, values: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vlm_prune.kernels.gather_kv`."""
    index = index[:, None, :, None]
    return (
        keys.gather(2, index.expand(-1, keys.shape[1], -1, keys.shape[3])),
        values.gather(2, index.expand(-1, values.shape[1], -1, values.shape[3])),
    )


def attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    index: torch.Tensor,
    votes: torch.Tensor,
    valid: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vlm_prune.kernels.attention_mass`."""
    (batch, heads, rows, dim), (shared, keys) = query.shape, key.shape[1:3]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    key, past = key.to(dtype).mT, keys - rows
    total: torch.Tensor | None = None
    peak: torch.Tensor | None = None
    for some, vote in zip(index.split(CHUNK, dim=1), votes.split(CHUNK, dim=1), strict=True):
        asked = query.gather(2, some[:, None, :, None].expand(-1, heads, -1, dim)).to(dtype)
        logits = ((asked.reshape(batch, shared, -1, dim) @ key) * scaling).view(batch, heads, -1, keys)
        hidden = numbers(keys, some.device) > (some[..., None] + past if past else some[..., None])
        if valid is not None:
            hidden = hidden | ~valid[:, None]
        paid = logits.masked_fill(hidden[:, None], -torch.inf).softmax(-1).mean(1)[..., past:]
        paid = paid.masked_fill(~vote[..., None], 0)
        total = paid.sum(1) if total is None else total + paid.sum(1)
        peak = paid.amax(1) if peak is None else torch.maximum(peak, paid.amax(1))
    if total is None or peak is None:  # nobody is asked
        return key.new_zeros(batch, rows), key.new_zeros(batch, rows)
    return total, peak


def overwrite_rows(
    output: torch.Tensor, rows: torch.Tensor, new: torch.Tensor, changed: torch.Tensor
) -> torch.Tensor:
    """See `vlm_prune.kernels.overwrite_rows`."""
    index = rows[..., None, None].expand_as(new)
    chosen = torch.where(changed.transpose(1, 2)[..., None], new.to(output.dtype), output.gather(1, index))
    return output.scatter(1, index, chosen)
