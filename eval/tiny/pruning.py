"""Four reference rules that choose visual tokens: random, uniform, CLS top-k, ground-truth oracle."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from .features import is_tiled

RULES = ("random", "uniform", "cls", "oracle")


def choose(
    rule: str, budget: int, cls: np.ndarray, shares: np.ndarray, grid: int, seed: tuple[int, ...]
) -> np.ndarray:
    """Ascending indices of the `budget` visual tokens that a rule keeps.

    Args:
        rule: one of `RULES`.
        budget: tokens to keep, over all tiles.
        cls: CLS attention per token, `(tokens,)`.
        shares: ground truth of `token_shares`, `(2, objects, tokens)`.
        grid: tokens along a side of one tile.
        seed: of the random rule.
    """
    total = shares.shape[-1]
    if rule == "random":
        kept = np.random.default_rng(seed).permutation(total)[:budget]
    elif rule == "uniform":
        kept = uniform(total, budget, grid)
    elif rule == "cls":
        kept = np.argsort(-cls, kind="stable")[:budget]
    else:
        kept = oracle(shares, budget)
    return np.sort(kept)


def uniform(total: int, budget: int, grid: int) -> np.ndarray:
    """An even lattice per tile, thinned at equal steps to exactly `budget` tokens over all tiles."""
    tiles = total // grid**2
    per_tile = budget / tiles
    step = max(1.0, grid / np.sqrt(per_tile))
    line = np.unique(
        np.minimum(grid - 1, np.floor((np.arange(int(np.ceil(grid / step))) + 0.5) * step))
    ).astype(int)
    lattice = (line[:, None] * grid + line[None]).ravel()
    points = np.concatenate([tile * grid**2 + lattice for tile in range(tiles)])
    if len(points) >= budget:
        return points[np.floor((np.arange(budget) + 0.5) * len(points) / budget).astype(int)]
    rest = np.setdiff1d(np.arange(total), points)
    more = budget - len(points)
    return np.concatenate([points, rest[np.floor((np.arange(more) + 0.5) * len(rest) / more).astype(int)]])


def oracle(shares: np.ndarray, budget: int) -> np.ndarray:
    """Objects in turn give the token that shows most of them; background fills the rest in order."""
    by_object = shares.sum(0)
    orders = [list(np.argsort(-row, kind="stable")[: int((row > 0).sum())]) for row in by_object]
    kept: list[int] = []
    while len(kept) < budget and any(orders):
        for order in orders:
            while order and order[0] in kept:
                order.pop(0)
            if order and len(kept) < budget:
                kept.append(order.pop(0))
    rest = [token for token in range(shares.shape[-1]) if token not in set(kept)]
    return np.array(kept + rest[: budget - len(kept)])


def cls_attention(model: PreTrainedModel, attentions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """CLS attention in the layer whose output is consumed: mean over heads, sum over a token's patches.

    Args:
        model: LLaVA or InternVL.
        attentions: of the tower, per layer `(views, heads, 257, 257)`.

    Returns:
        float32 `(views, visual tokens per view)`.
    """
    row = attentions[model.config.vision_feature_layer][:, :, 0, 1:].float().mean(1)
    if not is_tiled(model):
        return row
    side = int(row.shape[1] ** 0.5)
    return row.view(-1, side // 2, 2, side // 2, 2).sum((2, 4)).flatten(1)
