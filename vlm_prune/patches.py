"""Patches of several images in one sequence: where each image's are, what is left of them, and pictures of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

Seen = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]
"""Queries, keys and values ``(1, heads, patches, head_dim)`` of an attention call, and its scaling."""


@dataclass
class Tile:
    """One image or frame inside the sequence.

    Attributes:
        begin: number of its first patch in the whole sequence.
        alive: its patches that are left, numbered in the whole sequence, ascending.
        raster: raster number of each of its units in the order in which they stand there; ``None`` if it is the same.
        carry: what policies left per living unit, in raster order.
    """

    begin: int
    alive: torch.Tensor
    raster: torch.Tensor | None
    carry: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Patches left."""
        return len(self.alive)


@dataclass
class PackedState:
    """Where the tiles of a call stand inside the tower. ``fitted`` are a block's arguments for what is alive."""

    tiles: list[Tile]
    patches: int
    seen: list[Seen] = field(default_factory=list)
    fitted: dict[Any, Any] = field(default_factory=dict)
    segments: list[torch.Tensor] = field(default_factory=list)
    segments_dense: list[torch.Tensor] = field(default_factory=list)
    pixels: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def alive(self) -> torch.Tensor:
        """Patches that are left, ascending."""
        if "alive" not in self.fitted:
            self.fitted["alive"] = torch.cat([tile.alive for tile in self.tiles])
        found: torch.Tensor = self.fitted["alive"]
        return found

    @property
    def shortened(self) -> bool:
        """Whether patches were cut."""
        return sum(tile.count for tile in self.tiles) < self.patches


def patches_to_frames(
    patches: torch.Tensor, grid: tuple[int, int], merge: int, frames: int, side: int
) -> torch.Tensor:
    """Patches ``(patches, channels * frames * side**2)`` as pictures ``(frames, channels, height, width)``.

    ``grid`` counts units; the ``merge`` x ``merge`` patches of a unit stand together.
    """
    rows, columns = grid
    x = patches.view(rows, columns, merge, merge, -1, frames, side, side).permute(5, 4, 0, 2, 6, 1, 3, 7)
    return x.reshape(frames, -1, rows * merge * side, columns * merge * side)


def frames_to_patches(
    pictures: torch.Tensor, grid: tuple[int, int], merge: int, frames: int, side: int
) -> torch.Tensor:
    """Inverse of `patches_to_frames`."""
    rows, columns = grid
    x = pictures.view(frames, -1, rows, merge, side, columns, merge, side).permute(2, 5, 3, 6, 1, 0, 4, 7)
    return x.reshape(rows * columns * merge**2, -1)


def window_order(grid: tuple[int, int], window: int, device: torch.device) -> torch.Tensor:
    """Raster numbers of a ``grid``'s units, window by window and in raster order within each: int64 ``(units,)``."""
    rows, columns = grid
    row = torch.arange(rows, device=device)[:, None] // window
    column = torch.arange(columns, device=device) // window
    return (row * columns + column).flatten().argsort(stable=True)


def fit(alive: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A block's arguments for the patches that are left. A window of which nothing is left disappears."""
    ends = kwargs["cu_seqlens"]
    left = torch.searchsorted(alive, ends.to(alive.dtype)).unique_consecutive().to(ends.dtype)
    fitted = {
        "cu_seqlens": left,
        "position_embeddings": tuple(x[alive] for x in kwargs["position_embeddings"]),
    }
    if kwargs.get("max_seqlen") is not None:  # variable-length flash attention
        fitted["max_seqlen"] = int(left.diff().max())
    return fitted


def lengths(segments: list[torch.Tensor]) -> list[list[int]]:
    """How long the sequences are that end at each of these ``cu_seqlens``."""
    known = {id(ends): ends.diff().tolist() for ends in segments}
    return [known[id(ends)] for ends in segments]


def pick(x: torch.Tensor, rows: torch.Tensor | None, dim: int) -> torch.Tensor:
    """Some ``rows`` of ``x``, all of them as they are for ``None``."""
    return x if rows is None else x.index_select(dim, rows)
