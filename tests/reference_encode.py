"""Policies that choose around the projector as loops over one tile that anyone can check.

The loops take tensors; `ENCODE` holds the same for a stock model and a tile, in the form of `tests.reference`.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from tests import reference
from vlm_prune.policies.pooling import pooling_cells


def distances(x: torch.Tensor) -> list[list[float]]:
    """One minus the cosine of every pair of tokens ``(tokens, channels)``."""
    return (1 - torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)).tolist()


def ranking(scores: list[float]) -> list[int]:
    """From the highest to the lowest; of equals the first comes first. Rounding errors do not make a difference."""
    return sorted(range(len(scores)), key=lambda i: (-round(scores[i], 12), i))


def agilepruner_units(scores: list[float], x: torch.Tensor, keep: int, average: float | None) -> list[int]:
    """Kept tokens of ``x`` ``(tokens, channels)``; ``average`` effective rank, ``None`` for the image's own."""
    growth = 1.0
    if average is not None:
        share = torch.linalg.svdvals(x.double() - x.double().mean(0))
        share = (share / share.sum().clamp(min=1e-300)).tolist()
        growth = math.exp(-sum(p * math.log(p) for p in share if p > 1e-14)) / average
    order, gap, struck, taken = ranking(scores), distances(x), set(), []
    for rank, i in enumerate(order, start=1):
        if i not in struck and len(taken) < keep:
            taken.append(i)
            tau = min(rank * growth * 0.01, 0.25)
            struck |= {j for j in order if j != i and gap[i][j] < tau}
    taken += [i for i in order if i not in taken][: keep - len(taken)]
    return sorted(taken)


def divprune_units(x: torch.Tensor, keep: int) -> list[int]:
    """Kept tokens of ``x`` ``(tokens, channels)``."""
    gap, everyone = distances(x), range(len(x))
    taken = [max(everyone, key=lambda i: (min(gap[i][j] for j in everyone if j != i), -i))]
    while len(taken) < keep:
        rest = [i for i in everyone if i not in taken]
        taken.append(max(rest, key=lambda i: (min(gap[i][j] for j in taken), -i)))
    return sorted(taken)


