"""Triton kernels that move rows: closing holes, gathering, placing, KV compaction, overwriting.

Each is one launch that reads every row it needs once and writes every row of its result once. Tensors may have any
strides; index and flag tensors, which are small, are made contiguous first. Launchers take what the functions of
`vlm_prune.kernels` take.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .reference import Closed

ROWS, COLS, SCAN = 8, 512, 1024
"""Rows and channels that a program copies; flags that it sums at a time."""


@triton.jit
def gather_kernel(
    x, index, valid, out, fill, some, channels, x_batch, x_row, x_channel,
    HAS_VALID: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (block of result rows of one sequence, block of channels)."""
    blocks = tl.cdiv(some, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = j < some
    take = inside
    if HAS_VALID:
        take = inside & (tl.load(valid + b * some + j, mask=inside, other=0) != 0)
    source = tl.load(index + b * some + j, mask=take, other=0)
    where = x + b * x_batch + source[:, None] * x_row + c[None, :].to(tl.int64) * x_channel
    rows = tl.load(where, mask=take[:, None] & (c < channels)[None, :], other=fill)
    spot = out + (b * some + j[:, None]) * channels + c[None, :]
    tl.store(spot, rows, mask=inside[:, None] & (c < channels)[None, :])


def gather_rows(
    x: torch.Tensor, index: torch.Tensor, valid: torch.Tensor | None, fill: float
) -> torch.Tensor:
    """Launch `gather_kernel`."""
    (batch, some), channels = index.shape, x.shape[2]
    out = x.new_empty(batch, some, channels)
    if out.numel():
        cols = min(COLS, triton.next_power_of_2(channels))
        grid = (batch * triton.cdiv(some, ROWS), triton.cdiv(channels, cols))
        flags = index if valid is None else valid.contiguous()
        gather_kernel[grid](
            x, index.contiguous(), flags, out, fill, some, channels, *x.stride(),
            HAS_VALID=valid is not None, ROWS=ROWS, COLS=cols,
        )  # fmt: skip
    return out


@triton.jit
def place_kernel(
    rows, index, valid, out, fill, some, length, channels, r_batch, r_row, r_channel,
    HAS_VALID: tl.constexpr, HOLES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Program (block of result rows of one sequence, block of channels): looks up the row, or writes fill."""
    blocks = tl.cdiv(length, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    spot = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    source = tl.full([ROWS], -1, tl.int32)
    for first in range(0, some, SCAN):
        j = first + tl.arange(0, SCAN)
        goes = tl.load(index + b * some + j, mask=j < some, other=-1)
        if HAS_VALID:
            real = tl.load(valid + b * some + j, mask=j < some, other=0) != 0
            goes = tl.where(real, goes, -1)
        here = goes[None, :] == spot[:, None]
        source = tl.maximum(source, tl.max(tl.where(here, j[None, :], -1), axis=1))
    where = rows + b * r_batch + source[:, None].to(tl.int64) * r_row + c[None, :].to(tl.int64) * r_channel
    value = tl.load(where, mask=(source >= 0)[:, None] & (c < channels)[None, :], other=fill)
    if HOLES:  # as `reference.hole`
        edge = tl.where(c % 2 == 1, float("inf"), float("-inf"))
        value = tl.where((source < 0)[:, None], tl.where(c == 0, fill, edge)[None, :], value)
    place = out + (b * length + spot[:, None]) * channels + c[None, :]
    tl.store(place, value, mask=(spot < length)[:, None] & (c < channels)[None, :])


def place_rows(
    rows: torch.Tensor, index: torch.Tensor, valid: torch.Tensor | None, length: int, fill: float
) -> torch.Tensor:
    """Launch `place_kernel`."""
    batch, some, channels = rows.shape
    out = rows.new_empty(batch, length, channels)
    if out.numel():
        cols = min(COLS, triton.next_power_of_2(channels))
        grid = (batch * triton.cdiv(length, ROWS), triton.cdiv(channels, cols))
        flags = index if valid is None else valid.contiguous()
        place_kernel[grid](
            rows, index.contiguous(), flags, out, fill, some, length, channels, *rows.stride(),
            HAS_VALID=valid is not None, HOLES=math.isnan(fill), ROWS=ROWS, COLS=cols,
            SCAN=min(256, triton.next_power_of_2(max(some, 16))),
        )  # fmt: skip
    return out


@triton.jit
def close_kernel(
    x, live, positions, mask, gone, out, order, kept, moved, shift, full, length, channels,
    x_batch, x_row, x_channel, p_axis, p_batch, moved_axis,
    AXES: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GONE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Program (block of source rows of one sequence, block of channels).

    A row's place follows from the number of live rows before it and in total. Each program sums these itself: one byte
    per row, from the L2 cache, costs less than a second launch or a wait for the previous program.
    """
    blocks = tl.cdiv(full, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * ROWS
    s = start + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    alive, before, closed, all_closed = 0, 0, 0, 0
    for first in range(0, full, SCAN):
        i = first + tl.arange(0, SCAN)
        flag = tl.load(live + b * full + i, mask=i < full, other=0).to(tl.int32)
        alive += tl.sum(flag)
        before += tl.sum(tl.where(i < start, flag, 0))
        if HAS_GONE:
            flag = tl.load(gone + b * full + i, mask=i < full, other=0).to(tl.int32)
            all_closed += tl.sum(flag)
            closed += tl.sum(tl.where(i < start, flag, 0))
    flag = tl.load(live + b * full + s, mask=s < full, other=0).to(tl.int32)
    rank = before + tl.cumsum(flag, 0) - flag
    # as if sorted: the dead rows first, then the live ones; the last `length` stay
    spot = tl.where(flag != 0, full - alive + rank, s - rank) - (full - length)
    stays = (s < full) & (spot >= 0)
    where = x + b * x_batch + s[:, None].to(tl.int64) * x_row + c[None, :].to(tl.int64) * x_channel
    rows = tl.load(where, mask=(stays & (flag != 0))[:, None] & (c < channels)[None, :], other=0.0)
    place = b * length + spot
    tl.store(
        out + place[:, None] * channels + c[None, :], rows, mask=stays[:, None] & (c < channels)[None, :]
    )
    if tl.program_id(1) == 0:
        tl.store(order + place, s.to(tl.int64), mask=stays)
        may = flag
        if HAS_MASK:
            may = flag & tl.load(mask + b * full + s, mask=s < full, other=0).to(tl.int32)
        tl.store(kept + place, may != 0, mask=stays)
        down = tl.zeros([ROWS], tl.int32)
        if HAS_GONE:
            down = closed + tl.cumsum(tl.load(gone + b * full + s, mask=s < full, other=0).to(tl.int32), 0)
        for axis in tl.static_range(AXES):
            old = tl.load(positions + axis * p_axis + b * p_batch + s, mask=s < full, other=0)
            tl.store(moved + axis * moved_axis + place, old - down, mask=stays)
        if start == 0:
            tl.store(shift + b, tl.zeros([], tl.int64) + all_closed)


def close_holes(
    x: torch.Tensor,
    live: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    gone: torch.Tensor | None,
    length: int,
) -> Closed:
    """Launch `close_kernel`."""
    batch, full, channels = x.shape
    out = x.new_empty(batch, length, channels)
    order = live.new_empty(batch, length, dtype=torch.int64)
    kept = live.new_empty(batch, length)
    moved = positions.new_empty(*positions.shape[:-2], batch, length)
    shift = order.new_empty(batch)
    old = positions.reshape(-1, *positions.shape[-2:]).contiguous()
    live = live.contiguous()
    cols = min(COLS, triton.next_power_of_2(channels))
    grid = (batch * triton.cdiv(full, ROWS), triton.cdiv(channels, cols))
    close_kernel[grid](
        x, live, old, live if mask is None else mask.contiguous(), live if gone is None else gone.contiguous(),
        out, order, kept, moved, shift, full, length, channels, *x.stride(),
        old.stride(0), old.stride(1) if old.shape[1] > 1 else 0, batch * length,
        AXES=len(old), HAS_MASK=mask is not None, HAS_GONE=gone is not None,
        ROWS=ROWS, COLS=cols, SCAN=SCAN,
    )  # fmt: skip
    return out, order, kept, moved, shift


@triton.jit
def _copy_heads(
    x, out, source, inside, b, h, j, heads, some, dim, x_batch, x_head, x_row, x_dim, D: tl.constexpr
):  # fmt: skip
    d = tl.arange(0, D)
    both = inside[:, None] & (d < dim)[None, :]
    rows = tl.load(x + b * x_batch + h * x_head + source[:, None] * x_row + d[None, :] * x_dim, mask=both)
    tl.store(out + ((b * heads + h) * some + j[:, None]) * dim + d[None, :], rows, mask=both)


@triton.jit
def kv_kernel(
    keys, values, index, keys_out, values_out, heads, some, k_dim, v_dim,
    k_batch, k_head, k_row, k_channel, v_batch, v_head, v_row, v_channel,
    ROWS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    """Program (block of result rows of one head of one sequence, keys or values)."""
    blocks = tl.cdiv(some, ROWS)
    h = ((tl.program_id(0) // blocks) % heads).to(tl.int64)
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    j = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    inside = j < some
    source = tl.load(index + b * some + j, mask=inside, other=0)
    if tl.program_id(1) == 0:
        _copy_heads(
            keys, keys_out, source, inside, b, h, j, heads, some, k_dim, k_batch, k_head, k_row, k_channel, K_DIM
        )  # fmt: skip
    else:
        _copy_heads(
            values, values_out, source, inside, b, h, j, heads, some, v_dim, v_batch, v_head, v_row, v_channel, V_DIM
        )  # fmt: skip


def gather_kv(
    keys: torch.Tensor, values: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `kv_kernel`."""
    (batch, heads, _, k_dim), v_dim, some = keys.shape, values.shape[3], index.shape[1]
    k_out, v_out = keys.new_empty(batch, heads, some, k_dim), values.new_empty(batch, heads, some, v_dim)
    if some:
        rows = 16
        kv_kernel[batch * heads * triton.cdiv(some, rows), 2](
            keys, values, index.contiguous(), k_out, v_out, heads, some, k_dim, v_dim,
            *keys.stride(), *values.stride(),
            ROWS=rows, K_DIM=triton.next_power_of_2(k_dim), V_DIM=triton.next_power_of_2(v_dim),
        )  # fmt: skip
    return k_out, v_out


@triton.jit
def overwrite_kernel(
    output, rows, new, changed, some, heads, dim,
    o_batch, o_row, o_head, o_dim, n_batch, n_row, n_head, n_dim, c_batch, c_head, c_row,
    HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Program (one row of one sequence, block of heads): writes changed heads only."""
    b = (tl.program_id(0) // some).to(tl.int64)
    j = (tl.program_id(0) % some).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    row = tl.load(rows + b * some + j)
    write = tl.load(changed + b * c_batch + h * c_head + j * c_row, mask=h < heads, other=0) != 0
    both = write[:, None] & (d < dim)[None, :]
    value = tl.load(new + b * n_batch + j * n_row + h[:, None] * n_head + d[None, :] * n_dim, mask=both)
    place = output + b * o_batch + row * o_row + h[:, None] * o_head + d[None, :] * o_dim
    tl.store(place, value.to(output.dtype.element_ty), mask=both)


def overwrite_rows(
    output: torch.Tensor, rows: torch.Tensor, new: torch.Tensor, changed: torch.Tensor
) -> torch.Tensor:
    """Launch `overwrite_kernel` on a copy."""
    batch, some, heads, dim = new.shape
    output = output.clone()
    if not new.numel():
        return output
    changed = changed.expand(batch, heads, some)
    block = min(8, triton.next_power_of_2(heads))
    overwrite_kernel[batch * some, triton.cdiv(heads, block)](
        output, rows.contiguous(), new, changed, some, heads, dim,
        *output.stride(), *new.stride(), *changed.stride(),
        HEADS=block, DIM=triton.next_power_of_2(dim),
    )  # fmt: skip
    return output
