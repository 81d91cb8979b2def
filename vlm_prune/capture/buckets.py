"""Buckets of prompt lengths, as pure functions: the padded length, left padding, and the attention mask."""

from __future__ import annotations

import torch

SMALLEST = 32
"""The shortest bucket."""


def bucket(rows: int) -> int:
    """The length to which a sequence of ``rows`` is padded.

    Multiples of 32 up to 128, and quarters of a power of two above that, where at most a fifth of a bucket is
    padding: 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, ...
    """
    step = max(SMALLEST, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step


def pad_left(x: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """``x`` padded with zeros at the start of dimension ``dim``, to ``length``."""
    missing = length - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x.new_zeros(shape), x], dim)


def square_mask(there: torch.Tensor) -> torch.Tensor:
    """The causal mask, bool ``(batch, 1, rows, rows)``; ``there``, bool ``(batch, rows)``, marks the real rows.

    Padding rows attend to themselves alone: some attention kernels return NaN for a row that attends to nothing, and
    NaN would reach the others through a weight of 0.
    """
    rows = there.shape[1]
    number = torch.arange(rows, device=there.device)
    causal, itself = number <= number[:, None], number == number[:, None]
    return ((causal & there[:, None]) | itself)[:, None]
