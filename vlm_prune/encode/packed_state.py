"""Patches of several images in one sequence: where each image is, what is left of it, and its pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..call import stream

Seen = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]
"""Queries, keys and values ``(1, heads, patches, head_dim)`` of an attention call, and its scaling."""


@dataclass
class Tile:
    """One image or frame inside the sequence.

    Attributes:
        begin: number of its first patch in the whole sequence.
        alive: its patches that are left, numbered in the whole sequence, ascending.
        raster: raster number of each of its units, in sequence order; ``None`` if they are in raster order.
        group: patches of a unit, which are contiguous.
        single: whether single patches are cut, so that the merger's groups are no longer units.
        carry: what policies left per live unit, in raster order.
    """

    begin: int
    alive: torch.Tensor
    raster: torch.Tensor | None
    group: int
    single: bool = False
    carry: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Patches left."""
        return len(self.alive)

    @property
    def units(self) -> torch.Tensor:
        """Raster numbers of its live units, ascending. Single patches are counted by the merger's groups."""
        if self.single:
            return torch.arange(-(-self.count // self.group), device=self.alive.device)
        place = (self.alive[:: self.group] - self.begin) // self.group
        return place if self.raster is None else self.raster[place].sort().values

    @property
    def places(self) -> torch.Tensor:
        """Indices of its live units among those of the whole sequence."""
        return (
            self.begin // self.group + self.units if self.single else self.alive[:: self.group] // self.group
        )

    @property
    def raster_rows(self) -> torch.Tensor | None:
        """Indices of its live patches in raster order of their units; ``None`` if they are in that order."""
        if self.raster is None:
            return None
        order = self.raster[(self.alive[:: self.group] - self.begin) // self.group].argsort()
        return stream.grouped(order, self.group)


@dataclass
class PackedState:
    """The state of the tiles of a call inside the tower.

    Attributes:
        tiles: what is left of each.
        patches: how many there are in the sequence before anything is cut.
        grids: rows and columns of units of each, as the processor prepared it.
        pixels: the tower's input.
        sides: patches along a unit, frames of a patch, pixels along a patch.
        media: the tiles of each image or video, by their numbers.
        fitted: a block's arguments for what is alive.
        seen: what a block's attention computed with, call by call.
        earlier: the same, joined, of blocks that a later one is to be judged with.
    """

    tiles: list[Tile]
    patches: int
    grids: list[tuple[int, int]]
    pixels: torch.Tensor
    sides: tuple[int, int, int]
    media: list[range]
    seen: list[Seen] = field(default_factory=list)
    earlier: dict[int, Seen] = field(default_factory=dict)
    fitted: dict[Any, Any] = field(default_factory=dict)
    segments: list[torch.Tensor] = field(default_factory=list)
    segments_dense: list[torch.Tensor] = field(default_factory=list)
    pictures: dict[int, torch.Tensor] = field(default_factory=dict)

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

    def given(self, i: int) -> torch.Tensor:
        """The patches of tile ``i`` as the processor prepared them: ``(1, patches, values)``."""
        sizes = [rows * columns * self.sides[0] ** 2 for rows, columns in self.grids]
        begin = sum(sizes[:i])
        return self.pixels[None, begin : begin + sizes[i]]

    def frames(self, i: int) -> torch.Tensor:
        """Tile ``i`` as pictures, ``(frames, channels, height, width)``."""
        return patches_to_frames(self.given(i)[0], self.grids[i], *self.sides)

    def picture(self, i: int) -> torch.Tensor:
        """The same as one picture, ``(1, channels, height, width)``: of a video the mean of a patch's frames."""
        if i not in self.pictures:
            self.pictures[i] = self.frames(i).mean(0, keepdim=True)
        return self.pictures[i]

    def reopen(self, rows: torch.Tensor) -> torch.Tensor | None:
        """``rows`` ``(live units, channels)`` among all units; ``None`` if all are live."""
        if not self.shortened:
            return None
        if "places" not in self.fitted:
            self.fitted["places"] = torch.cat([tile.places for tile in self.tiles])
        units = self.patches // self.sides[0] ** 2
        return stream.open_holes(rows[None], self.fitted["places"][None], units, None)[0]


def patches_to_frames(
    patches: torch.Tensor, grid: tuple[int, int], merge: int, frames: int, side: int
) -> torch.Tensor:
    """Patches ``(patches, channels * frames * side**2)`` as pictures ``(frames, channels, height, width)``.

    ``grid`` counts units; the ``merge`` x ``merge`` patches of a unit are contiguous.
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
    """A block's arguments for the remaining patches. A window without any disappears."""
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
    """The lengths of the sequences that these ``cu_seqlens`` delimit."""
    known = {id(ends): ends.diff().tolist() for ends in segments}
    return [known[id(ends)] for ends in segments]


def pick(x: torch.Tensor, rows: torch.Tensor | None, dim: int) -> torch.Tensor:
    """Some ``rows`` of ``x``; ``x`` itself for ``None``."""
    return x if rows is None else x.index_select(dim, rows)
