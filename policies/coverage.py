"""Greedy coverage: pick the tokens that together best cover what they are compared with."""

from __future__ import annotations

from typing import Literal

import torch

Combine = Literal["multi", "add"]


def greedy_cover(
    worth: torch.Tensor,
    keep: int,
    weight: torch.Tensor | None = None,
    combine: Combine = "multi",
    candidates: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick tokens by what they add to the coverage: int64 ``(batch, keep)`` in picking order, and ``(batch, rows)``.

    The coverage of a row starts at 0 and is the largest ``worth`` in it of any picked token. A token's gain is the sum,
    over all rows, of how much it would raise the coverage; ties go to the earlier token, and none is picked twice.
    ``keep`` steps in the dtype of ``worth``, each of which reads it once; none waits for the device.

    Args:
        worth: ``(batch, rows, units)``, what each token is worth to each row.
        keep: tokens to pick, as many as there are candidates at most.
        weight: ``(batch, units)``, by which gains are multiplied (``"multi"``) or raised (``"add"``).
        combine: which of the two.
        candidates: bool ``(batch, units)``, tokens that may be picked; ``None`` for all.
    """
    batch, rows, units = worth.shape
    cover = worth.new_zeros(batch, rows)
    barred = torch.zeros(batch, units, dtype=torch.bool, device=worth.device)
    if candidates is not None:
        barred |= ~candidates
    raised, picked = torch.empty_like(worth), []
    for _ in range(keep):
        gain = torch.sub(worth, cover[..., None], out=raised).clamp_(min=0).sum(1)
        if weight is not None:
            gain = gain * weight if combine == "multi" else gain + weight
        latest = gain.masked_fill(barred, -torch.inf).argmax(-1, keepdim=True)
        barred.scatter_(1, latest, True)
        cover = torch.maximum(cover, worth.gather(2, latest[:, None].expand(-1, rows, -1)).squeeze(2))
        picked.append(latest)
    return torch.cat(picked, dim=1), cover
