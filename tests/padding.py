"""Sequences of different lengths as one batch."""

from __future__ import annotations

import torch


def padded(sequences: list[list[int]], side: str, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask ``(batch, length)``, filled up with ``pad`` on the "left" or "right"."""
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad)
    mask = torch.zeros_like(ids)
    for b, sequence in enumerate(sequences):
        place = slice(length - len(sequence), None) if side == "left" else slice(len(sequence))
        ids[b, place], mask[b, place] = torch.tensor(sequence), 1
    return ids, mask
