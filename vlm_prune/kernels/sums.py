"""Triton kernels that sum: weighted segment sums, and the attention that keys receive from some query rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .plans import numbers


@triton.jit
def merge_kernel(
    x, order, ends, weight, out, rows, count, channels, x_batch, x_row, x_channel,
    SCAN: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (one row of one sequence's result, block of channels).

    The rows that go into one stand together in ``order``, so that each row of ``x`` is read once in all, without
    atomics and in a fixed order.
    """
    b = (tl.program_id(0) // count).to(tl.int64)
    j = tl.program_id(0) % count
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.float32)
    start = tl.load(ends + b * (count + 1) + j)
    end = tl.load(ends + b * (count + 1) + j + 1)
    for first in range(start, end, SCAN):
        i = first + tl.arange(0, SCAN)
        source = tl.load(order + b * rows + i, mask=i < end, other=0)
        share = tl.load(weight + b * rows + source, mask=i < end, other=0.0).to(tl.float32)
        where = x + b * x_batch + source[:, None] * x_row + c[None, :].to(tl.int64) * x_channel
        value = tl.load(where, mask=(i < end)[:, None] & (c < channels)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value * share[:, None], axis=0)
    tl.store(out + (b * count + j) * channels + c, total, mask=c < channels)


def merge_rows(x: torch.Tensor, into: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    """Sort the rows by where they go, then launch `merge_kernel`.

    A kernel that looks through all destinations for each result row needs ``rows * count`` comparisons: on an H200 that
    took four times as long as torch's scattered sum at 7290 rows into 1458.
    """
    batch, rows, channels = x.shape
    out = x.new_empty(batch, count, channels, dtype=torch.float32)
    if out.numel():
        into, order = into.sort(dim=-1, stable=True)
        ends = torch.searchsorted(into, numbers(count + 1, into.device).expand(batch, -1).contiguous())
        cols = min(128, triton.next_power_of_2(channels))
        merge_kernel[batch * count, triton.cdiv(channels, cols)](
            x, order, ends, weight.contiguous(), out, rows, count, channels, *x.stride(), SCAN=8, COLS=cols
        )  # fmt: skip
    return out


@triton.jit
def _scores(asked, keys, scaling, number, valid, n, past, keys_end, HAS_VALID: tl.constexpr):
    """Scaled logits of a block of rows with a block of keys ``n``, -inf where a row may not attend."""
    logits = tl.dot(asked, tl.trans(keys), input_precision="ieee") * scaling
    seen = (n[None, :] <= (number + past)[:, None]) & (n < keys_end)[None, :]
    if HAS_VALID:
        seen = seen & (tl.load(valid + n, mask=n < keys_end, other=0) != 0)[None, :]
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def softmax_kernel(
    query, key, index, valid, logs, scaling, heads, some, rows, keys, dim, split_keys,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim,
    GROUP: tl.constexpr, HAS_VALID: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Logarithm of the sum of exponentials of each query row, over a part of the keys.

    Program (key head of one sequence, block of rows, part of the keys). A row here is a query row of one of the
    ``GROUP`` query heads that share the key head, so that the key head is read once for all of them.
    """
    shared = heads // GROUP
    b = (tl.program_id(0) // shared).to(tl.int64)
    h = (tl.program_id(0) % shared).to(tl.int64)
    m = tl.program_id(1) * M + tl.arange(0, M)
    w, head = m // GROUP, h * GROUP + m % GROUP
    d = tl.arange(0, D)
    number = tl.load(index + b * some + w, mask=w < some, other=0)
    where = query + b * q_batch + head[:, None] * q_head + number[:, None] * q_row + d[None, :] * q_dim
    asked = tl.load(where, mask=(w < some)[:, None] & (d < dim)[None, :], other=0.0)
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    start = tl.program_id(2) * split_keys
    for first in range(start, min(start + split_keys, keys), N):
        n = first + tl.arange(0, N)
        place = key + b * k_batch + h * k_head + n[:, None].to(tl.int64) * k_row + d[None, :] * k_dim
        block = tl.load(place, mask=(n < keys)[:, None] & (d < dim)[None, :], other=0.0)
        logits = _scores(asked, block, scaling, number, valid + b * keys, n, keys - rows, keys, HAS_VALID)
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(logits - base[:, None]), axis=1)
        peak = higher
    place = ((b * heads + head) * some + w) * tl.num_programs(2) + tl.program_id(2)
    tl.store(logs + place, peak + tl.log(total), mask=w < some)


@triton.jit
def join_kernel(logs, joined, rows, parts, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """The same over all keys, from its parts ``(rows, parts)``. 0 for a row that sees no key: it adds nothing."""
    row, part = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PARTS)
    there = (row < rows)[:, None] & (part < parts)[None, :]
    known = tl.load(logs + row[:, None] * parts + part[None, :], mask=there, other=float("-inf"))
    peak = tl.max(known, axis=1)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp(known - base[:, None]), axis=1)
    tl.store(joined + row, base + tl.where(total > 0, tl.log(total), 0.0), mask=row < rows)


@triton.jit
def mass_kernel(
    query, key, index, votes, valid, logs, total, most, scaling, heads, some, rows, keys, dim,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim,
    GROUP: tl.constexpr, HAS_VALID: tl.constexpr, W: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sum and maximum over a block of query rows of the attention to a block of keys, averaged over heads.

    Program (sequence, block of keys, block of rows). Logits are recomputed, with the softmax normaliser known.
    """
    b = tl.program_id(0).to(tl.int64)
    past = keys - rows
    column = tl.program_id(1) * N + tl.arange(0, N)
    n = past + column
    w = tl.program_id(2) * W + tl.arange(0, W)
    d = tl.arange(0, D)
    number = tl.load(index + b * some + w, mask=w < some, other=0)
    paid = tl.zeros([W, N], tl.float32)
    for h in range(heads // GROUP):
        place = key + b * k_batch + h * k_head + n[:, None].to(tl.int64) * k_row + d[None, :] * k_dim
        block = tl.load(place, mask=(n < keys)[:, None] & (d < dim)[None, :], other=0.0)
        for g in range(GROUP):
            head = h * GROUP + g
            where = query + b * q_batch + head * q_head + number[:, None] * q_row + d[None, :] * q_dim
            asked = tl.load(where, mask=(w < some)[:, None] & (d < dim)[None, :], other=0.0)
            known = tl.load(logs + (b * heads + head) * some + w, mask=w < some, other=0.0)
            logits = _scores(asked, block, scaling, number, valid + b * keys, n, past, keys, HAS_VALID)
            paid += tl.exp(logits - known[:, None])
    vote = tl.load(votes + b * some + w, mask=w < some, other=0) != 0
    paid = tl.where(vote[:, None], paid / heads, 0.0)
    place = (b * tl.num_programs(2) + tl.program_id(2)) * rows + column
    tl.store(total + place, tl.sum(paid, axis=0), mask=column < rows)
    tl.store(most + place, tl.max(paid, axis=0), mask=column < rows)


def blocks(dtype: torch.dtype, some: int, group: int) -> tuple[int, int, int, int]:
    """Block sizes: rows and keys of `softmax_kernel`, rows and keys of `mass_kernel`.

    Exact products of fp32 use no tensor cores and keep their operands in registers, so their blocks are small.
    """
    if dtype == torch.float32:
        return 16, 32, 16, 16
    return (16 if some * group <= 16 else 64), 64, (16 if some <= 16 else 32), 16


def attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    index: torch.Tensor,
    votes: torch.Tensor,
    valid: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `softmax_kernel`, `join_kernel`, then `mass_kernel`."""
    (batch, heads, rows, dim), (shared, keys), some = query.shape, key.shape[1:3], index.shape[1]
    if not some:
        return query.new_zeros(batch, rows, dtype=torch.float32), query.new_zeros(
            batch, rows, dtype=torch.float32
        )
    group = heads // shared
    m, n, w, n_mass = blocks(query.dtype, some, group)
    # long key sequences are split, so that one sequence with few rows fills the device too
    splits = min(16, triton.cdiv(keys, 256))
    split_keys = triton.cdiv(triton.cdiv(keys, splits), n) * n
    splits = triton.cdiv(keys, split_keys)
    parts = query.new_empty(batch, heads, some, splits, dtype=torch.float32)
    logs = parts.new_empty(batch, heads, some)
    index, votes = index.contiguous(), votes.contiguous()
    flags = votes if valid is None else valid.contiguous()
    size = {"GROUP": group, "HAS_VALID": valid is not None, "D": max(16, triton.next_power_of_2(dim))}
    strides = (*query.stride(), *key.stride())
    softmax_kernel[batch * shared, triton.cdiv(some * group, m), splits](
        query, key, index, flags, parts, scaling, heads, some, rows, keys, dim, split_keys,
        *strides, M=m, N=n, **size,
    )  # fmt: skip
    join_kernel[triton.cdiv(logs.numel(), 64),](
        parts, logs, logs.numel(), splits, ROWS=64, PARTS=triton.next_power_of_2(splits)
    )
    groups = triton.cdiv(some, w)
    total = parts.new_empty(batch, groups, rows)
    most = torch.empty_like(total)
    mass_kernel[batch, triton.cdiv(rows, n_mass), groups](
        query, key, index, votes, flags, logs, total, most, scaling, heads, some, rows, keys, dim,
        *strides, W=w, N=n_mass, **size,
    )  # fmt: skip
    return (total[:, 0], most[:, 0]) if groups == 1 else (total.sum(1), most.amax(1))
