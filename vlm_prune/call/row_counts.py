"""How many rows of a prefill are of each kind, known on the host, so that shapes need no wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Census:
    """The rows of each sequence of a batch as they enter the decoder.

    Attributes:
        live: rows that are neither holes nor padding. Padding of a single sequence counts, since it stays.
        visual: those of them that are visual tokens.
        holes: rows of all sequences that the encode stage dropped.
        overflowed: rows that are NaN but not holes.
        placeholders: for each kind of placeholder, how many each sequence has, holes included.
    """

    live: list[int]
    visual: list[int]
    holes: int
    placeholders: list[list[int]]
    overflowed: int = 0

    @classmethod
    def take(
        cls,
        masks: Sequence[torch.Tensor],
        live: torch.Tensor,
        alive: torch.Tensor | None = None,
        overflow: torch.Tensor | None = None,
    ) -> Census:
        """Ask the device, once. ``masks`` are the placeholders of each kind; all are bool ``(batch, length)``.

        ``live`` is False at padding and holes, ``alive`` at holes alone; ``overflow`` is True at rows of NaN that are
        not holes. ``None`` says that there are none.
        """
        visual = torch.stack([mask & live for mask in masks]).any(0) if masks else torch.zeros_like(live)
        holes = torch.zeros_like(live) if alive is None else ~alive
        broken = torch.zeros_like(live) if overflow is None else overflow
        counts = torch.stack([x.sum(-1) for x in (live, visual, holes, broken, *masks)]).tolist()
        return cls(counts[0], counts[1], sum(counts[2]), counts[4:], sum(counts[3]))

    def without(self, lost: list[int]) -> Census:
        """The same after ``lost`` visual tokens of each sequence were dropped."""
        live, visual = ([n - gone for n, gone in zip(x, lost, strict=True)] for x in (self.live, self.visual))
        return replace(self, live=live, visual=visual, holes=self.holes + sum(lost))

    @property
    def text(self) -> list[int]:
        """Live rows of each sequence that are not visual tokens."""
        return [live - visual for live, visual in zip(self.live, self.visual, strict=True)]

    @property
    def width(self) -> int:
        """Length of the shortened batch. A turn of only holes leaves one row: stock layers cannot compute zero rows."""
        return max(1, *self.live)

    @property
    def even(self) -> bool:
        """Whether every sequence has that length."""
        return 0 < min(self.live) == max(self.live)
