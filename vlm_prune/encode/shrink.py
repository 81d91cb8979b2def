"""A smaller image for the tower: its pixels, and the cells of the full grid that its units represent."""

from __future__ import annotations

import torch

from ..contract.grids import middle_of, part


def grid_places(grid: tuple[int, int], small: tuple[int, int]) -> list[int]:
    """The position of the cells of a ``small`` grid in a larger one: raster numbers of the units at their centre."""
    height, width = grid
    rows = [middle_of(part(r, small[0], height)) for r in range(small[0])]
    return [row * width + middle_of(part(c, small[1], width)) for row in rows for c in range(small[1])]


def shrink(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize ``(tiles, channels, height, width)`` by a bicubic filter that is widened to stop aliasing.

    The filter's weights sum to 1, so it makes no difference whether pixels are normalised before or after.
    """
    exact = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    small = torch.nn.functional.interpolate(exact, (height, width), mode="bicubic", antialias=True)
    return small.to(pixels.dtype)
