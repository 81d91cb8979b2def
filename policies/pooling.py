"""Two baselines that ignore the content: average pooling of the visual tokens, and a smaller image.

VTC-Bench (arXiv 2510.07143) finds that plain image downsampling beats many pruning methods; pooling the tower's grid is
how Matryoshka multimodal models (arXiv 2405.17430) make fewer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..contract.grids import middle_of, part
from ..contract.policy import Keep, Policy
from ..contract.views import FeaturesView
from ..kernels import merge_rows, to_device


def pooling_cells(grid: tuple[int, int], keep: int) -> tuple[list[int], list[int]]:
    """Divide a ``(rows, columns)`` grid into ``keep`` cells as square and as equal as can be.

    The grid is cut into bands of rows, each band into its share of the cells, so that any number of cells up to that of
    the units is possible.

    Returns:
        The cell of each unit, in raster order, and the unit in the middle of each cell, ascending.
    """
    height, width = grid
    bands = min(height, keep, max(round((keep * height / width) ** 0.5), -(-keep // width)))
    cell = [0] * (height * width)
    middle: list[int] = []
    for band in range(bands):
        rows = part(band, bands, height)
        cells = keep * (band + 1) // bands - keep * band // bands
        for number in range(cells):
            columns = part(number, cells, width)
            for row in rows:
                for column in columns:
                    cell[row * width + column] = len(middle)
            middle.append(middle_of(rows) * width + middle_of(columns))
    return cell, middle


def pool(features: torch.Tensor, cell: torch.Tensor, cells: int) -> torch.Tensor:
    """Mean of the units of each cell: ``(batch, units, channels)`` -> ``(batch, cells, channels)``, summed in fp32.

    ``cell`` int64 ``(units,)`` says which cell a unit belongs to; every cell has at least one unit.
    """
    exact = torch.promote_types(features.dtype, torch.float32)
    size = torch.zeros(cells, dtype=exact, device=cell.device).scatter_add(
        0, cell, torch.ones_like(cell).to(exact)
    )
    into, weight = (x.expand(len(features), -1) for x in (cell, 1 / size[cell]))
    return merge_rows(features, into, weight, cells).to(features.dtype)


def smaller_grid(grid: tuple[int, int], keep: int) -> tuple[int, int]:
    """Rows and columns of a grid of nearly the same shape with at most ``keep`` cells, and as many as possible."""
    height, width = grid
    ideal = int((keep * height / width) ** 0.5)
    rows = {min(max(r, 1), height, keep) for r in (ideal, ideal + 1)}
    shapes = [(r, min(keep // r, width)) for r in sorted(rows)]
    return max(shapes, key=lambda shape: (shape[0] * shape[1], -abs(shape[0] * width - shape[1] * height)))


@dataclass(frozen=True)
class Pool(Policy):
    """Averages neighbouring tokens on an even grid between tower and projector (encode stage).

    Exactly the budget is kept in each tile. Where no even grid has that many cells, cells differ slightly in size
    between bands of rows. A pooled token is placed in the middle of its cell.
    """

    name: ClassVar[str] = "pool"
    stages: ClassVar[tuple[str, ...]] = ("encode",)
    default_ratio: ClassVar[float] = 0.25
    late: ClassVar[bool] = True

    def encode_final(self, view: FeaturesView) -> Keep:
        """The same cells for every tile."""
        cell, middle = pooling_cells(view.grid, view.target)
        device = view.features.device
        rows = pool(view.features, to_device(cell, device), view.target)
        return Keep(to_device(middle, device).expand(len(rows), -1), rows=rows)


@dataclass(frozen=True)
class Downsample(Policy):
    """Gives the tower a smaller image, so that it makes fewer tokens (encode stage).

    The image keeps its shape as far as whole tokens allow and makes at most as many tokens as the budget: 128 of
    24 x 24 tokens give 11 x 11. The model's own code interpolates the tower's position embeddings.
    """

    name: ClassVar[str] = "downsample"
    stages: ClassVar[tuple[str, ...]] = ("encode",)
    default_ratio: ClassVar[float] = 0.25

    def tower_grid(self, grid: tuple[int, int], target: int) -> tuple[int, int]:
        """The grid of units that the tower computes instead of ``grid``."""
        return smaller_grid(grid, target)
