"""Deepstack: features of several tower layers that stock code adds to visual rows after the first decoder layers.

The decoder is given one mask and one list of features for the whole call. Where rows are dropped between its first
layers, that mask no longer fits, so from there on this module adds the features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


def shorten(
    visual: torch.Tensor, features: list[torch.Tensor], order: torch.Tensor, valid: torch.Tensor | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Mask and features of the rows ``order`` ``(batch, fewer rows)``.

    ``visual`` is bool ``(batch, rows)``; each of the ``features`` ``(visual rows, channels)`` has a row for each True
    in it, in order.
    """
    number = visual.flatten().long().cumsum(0).view_as(visual) - 1
    left = visual.gather(1, order)
    left = left if valid is None else left & valid
    rows = number.gather(1, order)[left]
    return left, [x[rows] for x in features]


@dataclass
class Deepstack:
    """The features of one call. ``stock`` is the list object that stock code reads; ``ours`` are added by `add`."""

    visual: torch.Tensor
    stock: list[torch.Tensor]
    ours: list[torch.Tensor] = field(default_factory=list)

    def take_over(self) -> None:
        """From this layer on, stock code adds nothing: it looks at the length of its list after every layer."""
        if self.stock:
            self.ours = list(self.stock)
            self.stock.clear()

    def add(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """The output ``(batch, rows, channels)`` of decoder layer ``number`` with its features added."""
        return self._added(self.ours, number, hidden)

    def foreseen(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """The same if no row were cut, including features that stock code adds."""
        return self._added(self.ours or self.stock, number, hidden)

    def _added(self, features: list[torch.Tensor], number: int, hidden: torch.Tensor) -> torch.Tensor:
        if number >= len(features):
            return hidden
        hidden = hidden.clone()
        hidden[self.visual] = hidden[self.visual] + features[number].to(hidden.device, hidden.dtype)
        return hidden

    def cut(self, order: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Follow a cut of the rows."""
        self.visual, self.ours = shorten(self.visual, self.ours, order, valid)
