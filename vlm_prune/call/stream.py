"""The token stream as pure tensor functions: opening holes, closing them, and undoing it.

A dropped visual token is a *hole*: a row with a distinctive pattern of NaN, inf and -inf in place of its features.
Stock code moves holes like any features; the language model's entry closes them (`Rows.close`) and its exit restores
the full length (`restore`). Features that overflowed are not holes, and stay visible as NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels import hole, live_order, numbers, place_rows, planned

__all__ = [
    "compact",
    "find_holes",
    "live_order",
    "open_holes",
    "overflow",
    "punch",
    "restore",
    "retarget",
    "split_positions",
    "unit_patches",
]


def open_holes(
    rows: torch.Tensor, index: torch.Tensor, length: int, valid: torch.Tensor | None
) -> torch.Tensor:
    """Put ``rows`` ``(batch, kept, channels)`` back at ``index`` ``(batch, kept)`` among holes, ``length`` rows in all.

    Where ``valid`` ``(batch, kept)`` is False the row stays a hole; there, ``index`` must name dropped rows.
    """
    return place_rows(rows, index, valid, length, torch.nan)


MARKS = 32
"""Channels that identify a hole: a row in which all of them overflowed looks like one with probability 2**-31."""


def find_holes(embeds: torch.Tensor, marked: bool = True) -> torch.Tensor:
    """Which rows of ``(batch, length, channels)`` are holes: bool ``(batch, length)``.

    Where stock code computes with holes (a matrix product or a sum after they were opened), they are no longer
    ``marked``, but still begin with NaN.
    """
    if not marked:
        return embeds[..., 0].isnan()
    first, others = embeds[..., 0], embeds[..., 1:MARKS]
    return first.isnan() & (others == hole(embeds[..., :MARKS])[1:]).all(-1)


def punch(rows: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """``rows`` ``(..., channels)``, holes where ``alive`` ``(...)`` is False."""
    return torch.where(alive[..., None], rows, hole(rows))


def overflow(x: torch.Tensor) -> torch.Tensor:
    """What to add to the rows that are kept of ``x`` ``(tiles, rows, channels)``: ``(tiles, 1, 1)``, NaN or 0.

    NaN where anything in a tile is not finite: otherwise it would go unnoticed in dropped rows.
    """
    largest = torch.linalg.vector_norm(x.detach(), torch.inf, dim=(1, 2), keepdim=True)
    return (largest * 0).to(x.dtype)


def compact(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Pick rows ``order`` ``(batch, length)`` of ``x`` ``(batch or 1, full length, ...)``."""
    x = x.expand(order.shape[0], *x.shape[1:])
    index = order.view(*order.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(*order.shape, *x.shape[2:]))


def split_positions(positions: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Positions in the text, ``None`` if not given, and those for the rotary embeddings.

    With multimodal RoPE these have separate axes, ``(3, batch, rows)``; text positions may precede them.
    """
    if positions.dim() == 2:
        return positions, positions
    return (positions[0], positions[1:]) if len(positions) == 4 else (None, positions)


def restore(x: torch.Tensor, order: torch.Tensor, length: int, valid: torch.Tensor | None) -> torch.Tensor:
    """Inverse of `compact`: ``(batch, length, channels)`` with zeros in every row that ``x`` does not hold."""
    return place_rows(x, order, valid, length, 0.0)


def lay_out(
    values: Sequence[torch.Tensor],
    kinds: Sequence[int],
    masks: Sequence[torch.Tensor],
    copies: Sequence[int],
) -> torch.Tensor:
    """Values of visual tokens, in order, at their placeholders: ``(batch, length)``, 0 elsewhere.

    ``values[i]`` ``(tokens,)`` belong to placeholders of kind ``kinds[i]``, those that are True in ``masks[kinds[i]]``
    ``(batch, length)``. Beams come as copies of a row next to it, so every ``copies[kind]`` rows share their values.
    """
    full = values[0].new_zeros(masks[0].shape)
    for number, (mask, repeats) in enumerate(zip(masks, copies, strict=True)):
        mine = [x for x, kind in zip(values, kinds, strict=True) if kind == number]
        if not mine:
            continue
        joined = mine[0] if len(mine) == 1 else torch.cat(mine)
        if repeats == 1:
            full = full.masked_scatter(mask, joined)
            continue
        some = full[::repeats].masked_scatter(mask[::repeats], joined)
        full = torch.where(mask, some.repeat_interleave(repeats, 0), full)
    return full


def retarget(
    targets: torch.Tensor, order: torch.Tensor, valid: torch.Tensor | None, ignore: int = -100
) -> torch.Tensor:
    """Next-token targets of a shortened sequence, laid out at full length: int64 ``(batch, length)``.

    ``targets[b, i]`` is the label of row ``i + 1``; ``order`` and ``valid`` ``(batch, rows)`` say which rows are left.
    Each of them gets the label of the next one, as if the others had never existed.
    """
    labels = compact(torch.nn.functional.pad(targets[:, :-1], (1, 0), value=ignore), order)
    moved = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore)
    if valid is not None:  # nothing comes before a sequence's first token that could predict it
        moved = moved.masked_fill(~valid, ignore)
    return torch.full_like(targets, ignore).scatter(1, order, moved)


def grouped(index: torch.Tensor, size: int) -> torch.Tensor:
    """The rows of groups ``index`` ``(groups,)`` of ``size`` contiguous rows each."""
    if size == 1:
        return index
    return (index[:, None] * size + numbers(size, index.device)).flatten()


def unit_patches(grid: tuple[int, int], merge: int, device: torch.device) -> torch.Tensor:
    """The raster numbers of the patches of each unit: int64 ``(units, merge * merge)``.

    ``grid`` counts patches; units are ``merge`` x ``merge`` squares of them, numbered in raster order themselves.
    """

    def make() -> torch.Tensor:
        rows, columns = grid
        number = torch.arange(rows * columns, device=device).view(
            rows // merge, merge, columns // merge, merge
        )
        return number.permute(0, 2, 1, 3).reshape(-1, merge * merge)

    return planned(("patches", grid, merge, device), make)
