"""What pruning has to give for images of several tiles: the rows of one image, put together patch by patch."""

from __future__ import annotations

import torch
from torch import nn

from tests import reference
from tests.arranged import IMAGE, SIDE, ArrangedPrompt, Canvas, shape
from vlm_prune.encode.fixed import content_key
from vlm_prune.policies.baselines import random_ranking, uniform_index


def image_rows(
    model: nn.Module, prompt: ArrangedPrompt, image: int, policy: str, ratio: float
) -> tuple[list[torch.Tensor | None], list[list[int]]]:
    """Features of each row of one image, ``None`` where dropped, and the units kept of each tile (or of each grid)."""
    tiles, newline = prompt.pictures[image], model.model.image_newline
    if len(tiles) > 1:
        canvas = Canvas.of(*prompt.sizes[image])
        if shape(prompt.family, canvas) != (len(canvas.rows), len(canvas.columns)):
            return _resized(model, tiles, canvas, shape(prompt.family, canvas), policy, ratio)
    target = round(ratio * SIDE * SIDE)
    chosen = [reference.POLICIES[policy](model, tile, target) for tile in tiles]
    known = [dict(zip(units, features, strict=True)) for units, features in chosen]
    rows: list[torch.Tensor | None] = [known[0].get(unit) for unit in range(SIDE * SIDE)]
    if len(tiles) == 1:
        return [*rows, newline], [sorted(known[0])]
    canvas, entered = Canvas.of(*prompt.sizes[image]), [sorted(known[0]), *([] for _ in known[1:])]
    for row in canvas.rows:
        line = []
        for column in canvas.columns:
            tile, unit = canvas.place(row, column)
            line.append(known[tile].get(unit))
            if line[-1] is not None:
                entered[tile].append(unit)
        rows += [*line, newline if any(x is not None for x in line) else None]
    return rows, [sorted(units) for units in entered]


def _resized(
    model: nn.Module,
    tiles: torch.Tensor,
    canvas: Canvas,
    size: tuple[int, int],
    policy: str,
    ratio: float,
) -> tuple[list[torch.Tensor | None], list[list[int]]]:
    """Tokens are chosen among those of the resized grid."""
    features = reference._project(model, reference._tower(model, tiles))
    whole, grid = features[0], _canvas(features, canvas, size)
    scores = torch.stack([reference.flow_scores(model, tile) for tile in tiles])
    key = (content_key(tiles) * (torch.arange(len(tiles)) * 2 + 1)).sum()
    kept = []
    for number, (cells, flow) in enumerate(
        [((SIDE, SIDE), scores[0]), (size, _canvas(scores[..., None], canvas, size)[:, 0])]
    ):
        count = cells[0] * cells[1]
        target = round(ratio * count)
        if policy == "none":
            kept.append(list(range(count)))
        elif policy == "uniform":
            kept.append(uniform_index(cells, target))
        elif policy == "random":
            lots = random_ranking(key[None] + number, count, seed=0)[0]
            kept.append(lots.topk(target).indices.sort().values.tolist())
        else:
            kept.append(flow.topk(target).indices.sort().values.tolist())
    rows: list[torch.Tensor | None] = [x if i in kept[0] else None for i, x in enumerate(whole)]
    for row in range(size[0]):
        units = range(row * size[1], (row + 1) * size[1])
        line = [grid[unit] if unit in kept[1] else None for unit in units]
        rows += [*line, model.model.image_newline if any(x is not None for x in line) else None]
    return rows, kept


def _canvas(values: torch.Tensor, canvas: Canvas, size: tuple[int, int]) -> torch.Tensor:
    """Values ``(tiles, patches, channels)`` on the canvas, resized: ``(rows * columns, channels)``."""
    full = torch.stack(
        [torch.stack([values[canvas.place(row, column)] for column in canvas.columns]) for row in canvas.rows]
    )
    small = torch.nn.functional.interpolate(full.permute(2, 0, 1)[None], size, mode="bilinear")
    return small[0].flatten(1).T


def arranged_choose(model: nn.Module, prompt: ArrangedPrompt, policy: str, ratio: float) -> reference.Kept:
    """Rows of all images; ``units`` are those of each tile, image after image."""
    found = [image_rows(model, prompt, image, policy, ratio) for image in range(len(prompt.pictures))]
    return reference.Kept([tile for _, kept in found for tile in kept], [rows for rows, _ in found])


def arranged_shorten(
    model: nn.Module, prompt: ArrangedPrompt, kept: reference.Kept, positions: str
) -> reference.Short:
    """The prompt's embeddings without dropped tokens and padding, padded on the left to a batch."""
    table, places, embeds, rows = model.get_input_embeddings(), [], [], []
    for ids, mask, images in zip(prompt.ids, prompt.mask.bool(), prompt.tiles, strict=True):
        is_image = ids == IMAGE
        live, embedded = mask & ~is_image, table(ids).clone()
        features = [row for image in images for row in kept.features[image]]
        for place, row in zip(is_image.nonzero()[:, 0].tolist(), features, strict=True):
            if row is not None:
                live[place], embedded[place] = True, row
        number = (mask.long().cumsum(0) - 1).clamp(min=0)
        rows.append(live.nonzero()[:, 0].tolist())
        embeds.append(embedded[live])
        places.append(number[live] if positions == "original" else torch.arange(int(live.sum())))
    return reference.Short.padded(embeds, places, rows)
