"""Row overwrite: recompute a few query rows of an attention call, edit them, and overwrite the stock output.

Only the rows that a policy changes are computed in full; all others stay what the stock implementation (sdpa, flash,
eager) returned. Grouped queries share their keys without repeating them, logits and softmax are fp32 or better, and
the largest block is ``(batch, heads, rows, keys)`` for the requested rows, never the whole map.

Rows are numbered among the queries of the call: int64 ``(batch, rows)``, so each sequence of a batch can have its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from ..kernels import numbers, overwrite_rows
from .scores import exact_dtype

if TYPE_CHECKING:
    from ..contract.views import LogitEdit, ModulateView

BLOCK = 256
"""Rows to recompute at a time, so that a long question after the image stays affordable."""


def row_logits(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Scaled dot products of some query rows with all keys: ``(batch, heads, rows, keys)``, not masked.

    ``query`` is ``(batch, heads, rows, head_dim)``, ``key`` ``(batch, kv_heads, keys, head_dim)``; query head ``h``
    reads key head ``h // (heads // kv_heads)``, as in stock models. The result is fp32, or fp64 for fp64 inputs.
    """
    batch, heads, rows, dim = query.shape
    dtype = exact_dtype(query.dtype)
    grouped = (query.to(dtype) * scaling).reshape(batch, key.shape[1], -1, dim)
    return (grouped @ key.to(dtype).mT).view(batch, heads, rows, -1)


def _step_logits(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """`row_logits` of one row, in one operation."""
    (batch, heads, _, dim), dtype = query.shape, exact_dtype(query.dtype)
    grouped, keys = query.to(dtype).reshape(batch * key.shape[1], -1, dim), key.to(dtype).flatten(0, 1).mT
    unused = grouped.new_empty(())
    return torch.baddbmm(unused, grouped, keys, beta=0, alpha=scaling).view(batch, heads, 1, -1)


def masked_softmax(logits: torch.Tensor, number: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Causal softmax of ``logits`` ``(batch, heads, rows, keys)`` over the keys.

    ``number`` ``(batch, rows)`` says which key each row is; it sees keys up to itself. ``valid`` ``(batch, keys)`` are
    keys that may be attended, ``None`` if all may. A row that sees none (padding) is uniform instead of NaN.
    """
    seen = torch.arange(logits.shape[-1], device=logits.device) <= number[..., None]
    if valid is not None:
        seen = seen & valid[:, None]
    return logits.masked_fill(~seen[:, None], torch.finfo(logits.dtype).min).softmax(-1)


def weighted_values(probabilities: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Head outputs of rows with given ``probabilities`` ``(batch, heads, rows, keys)``.

    ``value`` is ``(batch, kv_heads, keys, head_dim)``; returns ``(batch, rows, heads, head_dim)`` in the dtype of
    ``probabilities``.
    """
    batch, heads, rows, keys = probabilities.shape
    grouped = probabilities.reshape(batch, value.shape[1], -1, keys)
    return (grouped @ value.to(probabilities.dtype)).view(batch, heads, rows, -1).transpose(1, 2)


def row_probabilities(
    view: ModulateView, rows: torch.Tensor, edits: Iterable[LogitEdit] = ()
) -> torch.Tensor:
    """Attention of some ``rows`` of a call, ``(batch, heads, rows, keys)``, after ``edits`` of the logits."""
    _, heads, queries, dim = view.query.shape
    if queries > 1:
        query = view.query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, dim))
        logits = row_logits(query, view.key, view.scaling)
    else:
        logits = _step_logits(view.query, view.key, view.scaling)
    for edit in edits:
        logits = edit(logits, rows)
    if queries == 1:  # the last key: it sees all that may be attended
        if (valid := view.valid) is None:
            return logits.softmax(-1)
        hidden = view.once("hidden", lambda: ~valid[:, None, None], valid)
        return logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(-1)
    return masked_softmax(logits, rows + view.key.shape[2] - queries, view.valid)


def put_rows(
    output: torch.Tensor, rows: torch.Tensor, new: torch.Tensor, changed: torch.Tensor
) -> torch.Tensor:
    """`overwrite_rows`, which for the only row of a decoding step is one choice."""
    if output.shape[1] > 1:
        return overwrite_rows(output, rows, new, changed)
    return torch.where(changed.transpose(1, 2)[..., None], new.to(output.dtype), output)


def rewrite_rows(
    view: ModulateView,
    rows: torch.Tensor,
    edits: Iterable[LogitEdit],
    change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """The layer's head outputs with some ``rows`` ``(batch, rows)`` recomputed, a block of them at a time.

    ``change`` takes the probabilities of a block after ``edits`` of the logits, and its rows; it returns the new
    probabilities and where they apply, bool ``(batch, heads, rows)`` or broadcast.
    """
    output = view.output
    for block in rows.split(BLOCK, dim=1):
        new, changed = change(row_probabilities(view, block, edits), block)
        output = put_rows(output, block, weighted_values(new, view.value), changed)
    return output


def all_rows(view: ModulateView) -> torch.Tensor:
    """The numbers of all rows of a call."""
    return numbers(view.query.shape[2], view.query.device).expand(len(view.query), -1)


def final_row(view: ModulateView) -> torch.Tensor:
    """The number of each sequence's last row that is not padding: int64 ``(batch, 1)``. No wait for the device."""
    rows = all_rows(view)
    if view.valid is None:
        return rows[:, -1:]
    return (rows * view.valid[:, -rows.shape[1] :]).amax(-1, keepdim=True)


def first_key(view: ModulateView) -> torch.Tensor:
    """The number of each sequence's first key that is not padding: int64 ``(batch,)``. Asks nothing of the device."""
    if view.valid is None:
        return view.query.new_zeros(len(view.query), dtype=torch.int64)
    return view.valid.to(torch.int8).argmax(-1)


def real_rows(view: ModulateView) -> torch.Tensor:
    """Rows of a call that are not padding, of sequences with an image: bool ``(batch, queries)``."""
    queries, keys = view.query.shape[2], view.key.shape[2]
    real = torch.ones_like(view.visual) if view.valid is None else view.valid
    return real[:, keys - queries :] & view.visual.any(-1, keepdim=True)


def rows_where(wanted: torch.Tensor, most: int | None = None) -> torch.Tensor:
    """The numbers of ``wanted`` rows, bool ``(batch, queries)``, as many as the fullest sequence has, at least one.

    Shorter sequences are filled up with other rows. Waits for the device, except where there is one query, or
    where ``most`` bounds their number.
    """
    if wanted.shape[1] == 1:
        return numbers(1, wanted.device).expand(len(wanted), -1)
    width = min(most, wanted.shape[1]) if most is not None else wanted.shape[1]
    width = max(int(wanted.sum(-1).max()) if most is None and width > 1 else width, 1)
    return wanted.view(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :width]
