"""The data movement of pruning, and the two reductions that attention-reading policies need, as ops.

Each op is written twice: in plain torch (`reference`), which is what runs on a CPU, and as a Triton kernel, which is
what runs on a GPU. On a GPU it is a registered op, ``torch.ops.vlm_prune.<name>``, with a fake implementation, so that
torch.compile and FakeTensorMode can trace it. Importing this package imports neither Triton nor the op library:
both are loaded with the first tensor on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from . import reference
from .plans import holding, numbers, planned
from .reference import hole, live_order

__all__ = [
    "attention_mass",
    "close_holes",
    "gather_kv",
    "gather_rows",
    "holding",
    "hole",
    "live_order",
    "merge_rows",
    "numbers",
    "overwrite_rows",
    "place_rows",
    "planned",
    "to_device",
]

DEVICES = {"cuda"}
"""Device types whose tensors use the kernels."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the kernels; others use the reference on every device."""


FEW_ROWS = 1024
"""Rows below which torch moves them faster than a kernel is launched. Measured on an H200 at two sizes: `place_rows` 23
to 17 us at 640 rows and 38 to 71 us at 7354, `gather_kv` 33 to 18 us at 128 rows and 7 to 19 us at 1522. `gather_rows`
won at neither (20 to 6 us, 10.8 to 11.7 us), so that torch gathers everywhere."""


@cache
def _ops() -> Any:
    """The op library, loaded when first needed; ``None`` where Triton is not installed."""
    if find_spec("triton") is None:
        return None
    from . import ops  # registers torch.ops.vlm_prune

    return ops


def _kernels(x: torch.Tensor) -> Any:
    """The op library if ``x`` is for the kernels, else ``None``."""
    return _ops() if x.device.type in DEVICES and x.dtype in DTYPES else None


def to_device(values: Sequence[int] | Sequence[float], device: torch.device | str) -> torch.Tensor:
    """Numbers that the host knows, on a device, without waiting for it: CUDA copies them aside before it returns.

    The same numbers are the same tensor (see `planned`), so nobody may write into it.
    """
    device = torch.device(device)
    dtype = torch.float32 if any(isinstance(x, float) for x in values) else torch.int64
    return planned(
        ("values", dtype, tuple(values), device),
        lambda: torch.tensor(values, dtype=dtype).to(device, non_blocking=device.type == "cuda"),
    )


def gather_rows(
    x: torch.Tensor, index: torch.Tensor, valid: torch.Tensor | None = None, fill: float = 0.0
) -> torch.Tensor:
    """Pick rows of each sequence: ``(batch, some, channels)``, differentiable.

    Args:
        x: ``(batch, all, channels)``, any strides.
        index: int64 ``(batch, some)``, the rows wanted; may name a row twice.
        valid: bool ``(batch, some)``; where False the result holds ``fill``, whatever ``index`` says.
        fill: that number.
    """
    return reference.gather_rows(x, index, valid, fill)


def place_rows(
    rows: torch.Tensor, index: torch.Tensor, valid: torch.Tensor | None, length: int, fill: float
) -> torch.Tensor:
    """Put rows back where they came from, with ``fill`` elsewhere: ``(batch, length, channels)``, differentiable.

    Args:
        rows: ``(batch, some, channels)``, any strides.
        index: int64 ``(batch, some)``, their places, all different within a sequence.
        valid: bool ``(batch, some)``; rows where it is False are skipped.
        length: rows of the result.
        fill: the value of all other rows; NaN makes them `hole` s.
    """
    if (ops := _kernels(rows)) is None or len(rows) * length < FEW_ROWS:
        return reference.place_rows(rows, index, valid, length, fill)
    return ops.place_rows(rows, index, valid, length, fill)


