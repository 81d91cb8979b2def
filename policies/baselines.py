"""Baselines that any method must beat: no pruning, random choice, and an even grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..contract.policy import Keep, Place, ScorerPolicy, SelectPolicy
from ..contract.views import FeaturesView
from ..kernels import planned, to_device
from .settings import check_whole


def uniform_index(grid: tuple[int, int], keep: int) -> list[int]:
    """``keep`` cells spread evenly over a ``(rows, columns)`` grid, as raster numbers in ascending order.

    The number of grid rows is chosen for square meshes; each row has its share of the cells at even distances.
    """
    height, width = grid
    rows = min(height, keep, max(round((keep * height / width) ** 0.5), -(-keep // width), 1))
    share = [keep * (r + 1) // rows - keep * r // rows for r in range(rows)]
    return [
        ((2 * r + 1) * height // (2 * rows)) * width + (2 * c + 1) * width // (2 * share[r])
        for r in range(rows)
        for c in range(share[r])
    ]


def random_ranking(content_key: torch.Tensor, units: int, seed: int) -> torch.Tensor:
    """A pseudo-random score per unit, ``(batch, units)`` int64, that depends on the seed and the tile's pixels alone.

    A tile draws the same tokens alone and in any batch, on any device, without a transfer from the host: the numbers
    come from integer mixing (the finaliser of splitmix64) of content, unit number and seed.
    """

    def mix(x: torch.Tensor) -> torch.Tensor:
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
        x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
        return x ^ ((x >> 31) & 0x1FFFFFFFF)

    number = torch.arange(1, units + 1, device=content_key.device, dtype=torch.int64)
    return mix(mix(content_key + seed)[:, None] + number * 0x1E3779B97F4A7C15)


@dataclass(frozen=True)
class Identity(SelectPolicy):
    """Keeps every visual token. The stock model with a receipt."""

    name: ClassVar[str] = "none"
    keeps_all: ClassVar[bool] = True
    place: ClassVar[Place] = "features"

    def select(self, view: FeaturesView) -> None:
        """All of them."""
        return None


@dataclass(frozen=True)
class Random(ScorerPolicy):
    """Keeps tokens drawn at random after the tower (encode stage).

    Attributes:
        seed: changes the draw. The same image always draws the same tokens, whatever else is in the batch.
    """

    name: ClassVar[str] = "random"
    place: ClassVar[Place] = "features"
    default_ratio: ClassVar[float] = 128 / 576

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "seed")

    def score(self, view: FeaturesView) -> torch.Tensor:
        """A pseudo-random number for each token."""
        return random_ranking(view.content_key, view.features.shape[1], self.seed)


@dataclass(frozen=True)
class Uniform(SelectPolicy):
    """Keeps tokens on an even two-dimensional grid after the tower (encode stage)."""

    name: ClassVar[str] = "uniform"
    place: ClassVar[Place] = "features"
    default_ratio: ClassVar[float] = 128 / 576

    def select(self, view: FeaturesView) -> Keep:
        """The same grid for every tile."""
        grid, target, device = view.grid, view.target, view.features.device
        index = planned(
            ("uniform", grid, target, device), lambda: to_device(uniform_index(grid, target), device)
        )
        return Keep(index.expand(len(view.features), -1))
