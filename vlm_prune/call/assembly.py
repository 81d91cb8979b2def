"""Between projector and language model, where tiles become images: newlines, padding, resizing, frames.

The stock model's own code assembles the rows; holes pass through it like any features. Sending it the rows' numbers in
place of features shows what it does with each row (`read_packing`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..contract.anatomy import Arrangement
from ..contract.keep import Keep


@dataclass(frozen=True)
class Group:
    """Tokens of an image among which one choice is made; for several members of one shape, such as frames, separately.

    ``rows`` int64 ``(members, tokens)`` are their indices among the image's rows, ``grid`` rows and columns of a
    member, ``tiles`` how many tiles of the tower it represents, ``frames`` how many frames of a video a member is.
    """

    rows: torch.Tensor
    grid: tuple[int, int]
    tiles: int
    frames: int = 1


@dataclass(frozen=True)
class Packing:
    """Where the rows of one image, or one video, come from. All of it is known on the host.

    Attributes:
        tiles: numbers of its tiles in the call.
        source: int64 ``(rows,)``, the unit that each row is, numbered through its tiles; -1 for newlines.
        resized: whether rows blend several units; ``source`` then only says which rows are newlines.
        joint: whether one choice is made among all its tiles, or all its frames.
        groups: what is chosen among together: the thumbnail of an image and the grid of its other tiles, or frames.
        grids: rows and columns of visual tokens of each tile, or of each member of the groups if resized.
        numbers: int64 ``(rows,)``, the token that each row is, counted from 1 through `grids`; 0 for newlines.
    """

    tiles: range
    source: torch.Tensor
    resized: bool
    joint: bool
    groups: list[Group]
    grids: list[tuple[int, int]]
    numbers: torch.Tensor

    @property
    def late(self) -> bool:
        """Whether its tokens can only be chosen after assembly."""
        return self.resized or self.joint

    @property
    def choices(self) -> list[Group]:
        """The groups of tokens among which late choices are made."""
        if not self.joint:
            return self.groups
        rows = torch.cat([group.rows.flatten() for group in self.groups])[None]
        frames = len(self.tiles) if len(self.groups) == 1 else 1
        return [Group(rows, (1, rows.shape[1]), len(self.tiles), frames)]

    @property
    def newline(self) -> torch.Tensor:
        """Bool ``(rows,)``."""
        return self.source < 0

    def kept(self, alive: torch.Tensor) -> list[Keep]:
        """The tokens of each grid of the receipt that reach the language model, of rows ``alive`` ``(rows,)``."""
        sizes = [rows * columns for rows, columns in self.grids]
        mask = torch.zeros(sum(sizes) + 1, dtype=torch.bool, device=alive.device)
        mask[self.numbers.to(alive.device)] = alive
        there = mask[1:].split(sizes)
        return [Keep(torch.arange(len(x), device=x.device)[None], x[None]) for x in there]

    def ends_line(self, alive: torch.Tensor) -> torch.Tensor:
        """The newlines that end a line of tokens of which some are ``alive``: bool ``(rows,)`` like it."""
        newline = self.newline.to(alive.device)
        line = newline.long().cumsum(0) - newline.long()
        if len(self.groups) > 1:  # the thumbnail comes before the first line
            line = (line + 1).index_fill(0, self.groups[0].rows[0].to(alive.device), 0)
        seen = torch.zeros(len(line) + 1, dtype=torch.int64, device=alive.device)
        return newline & (seen.index_add(0, line, alive.long())[line] > 0)


def read_packing(arrangement: Arrangement, grid: tuple[int, int], joint: bool) -> list[Packing]:
    """How stock code assembles the tiles of a call, each a ``grid`` of units.

    ``joint`` says that one choice is made among all tiles of an image, or all frames of a video.
    """
    units, count = grid[0] * grid[1], sum(arrangement.images)
    number = torch.arange(count * units, dtype=torch.float64).view(count, units)
    sent = torch.stack([torch.ones_like(number), number, number**2], -1)
    packings: list[Packing] = []
    first = 0
    for tiles, rows in zip(arrangement.images, arrangement.pack(sent, sent.new_zeros(3)), strict=True):
        one, mean, square = rows.unbind(-1)
        newline = one < 0.5
        # a blend of different numbers has a variance
        resized = bool((square - mean**2)[~newline].abs().gt(1e-4).any())
        source = (mean.round().long() - first * units).masked_fill(newline, -1)
        groups = _groups(newline, tiles, grid, arrangement.frame_grid)
        if resized:
            grids = [group.grid for group in groups for _ in group.rows]
            numbers = (~newline).long().cumsum(0).masked_fill(newline, 0)
        else:
            grids, numbers = [grid] * tiles, source + 1
        packings.append(Packing(range(first, first + tiles), source, resized, joint, groups, grids, numbers))
        first += tiles
    return packings


def _groups(
    newline: torch.Tensor, tiles: int, grid: tuple[int, int], frame_grid: tuple[int, int] | None
) -> list[Group]:
    """Frames of a video; or the thumbnail of an image, and the other tiles together."""
    places = (~newline).nonzero()[:, 0]
    if frame_grid is not None:
        return [Group(places.view(tiles, -1), frame_grid, 1)]
    small, rest = places[None, : grid[0] * grid[1]], places[None, grid[0] * grid[1] :]
    if tiles == 1:
        return [Group(small, grid, 1)]
    height = max(int(newline.sum()), 1)
    return [Group(small, grid, 1), Group(rest, (height, rest.shape[1] // height), tiles - 1)]