def close_holes(
    x: torch.Tensor,
    live: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    gone: torch.Tensor | None,
    length: int,
    ragged: bool = True,
) -> reference.Closed:
    """Shorten sequences to their live rows, right-aligned, in one pass; differentiable in ``x``.

    Args:
        x: ``(batch, full, channels)``, any strides.
        live: bool ``(batch, full)``, the rows that stay.
        positions: int64 ``(..., batch or 1, full)``.
        mask: bool ``(batch, full)``, rows that may be attended; ``None`` if all may.
        gone: bool ``(batch, full)``, rows whose positions the rows after them close up; ``None`` if none.
        length: rows of the result; no sequence may have more live ones.
        ragged: False promises that every sequence has exactly ``length`` live rows.

    Returns:
        - ``x`` shortened, ``(batch, length, channels)``. Sequences with fewer live rows are padded on the left with
          zeros.
        - int64 ``(batch, length)``, where each row comes from; fill refers to dead rows, each once.
        - bool ``(batch, length)``, ``mask`` of the rows, False in fill.
        - int64 ``(..., batch, length)``, positions of the rows.
        - int64 ``(batch,)``, by how much the last position moved down.
    """
    if (ops := _kernels(x)) is None:
        return reference.close_holes(x, live, positions, mask, gone, length, ragged)
    return ops.close_holes(x, live, positions, mask, gone, length)


def merge_rows(x: torch.Tensor, into: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    """Weighted segment sum: row ``j`` of the result adds up ``weight * x`` over the rows that go into ``j``.

    Args:
        x: ``(batch, rows, channels)``, any strides.
        into: int64 ``(batch, rows)``, which of ``count`` rows each goes into; -1 for none.
        weight: ``(batch, rows)``.
        count: rows of the result.

    Returns:
        ``(batch, count, channels)`` in fp32, or fp64 for fp64 inputs; differentiable in ``x`` and ``weight``. The order
        of summation is fixed, so the same input gives the same bits.
    """
    if (ops := _kernels(x)) is None:
        return reference.merge_rows(x, into, weight, count)
    return ops.merge_rows(x, into, weight, count)


def gather_kv(
    keys: torch.Tensor, values: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick the same rows of keys and values ``(batch, heads, rows, head_dim)`` for all heads, differentiable.

    ``index`` is int64 ``(batch, some)``.
    """
    if (ops := _kernels(keys)) is None or index.numel() < FEW_ROWS:
        return reference.gather_kv(keys, values, index)
    return ops.gather_kv(keys, values, index)


def attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    index: torch.Tensor,
    votes: torch.Tensor,
    valid: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and maximum, over some query rows, of the attention that each key draws: two ``(batch, rows)``.

    Each row is a causal softmax over all valid keys, averaged over the query heads, in fp32 or better. The map is never
    stored, and keys shared by a group of query heads are not repeated. Not differentiable.

    Args:
        query: ``(batch, heads, rows, head_dim)``, any strides.
        key: ``(batch, key heads, keys, head_dim)``. The last ``rows`` keys belong to the query rows, and the result is
            about these; earlier ones take part in the softmax.
        index: int64 ``(batch, some)``, the query rows to use.
        votes: bool ``(batch, some)``, False for entries of ``index`` that are only fill.
        valid: bool ``(batch, keys)``, keys that may be attended; ``None`` if all may.
        scaling: factor on the dot products.
    """
    if (ops := _kernels(query)) is None:
        return reference.attention_mass(query, key, index, votes, valid, scaling)
    return ops.attention_mass(query, key, index, votes, valid, scaling)


def overwrite_rows(
    output: torch.Tensor, rows: torch.Tensor, new: torch.Tensor, changed: torch.Tensor
) -> torch.Tensor:
    """``output`` with ``new`` in place of its ``rows`` where ``changed``; the rest stays bit-identical. Differentiable.

    Args:
        output: ``(batch, queries, heads, head_dim)``, any strides.
        rows: int64 ``(batch, some)``, different where something changes.
        new: ``(batch, some, heads, head_dim)``, cast to the dtype of ``output``.
        changed: bool that broadcasts to ``(batch, heads, some)``.
    """
    if (ops := _kernels(output)) is None or new.dtype not in DTYPES:
        return reference.overwrite_rows(output, rows, new, changed)
    return ops.overwrite_rows(output, rows, new, changed)
