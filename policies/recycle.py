"""Recycling of dropped tokens: those in one cell of a coarse grid become one token.

VFlowOpt's first stage. Tokens of low importance are grouped by cell; the most important one of each group stays, and
its features become the weighted mean of the group. Official:
``prepare_inputs_labels_for_multimodal`` in ``llava_qwen_training_free.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..contract.policy import Keep
from ..kernels import gather_rows, merge_rows, to_device


@dataclass(frozen=True)
class Cells:
    """The cell of a coarse grid that each token is in.

    ``number`` is int64 ``(tokens,)``, from 0 to ``count - 1``.
    """

    number: torch.Tensor
    count: int

    @classmethod
    def of(cls, grids: list[tuple[int, int]], side: float, device: torch.device | str = "cpu") -> Cells:
        """Cells of ``side`` x ``side`` tokens; ``side`` need not be an integer.

        ``grids`` are (rows, columns) of token grids that follow one another and share no cells.
        """
        numbers: list[int] = []
        count = 0
        for rows, columns in grids:
            down, across = _lines(rows, side), _lines(columns, side)
            numbers += [count + row * (across[-1] + 1) + column for row in down for column in across]
            count += (down[-1] + 1) * (across[-1] + 1)
        return cls(to_device(numbers, device), count)


def _lines(tokens: int, side: float) -> list[int]:
    """The row (or column) of cells that each row of tokens is in; computed in fp32, as in the released code."""
    lines: list[int] = np.floor(np.arange(tokens, dtype=np.float32) / np.float32(side)).astype(int).tolist()
    return lines


def cell_grid(grid: tuple[int, int], side: float) -> tuple[int, int]:
    """Rows and columns of cells that cover ``grid`` (rows and columns of tokens)."""
    return _lines(grid[0], side)[-1] + 1, _lines(grid[1], side)[-1] + 1


def fitting_side(grid: tuple[int, int], side: float, most: int) -> float:
    """``side``, or the next larger one with which ``grid`` has at most ``most`` cells, and at least one."""
    while True:
        down, across = cell_grid(grid, side)
        if down * across <= max(most, 1):
            return side
        side = min(n / (cells - 1) for n, cells in zip(grid, (down, across), strict=True) if cells > 1)


def count_to_merge(order: torch.Tensor, cells: Cells, keep: int) -> torch.Tensor:
    """How many tokens of the lowest scores to merge so that ``keep`` are left: int64 ``(batch, 1)``.

    ``order`` ``(batch, tokens)`` are the tokens by ascending score. In that order, the first merged token of a cell
    does not change the number of tokens, and every later one reduces it by one. So each row reaches exactly ``keep``,
    whatever its scores, if ``keep`` is at least the number of cells.
    """
    tokens = order.shape[1]
    rank = order.argsort(dim=-1)
    cell = cells.number.expand_as(rank)
    first = rank.new_full((len(rank), cells.count), tokens).scatter_reduce(1, cell, rank, "amin")
    leaves_less = (rank != first.gather(1, cell)).gather(1, order)
    left = tokens - leaves_less.cumsum(-1)
    return (left > keep).sum(-1, keepdim=True) + int(keep < tokens)


def group_mean(
    features: torch.Tensor, scores: torch.Tensor, group: torch.Tensor, groups: int, guarded: bool = True
) -> torch.Tensor:
    """Mean features of each group, weighted by score: ``(batch, groups, channels)`` in fp32 or better.

    Args:
        features: ``(batch, tokens, channels)``.
        scores: ``(batch, tokens)``. Weights are scores divided by their sum over the group.
        group: int64 ``(batch, tokens)``, the group of each token, -1 for none.
        groups: number of groups. An empty one gives 0.
        guarded: treat NaN and negative scores as 0, and weight a group of zeros evenly. Without it, negative scores
            lead to weights above 1, and a NaN spreads over its group, as in the released code.
    """
    exact = torch.promote_types(features.dtype, torch.float32)
    scores = scores.to(exact)
    if guarded:
        scores = scores.nan_to_num(nan=0.0).clamp(min=0)
    place, inside = group.clamp(min=0), group >= 0

    def over_group(x: torch.Tensor) -> torch.Tensor:
        """The sum of ``x`` over the group of each token."""
        total = x.new_zeros(len(x), groups).scatter_add(1, place, torch.where(inside, x, 0))
        return total.gather(1, place)

    total = over_group(scores)
    weight = scores / total
    if guarded:
        weight = torch.where(total > torch.finfo(exact).tiny, weight, 1 / over_group(torch.ones_like(scores)))
    return merge_rows(features, group, weight, groups)


def recycle(
    features: torch.Tensor,
    scores: torch.Tensor,
    order: torch.Tensor,
    merge: torch.Tensor | int,
    cells: Cells,
    width: int | None = None,
    guarded: bool = True,
) -> Keep:
    """Merge the tokens of the lowest scores in each cell into one; all others stay as they are.

    A merged token is placed at the token with the highest score in its group.

    Args:
        features: ``(batch, tokens, channels)``.
        scores: importance ``(batch, tokens)``.
        order: int64 ``(batch, tokens)``, the tokens by ascending score.
        merge: how many tokens to merge, one number or int64 ``(batch, 1)``.
        cells: the cell of each token.
        width: tokens that every row keeps then, if known; ``None`` waits for the device.
        guarded: see `group_mean`.
    """
    device = features.device
    low = order.argsort(dim=-1) < merge
    member = (cells.number == torch.arange(cells.count, device=device)[:, None]) & low[:, None]
    group = torch.where(low, cells.number, -1)
    merged = group_mean(features, scores, group, cells.count, guarded).to(features.dtype)
    # by ascending score, so that ties are resolved as in the released code
    rising = member.gather(2, order[:, None].expand_as(member))
    top = torch.where(rising, scores.gather(1, order)[:, None], -torch.inf).argmax(-1)
    is_head = torch.arange(features.shape[1], device=device) == order.gather(1, top)[..., None]
    heads = (is_head & member.any(-1, keepdim=True)).any(1)

    mask = heads | ~low
    keep = Keep.from_mask(mask, int(mask.sum(-1).max()) if width is None else width)
    cell = cells.number.expand_as(mask).gather(1, keep.index)
    rows = torch.where(
        heads.gather(1, keep.index)[..., None], gather_rows(merged, cell), gather_rows(features, keep.index)
    )
    return Keep(keep.index, keep.valid if width is None else None, rows)


def recycle_to(
    features: torch.Tensor, scores: torch.Tensor, grid: tuple[int, int], keep: int, side: float
) -> Keep:
    """Recycle the least important tokens of a ``grid`` so that exactly ``keep`` are left in each row.

    ``features`` ``(batch, tokens, channels)``, ``scores`` ``(batch, tokens)``. Cells have ``side`` tokens, or more
    where there would be more cells than ``keep``.
    """
    cells = Cells.of([grid], fitting_side(grid, side, keep), features.device)
    order = scores.argsort(dim=-1, stable=True)
    merge = count_to_merge(order, cells, keep)
    return recycle(features, scores, order, merge, cells, min(keep, scores.shape[1]))


def recycle_official(
    features: torch.Tensor, scores: torch.Tensor, grids: list[tuple[int, int]], share: float, side: float
) -> Keep:
    """Recycle as the released code does: one recycled token per cell, with room for ``tokens / side ** 2``.

    Each row keeps about ``share`` of its tokens; the numbers differ. NaN ranks highest, and weights are not guarded.
    """
    tokens = scores.shape[1]
    merge = round(tokens * (1 - share)) + int(tokens / side**2)
    cells = Cells.of(grids, side, features.device)
    order = scores.sort(dim=-1).indices  # not stable, as in the released code, so ties are resolved as there
    return recycle(features, scores, order, merge, cells, guarded=False)
