"""Which visual tokens each layer computed. Hooks keep the index tensors they cut with; lists are made on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..contract.policy import Keep
from . import stream

Units = list[list[int]]
"""Per tile, raster numbers of visual tokens, ascending."""

Grids = list[tuple[int, int]]
"""Rows and columns of visual tokens of each tile before pruning."""


def tile_units(keeps: Sequence[Keep] | None, grids: Grids) -> Units:
    """The units of each tile that are kept; all of them where ``keeps`` is ``None``."""
    if keeps is None:
        return [list(range(rows * columns)) for rows, columns in grids]
    return [sorted(units) for keep in keeps for units in keep.tolist()]


@dataclass(frozen=True)
class DecoderTrace:
    """Where the visual tokens of one encode call were in a prefill that dropped some of them between layers.

    Attributes:
        masks: for each kind of placeholder, bool ``(batch, length)``: where they are in the prompts.
        copies: for each kind, how many sequences next to each other share their values.
        kinds: of each encode call of the forward.
        numbers: of each encode call, the visual token that each row is, see `calls.EncodeCall.numbers`.
        number: the index of this call among them.
        layers: for each decoder layer, the rows that it computed: ``order`` and ``valid`` of `rows.Rows`.
    """

    masks: Sequence[torch.Tensor]
    copies: Sequence[int]
    kinds: Sequence[int]
    numbers: Sequence[torch.Tensor]
    number: int
    layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]]

    def units(self, grids: Grids) -> list[Units]:
        """For each decoder layer, the units of each tile that it computed."""
        first = [1]
        for rows, columns in grids:
            first.append(first[-1] + rows * columns)
        # 0 marks text and the tokens of other calls
        values = [x if i == self.number else torch.zeros_like(x) for i, x in enumerate(self.numbers)]
        where = stream.lay_out(values, self.kinds, [mask.cpu() for mask in self.masks], self.copies)
        known: dict[int, Units] = {}
        for order, valid in self.layers:
            if id(order) not in known:
                found = where.gather(1, order.cpu())
                found = found if valid is None else found.masked_fill(~valid.cpu(), 0)
                there = found.unique().tolist()
                known[id(order)] = [
                    [n - begin for n in there if begin <= n < end] for begin, end in pairwise(first)
                ]
        return [known[id(order)] for order, _ in self.layers]
