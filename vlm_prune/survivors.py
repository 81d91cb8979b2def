"""Which visual tokens each layer computed. Hooks leave the tensors they cut with; lists are made when someone asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from . import stream
from .policies.base import Keep

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
    """Where the visual tokens of one encode call stood in a prefill that dropped some of them between layers.

    Attributes:
        masks: for each kind of placeholder, bool ``(batch, length)``: where they are in the prompts.
        kinds: of each encode call of the forward.
        rows: visual tokens of each encode call, dropped ones included.
        number: which of these calls this is about.
        extra: rows of each tile in front of its units.
        layers: for each decoder layer, the rows that it computed: ``order`` and ``valid`` of `rows.Rows`.
    """

    masks: Sequence[torch.Tensor]
    kinds: Sequence[int]
    rows: Sequence[int]
    number: int
    extra: int
    layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]]

    def units(self, grids: Grids) -> list[Units]:
        """For each decoder layer, the units of each tile that it computed."""
        # tokens are numbered through all tiles, from 1: 0 stands for text, and for what is not a unit of these tiles
        numbers, first = [], [1]
        for rows, columns in grids:
            numbers += [0] * self.extra + list(range(first[-1], first[-1] + rows * columns))
            first.append(first[-1] + rows * columns)
        values = [torch.zeros(count, dtype=torch.int64) for count in self.rows]
        values[self.number] = torch.tensor(numbers)
        where = stream.lay_out(values, self.kinds, [mask.cpu() for mask in self.masks])
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
