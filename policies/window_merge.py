"""Merging of similar neighbours: windows of a token grid with similar vectors become one token.

Used by MustDrop's encode stage. Computes what its released ``local_merge.py`` (``conditional_pooling``,
``merge_wavg``) computes; each image of a batch is treated separately, except in `batch_minimum`.
"""

from __future__ import annotations

import torch

from ..contract.policy import Keep
from ..kernels import gather_rows, planned


def window_cells(grid: tuple[int, int], window: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The raster numbers of the cells of each window: int64 ``(windows, cells per window)``.

    Windows tile the ``(rows, columns)`` grid from its upper left corner. They are in raster order, and so are the
    cells within one. Cells beyond the last whole window belong to no window.
    """

    def make() -> torch.Tensor:
        (rows, columns), (height, width) = grid, window
        down, across = rows // height, columns // width
        number = torch.arange(rows * columns, device=device).view(rows, columns)
        number = number[: down * height, : across * width].reshape(down, height, across, width)
        return number.permute(0, 2, 1, 3).reshape(down * across, height * width)

    return planned(("windows", grid, window, device), make)


def window_similarity(
    hidden: torch.Tensor, cells: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Mean cosine between the different vectors of each window: fp32 or better ``(batch, windows)``.

    ``hidden`` is ``(batch, cells of the grid, channels)``. Cosines are computed in ``dtype``, by default in fp32 or
    better; their mean always is.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    unit = torch.nn.functional.normalize(hidden.to(dtype or exact), dim=-1)[:, cells]
    cosine = (unit @ unit.mT).to(exact)
    per_window = cells.shape[1]
    pairs = cosine.sum((-1, -2)) - cosine.diagonal(dim1=-2, dim2=-1).sum(-1)
    return pairs / (per_window * (per_window - 1))


def choose_windows(
    similarity: torch.Tensor, threshold: float, most: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Windows to merge, bool like ``similarity``: at most ``most`` at or above ``threshold``, the most similar ones.

    ``most`` is one number, or one per image ``(batch,)``. A window with a NaN never merges.
    """
    chosen = similarity >= threshold
    if most is None:
        return chosen
    rank = similarity.nan_to_num(nan=-torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return chosen & (rank < torch.as_tensor(most, device=similarity.device).view(-1, 1))


def batch_minimum(similarity: torch.Tensor, threshold: float) -> torch.Tensor:
    """The released code's rule: every image merges as many windows as the image of the batch with fewest.

    Returns the windows int64 ``(batch, r)``, the most similar first.
    """
    r = int((similarity >= threshold).sum(-1).min())
    return similarity.topk(r, dim=-1).indices


def survivors(merged: torch.Tensor, cells: torch.Tensor, count: int) -> torch.Tensor:
    """Which of the grid's ``count`` cells are left once each window in ``merged`` is one token: ``(batch, count)``.

    ``merged`` is bool ``(batch, windows)``. A merged window is represented by its last cell.
    """
    alive = merged.new_ones(len(merged), count)
    gone = cells[:, :-1]
    alive[:, gone.flatten()] = ~merged.repeat_interleave(gone.shape[1], dim=1)
    return alive


def merge_means(hidden: torch.Tensor, cells: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    """``hidden`` ``(batch, cells, channels)`` with the plain mean of each merged window in its last cell.

    Summed in fp32 or better. The other cells of a merged window do not change; see `survivors`.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    mean = hidden[:, cells].mean(2, dtype=exact).to(hidden.dtype)
    last = cells[:, -1]
    return hidden.index_copy(1, last, torch.where(merged[..., None], mean, hidden[:, last]))


def merge_flags(flags: torch.Tensor, cells: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    """``flags`` ``(batch, cells)`` with the largest flag of each merged window in the window's last cell."""
    last = cells[:, -1]
    return flags.index_copy(1, last, torch.where(merged, flags[:, cells].amax(-1), flags[:, last]))


def released_order(windows: torch.Tensor, cells: torch.Tensor, count: int) -> torch.Tensor:
    """The order in which the released code lays out what is left: int64 ``(batch, tokens)`` cell numbers.

    First the merged ``windows`` ``(batch, r)`` as given, each named by its last cell, then all other cells in
    raster order.
    """
    batch, r = windows.shape
    loose = torch.ones(batch, count, dtype=torch.bool, device=cells.device)
    loose.scatter_(1, cells[windows].flatten(1), False)
    rest = loose.view(torch.uint8).argsort(dim=-1, descending=True, stable=True)[
        :, : count - r * cells.shape[1]
    ]
    return torch.cat([cells[windows][..., -1], rest], dim=1)


def merge_alike(
    hidden: torch.Tensor, cells: torch.Tensor, threshold: float, most: int | None = None
) -> tuple[torch.Tensor, Keep | None]:
    """Merge the similar windows of each image, at most ``most`` of them.

    ``hidden`` is ``(batch, cells of the grid, channels)``. Returns the merged windows, bool ``(batch, windows)``, and
    what is left of the grid with its new rows; ``None`` if no window is merged.
    """
    count, per_window = hidden.shape[1], cells.shape[1]
    merged = choose_windows(window_similarity(hidden, cells), threshold, most)
    left = (count - merged.sum(-1) * (per_window - 1)).tolist()
    if min(left) == count:
        return merged, None
    keep = Keep.from_mask(survivors(merged, cells, count), max(left))
    rows = gather_rows(merge_means(hidden, cells, merged), keep.index)
    return merged, Keep(keep.index, keep.valid if min(left) < max(left) else None, rows)


def merge_as_released(hidden: torch.Tensor, cells: torch.Tensor, threshold: float) -> Keep | None:
    """Merge as the released code does: one count for the batch, cosines in the model's dtype, merged tokens first.

    The tokens take the first places of the grid in that order, so cell numbers in the result are places in the order.
    """
    similarity = window_similarity(hidden, cells, hidden.dtype)
    windows = batch_minimum(similarity, threshold)
    if windows.shape[1] == 0:
        return None
    merged = torch.zeros_like(similarity, dtype=torch.bool).scatter(1, windows, True)
    order = released_order(windows, cells, hidden.shape[1])
    index = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return Keep(index, None, gather_rows(merge_means(hidden, cells, merged), order))