def holov_units(scores: list[float], keep: int, runs: int = 16) -> list[int]:
    """Kept tokens by CLS attention ``scores``."""
    count = min(runs, len(scores))
    sizes = [len(scores) // count + (number < len(scores) % count) for number in range(count)]
    stretches, begin = [], 0
    for size in sizes:
        stretches.append(list(range(begin, begin + size)))
        begin += size
    weight = [sum(scores[i] for i in stretch) / len(stretch) for stretch in stretches]
    by_weight = ranking(weight)
    quota = [math.floor(keep * w / sum(weight) * (1 - 1e-6)) for w in weight]
    for number in by_weight[: keep - sum(quota)]:
        quota[number] += 1
    quota = [min(q, size) for q, size in zip(quota, sizes, strict=True)]
    for number in by_weight:
        quota[number] += min(keep - sum(quota), sizes[number] - quota[number])
    best = [
        sorted(stretch, key=lambda i: -scores[i])[:q] for stretch, q in zip(stretches, quota, strict=True)
    ]
    return sorted(i for units in best for i in units)


def visionzip_rows(
    scores: list[float],
    keys: torch.Tensor,
    x: torch.Tensor,
    keep: int,
    share: float = 10 / 64,
    combine: str = "add",
) -> tuple[list[int], torch.Tensor]:
    """Kept tokens of ``x`` ``(tokens, channels)``, and what they become."""
    contextual, order, gap = round(keep * share), ranking(scores), distances(keys)
    dominant, rest = order[: keep - contextual], sorted(order[keep - contextual :])
    targets = rest[:: len(rest) // contextual][:contextual] if contextual else []
    groups: dict[int, list[int]] = {i: [] for i in targets}
    for i in rest:
        if targets and i not in targets:
            groups[min(targets, key=lambda t: gap[i][t])].append(i)
    rows = {i: x[i] for i in dominant}
    for i, group in groups.items():
        if not group:
            rows[i] = x[i]
        else:
            rows[i] = x[i] + x[group].mean(0) if combine == "add" else x[[i, *group]].mean(0)
    return sorted(rows), torch.stack([rows[i] for i in sorted(rows)])


def vispruner_units(scores: list[float], x: torch.Tensor, keep: int, share: float = 0.5) -> list[int]:
    """Kept tokens of ``x`` ``(tokens, channels)``."""
    gap, order, important = distances(x), ranking(scores), int(keep * share)
    taken, rest = order[:important], order[important:] if keep > important else []
    while len(rest) > keep - important:
        first, second = rest[::2], rest[1::2]
        first = sorted(first, key=lambda i: round(min(gap[i][j] for j in second), 12))
        rest = first[min(8, len(rest) - keep + important) :] + second
    return sorted(taken + rest)


# --- of a model ---


def agilepruner(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """With default settings, on a grid that is not LLaVA-1.5's."""
    scores, _, features = seen(model, tile)
    projected = model.model.multi_modal_projector(features)[0, reference._cls(model) :]
    return reference._pick(model, tile, agilepruner_units(scores, projected, target, None))


def divprune(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """The most diverse projected tokens."""
    _, _, features = seen(model, tile)
    projected = model.model.multi_modal_projector(features)[0, reference._cls(model) :]
    return reference._pick(model, tile, divprune_units(projected, target))


def holov(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """With default settings."""
    return reference._pick(model, tile, holov_units(seen(model, tile)[0], target))


def visionzip(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """With default settings."""
    scores, keys, features = seen(model, tile)
    cls = reference._cls(model)
    units, rows = visionzip_rows(scores, keys, features[0, cls:], target)
    return units, model.model.multi_modal_projector(torch.cat([features[0, :cls], rows])[None])[0]


def vispruner(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """With default settings."""
    scores, _, features = seen(model, tile)
    units = vispruner_units(scores, features[0, reference._cls(model) :], target)
    return reference._pick(model, tile, units)


def pool(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """Cell by cell."""
    _, _, features = seen(model, tile)
    cls, side = reference._cls(model), round(reference._units(model) ** 0.5)
    cell, middle = pooling_cells((side, side), target)
    x = features[0, cls:]
    rows = [x[[i for i, c in enumerate(cell) if c == number]].mean(0) for number in range(target)]
    rows = torch.cat([features[0, :cls], torch.stack(rows)])
    return middle, model.model.multi_modal_projector(rows[None])[0]


ENCODE = {
    "agilepruner": agilepruner,
    "divprune": divprune,
    "holov": holov,
    "pool": pool,
    "visionzip": visionzip,
    "vispruner": vispruner,
}
"""Policy -> the kept units of one tile and their projected features."""


def seen(model: nn.Module, tile: torch.Tensor) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """CLS attention and keys of each unit in the consumed layer, and the features that enter the projector."""
    layers, (consumed,), merge = reference._parts(model)
    entering: list[torch.Tensor] = []
    handle = layers[consumed].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    hidden = reference._tower(model, tile[None])
    handle.remove()
    layer = layers[consumed]
    attended, _ = reference._scores(layer, entering[0], 1)
    attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
    norm = layer.layer_norm1 if hasattr(layer, "layer_norm1") else layer.layernorm_before
    keys = attention.k_proj(norm(entering[0]))[0, 1:].unflatten(1, (attention.num_heads, -1)).mean(1)
    features = hidden[:, 1 - reference._cls(model) :]
    if merge > 1:
        side = round(features.shape[1] ** 0.5)
        cells = torch.arange(side * side).view(side // merge, merge, side // merge, merge)
        cells = cells.transpose(1, 2).reshape(-1, merge * merge)
        attended, keys = attended[cells].sum(-1), keys[cells].mean(1)
        features = model.model.pixel_shuffle(features.view(1, side, side, -1)).flatten(1, 2)
    return attended.tolist(), keys, features
