"""Dropping tokens without losing them altogether: those of one cell of a coarse grid become one token.

VFlowOpt's first stage. Tokens of low importance are grouped by the cell they lie in; the most important one of each
group stays and takes the weighted mean of the group for its features. Official:
``prepare_inputs_labels_for_multimodal`` in ``llava_qwen_training_free.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Keep


@dataclass(frozen=True)
class Cells:
    """The cell of a coarse grid in which each token lies.

    ``number`` is int64 ``(tokens,)``, from 0 to ``count - 1``.
    """

    number: torch.Tensor
    count: int

    @classmethod
    def of(cls, grids: list[tuple[int, int]], side: float, device: torch.device | str = "cpu") -> Cells:
        """Cells of ``side`` x ``side`` tokens; ``side`` need not be whole: a row lies in cell row ``row // side``.

        ``grids`` are (rows, columns) of token grids that stand one behind the other and share no cells.
        """
        numbers: list[int] = []
        count = 0
        for rows, columns in grids:
            down, across = cell_grid((rows, columns), side)
            numbers += [
                count + int(row // side) * across + int(column // side)
                for row in range(rows)
                for column in range(columns)
            ]
            count += down * across
        return cls(torch.tensor(numbers, device=device), count)


def cell_grid(grid: tuple[int, int], side: float) -> tuple[int, int]:
    """Rows and columns of cells that cover ``grid`` (rows and columns of tokens)."""
    return int((grid[0] - 1) // side) + 1, int((grid[1] - 1) // side) + 1


def fitting_side(grid: tuple[int, int], side: float, most: int) -> float:
    """``side``, or the next larger one with which ``grid`` has at most ``most`` cells, and one at least."""
    while True:
        down, across = cell_grid(grid, side)
        if down * across <= max(most, 1):
            return side
        side = min(n / (cells - 1) for n, cells in zip(grid, (down, across), strict=True) if cells > 1)


def lowest(scores: torch.Tensor, drop: int) -> torch.Tensor:
    """The ``drop`` tokens of lowest score: bool like ``scores`` ``(batch, tokens)``. NaN ranks highest."""
    return scores.argsort(dim=-1, stable=True).argsort(dim=-1) < drop


def lowest_leaving(scores: torch.Tensor, cells: Cells, keep: int) -> torch.Tensor:
    """The tokens of lowest score, as many that ``keep`` are left once those of each cell have become one.

    ``scores`` is ``(batch, tokens)``; the result bool like it. Going up in score, the first token of a cell leaves as
    many as before, every later one leaves one less. So each row reaches exactly ``keep``, whatever its scores are,
    if ``keep`` is at least the number of cells.
    """
    tokens = scores.shape[1]
    order = scores.argsort(dim=-1, stable=True)
    rank = order.argsort(dim=-1)
    cell = cells.number.expand_as(rank)
    first = rank.new_full((len(rank), cells.count), tokens).scatter_reduce(1, cell, rank, "amin")
    leaves_less = (rank != first.gather(1, cell)).gather(1, order)
    left = tokens - leaves_less.cumsum(-1)
    merged = (left > keep).sum(-1, keepdim=True) + int(keep < tokens)
    return rank < merged


def group_mean(
    features: torch.Tensor, scores: torch.Tensor, member: torch.Tensor, guarded: bool = True
) -> torch.Tensor:
    """Mean features of each group, weighted by score: ``(batch, groups, channels)`` in fp32 or better.

    Args:
        features: ``(batch, tokens, channels)``.
        scores: ``(batch, tokens)``. Weights are scores divided by their sum over the group.
        member: bool ``(batch, groups, tokens)``. An empty group gives 0, or NaN if not guarded.
        guarded: take NaN and negative scores for 0, and weight a group of zeros evenly. Without it, negative scores
            make weights beyond 1 and a NaN spreads over its group, as in the released code.
    """
    exact = torch.promote_types(features.dtype, torch.float32)
    scores = scores.to(exact)
    if guarded:
        scores = scores.nan_to_num(nan=0.0).clamp(min=0)
    weight = torch.where(member, scores[:, None], 0)
    total = weight.sum(-1, keepdim=True)
    weight = weight / total
    if guarded:
        even = member.to(exact) / member.sum(-1, keepdim=True).clamp(min=1)
        weight = torch.where(total > torch.finfo(exact).tiny, weight, even)
    return weight @ features.to(exact)


def recycle(
    features: torch.Tensor,
    scores: torch.Tensor,
    low: torch.Tensor,
    cells: Cells,
    width: int | None = None,
    guarded: bool = True,
) -> Keep:
    """Make one token of the tokens ``low`` of each cell; all others stay as they are.

    The merged token stands where the one of highest score in its group stood.

    Args:
        features: ``(batch, tokens, channels)``.
        scores: importance ``(batch, tokens)``.
        low: bool ``(batch, tokens)``, the tokens to merge.
        cells: the cell of each token.
        width: tokens that every row then keeps, if that is known; ``None`` waits for the device to find out.
        guarded: see `group_mean`.
    """
    device = features.device
    member = (cells.number == torch.arange(cells.count, device=device)[:, None]) & low[:, None]
    merged = group_mean(features, scores, member, guarded).to(features.dtype)
    head = torch.where(member, scores[:, None], -torch.inf).argmax(-1, keepdim=True)
    is_head = (torch.arange(features.shape[1], device=device) == head) & member.any(-1, keepdim=True)
    heads = is_head.any(1)

    mask = heads | ~low
    keep = Keep.from_mask(mask, int(mask.sum(-1).max()) if width is None else width)
    index = keep.index[..., None].expand(-1, -1, features.shape[2])
    cell = cells.number.expand_as(mask).gather(1, keep.index)[..., None].expand_as(index)
    rows = torch.where(
        heads.gather(1, keep.index)[..., None], merged.gather(1, cell), features.gather(1, index)
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
    return recycle(features, scores, lowest_leaving(scores, cells, keep), cells, min(keep, scores.shape[1]))


def recycle_official(
    features: torch.Tensor, scores: torch.Tensor, grids: list[tuple[int, int]], share: float, side: float
) -> Keep:
    """Recycle as the released code does: one recycled token a cell, where room was made for ``tokens / side ** 2``.

    Rows keep about ``share`` of their tokens, each its own number. NaN ranks highest, and nothing guards the weights.
    """
    tokens = scores.shape[1]
    drop = round(tokens * (1 - share)) + int(tokens / side**2)
    cells = Cells.of(grids, side, features.device)
    return recycle(features, scores, lowest(scores, min(drop, tokens)), cells, guarded=False)
