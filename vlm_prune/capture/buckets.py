"""Prompt lengths in few buckets, as pure functions: how long, padded on the left, and what may look at what."""

from __future__ import annotations

import torch

SMALLEST = 32
"""The shortest bucket."""


def bucket(rows: int) -> int:
    """The length to which a sequence of ``rows`` is padded.

    Up to 128 a multiple of 32, above that a quarter of a power of two, so at most a fifth of a bucket is padding from
    there on: 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, ...
    """
    step = max(SMALLEST, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step


def pad_left(x: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """``x`` with zeros in front of dimension ``dim``, ``length`` long in all."""
    missing = length - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x.new_zeros(shape), x], dim)


def square_mask(there: torch.Tensor) -> torch.Tensor:
    """What each row may look at: bool ``(batch, 1, rows, rows)``, from which rows are ``there``, ``(batch, rows)``.

    Rows that are not there look at themselves alone: with nothing to look at, some attention kernels make NaN of them,
    and NaN would reach the others through a weight of 0.
    """
    rows = there.shape[1]
    number = torch.arange(rows, device=there.device)
    causal, itself = number <= number[:, None], number == number[:, None]
    return ((causal & there[:, None]) | itself)[:, None]
