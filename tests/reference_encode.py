"""Policies that choose around the projector as loops over one tile that anyone can check.

The loops take tensors; `ENCODE` holds the same for a stock model and a tile, in the form of `tests.reference`.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from tests import reference
from vlm_prune.policies.pooling import pooling_cells
from vlm_prune.policies.zooprune import random_directions


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


def cdpruner_units(x: torch.Tensor, keep: int, quality: list[float] | None = None) -> list[int]:
    """Kept tokens of ``x`` ``(tokens, channels)``, by determinants of the whole kernel."""
    r = torch.ones(len(x), dtype=torch.float64) if quality is None else torch.tensor(quality).double()
    cosine = 1 - torch.tensor(distances(x.double())).double()
    kernel = r[:, None] * cosine.fill_diagonal_(1) * r
    taken: list[int] = []

    def volume(units: list[int]) -> float:
        return float(torch.linalg.det(kernel[units][:, units])) if units else 1.0

    while len(taken) < keep:
        rest, before = [j for j in range(len(x)) if j not in taken], volume(taken)
        gain = {j: volume([*taken, j]) / before for j in rest}
        if max(gain.values()) < 1e-5 * float(r.max()) ** 2:
            return sorted(taken + sorted(rest, key=lambda j: (-float(r[j]), j))[: keep - len(taken)])
        taken.append(max(rest, key=lambda j: (gain[j], -j)))
    return sorted(taken)


def divprune_units(x: torch.Tensor, keep: int) -> list[int]:
    """Kept tokens of ``x`` ``(tokens, channels)``."""
    gap, everyone = distances(x), range(len(x))
    taken = [max(everyone, key=lambda i: (min(gap[i][j] for j in everyone if j != i), -i))]
    while len(taken) < keep:
        rest = [i for i in everyone if i not in taken]
        taken.append(max(rest, key=lambda i: (min(gap[i][j] for j in taken), -i)))
    return sorted(taken)


def mmtok_units(
    x: torch.Tensor,
    keep: int,
    text: torch.Tensor | None = None,
    projected: torch.Tensor | None = None,
    temperature: float = 0.02,
    alpha: float = 0.5,
) -> list[int]:
    """Kept tokens of ``x`` ``(tokens, channels)``, a question of ``text`` ``(words, width)`` asked or not."""

    def rows(
        asking: torch.Tensor, asked: torch.Tensor, temperature: float, weight: float
    ) -> list[list[float]]:
        cosine = torch.nn.functional.cosine_similarity(asking[:, None], asked[None], dim=-1)
        return ((cosine / temperature).softmax(-1) * weight / max(len(asking), 1)).tolist()

    worth = rows(x, x, 0.2, alpha)
    if text is not None and projected is not None:
        worth = rows(text, projected, temperature, 1.0) + worth
    cover, taken = [0.0] * len(worth), []
    while len(taken) < keep:
        gain = {
            j: sum(max(0.0, row[j] - covered) for row, covered in zip(worth, cover, strict=True))
            for j in range(len(x))
            if j not in taken
        }
        taken.append(max(gain, key=lambda j: (gain[j], -j)))
        cover = [max(row[taken[-1]], covered) for row, covered in zip(worth, cover, strict=True)]
    return sorted(taken)


def scope_units(
    scores: list[float], x: torch.Tensor, keep: int, alpha: float = 1.0, combine: str = "multi"
) -> list[int]:
    """Kept tokens of ``x`` ``(tokens, channels)``."""
    alike, everyone = (1 - torch.tensor(distances(x))).tolist(), range(len(x))
    cover, taken = [0.0] * len(x), []

    def gain(j: int) -> float:
        raised = sum(max(0.0, alike[i][j] - cover[i]) for i in everyone)
        return raised * scores[j] ** alpha if combine == "multi" else raised + scores[j] ** alpha

    while len(taken) < keep:
        best = max((j for j in everyone if j not in taken), key=lambda j: (gain(j), -j))
        taken.append(best)
        cover = [max(cover[i], alike[i][best]) for i in everyone]
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


def prumerge_rows(
    scores: list[float], keys: torch.Tensor, x: torch.Tensor, keep: int, plus: bool = False
) -> tuple[list[int], torch.Tensor]:
    """Kept tokens of ``x`` ``(tokens, channels)``, and what they become; ``keep`` is at least 2."""
    gap, order, spread = distances(keys), ranking(scores), (keep - 1) // 2 if plus else 0
    taken = order[: keep - 1 - spread]
    others = [i for i in range(len(x)) if i not in taken]
    taken += [others[number * len(others) // spread] for number in range(spread)]
    rest = [i for i in order if i not in taken]
    rows = {}
    for i in taken:
        alike = sorted((j for j in range(len(x)) if j != i), key=lambda j: gap[i][j])[:32]
        rows[i] = x[i] + sum(scores[j] * x[j] for j in alike)
    rows[rest[0]] = sum(scores[j] * x[j] for j in rest)
    return sorted(rows), torch.stack([rows[i] for i in sorted(rows)])


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


def zooprune_units(scores: list[float], x: torch.Tensor, keep: int) -> list[int]:
    """Kept tokens of ``x`` ``(tokens, channels)``, projected."""
    gap, low, high = distances(x), min(scores), max(scores)
    weight = [(s - low) / (high - low + 1e-8) for s in scores]
    taken = [max(range(len(x)), key=lambda i: (weight[i], -i))]
    while len(taken) < keep:
        rest = [i for i in range(len(x)) if i not in taken]
        taken.append(max(rest, key=lambda i: (min(gap[i][j] for j in taken) * weight[i], -i)))
    return sorted(taken)


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


def scope(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """With default settings."""
    scores, _, features = seen(model, tile)
    return reference._pick(model, tile, scope_units(scores, features[0, reference._cls(model) :], target))


def holov(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """With default settings."""
    return reference._pick(model, tile, holov_units(seen(model, tile)[0], target))


def prumerge(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """With default settings: the layer after the consumed one decides, where there is one."""
    layers, (consumed,), merge = reference._parts(model)
    layer, entering = layers[min(consumed + 1, len(layers) - 1)], []
    handle = layer.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    model.model.vision_tower(tile[None])
    handle.remove()
    attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
    norm = layer.layer_norm1 if hasattr(layer, "layer_norm1") else layer.layernorm_before
    query, keys = attention.q_proj(norm(entering[0]))[0, 0], attention.k_proj(norm(entering[0]))[0]
    scores, keys = (keys @ query * len(query) ** -0.5).softmax(0)[1:], keys[1:]
    if merge > 1:
        cells = _cells(round(len(keys) ** 0.5), merge)
        scores, keys = scores[cells].sum(-1), keys[cells].sum(1)
    features, cls = seen(model, tile)[2], reference._cls(model)
    units, rows = prumerge_rows(scores.tolist(), keys, features[0, cls:], target)
    return units, model.model.multi_modal_projector(torch.cat([features[0, :cls], rows])[None])[0]


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


def zooprune(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """With default settings: every token, pushed to and fro in every direction."""
    _, _, features = seen(model, tile)
    x, projector = features[0, reference._cls(model) :], model.model.multi_modal_projector
    pushes = 0.01 * random_directions(64, x.shape[-1], seed=0)
    scores = [float((projector(one + pushes) - projector(one - pushes)).norm(dim=-1).mean()) for one in x]
    return reference._pick(model, tile, zooprune_units(scores, projector(x), target))


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
    "pool": pool,
    "prumerge": prumerge,
    "scope": scope,
    "holov": holov,
    "visionzip": visionzip,
    "vispruner": vispruner,
    "zooprune": zooprune,
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
        cells = _cells(side, merge)
        attended, keys = attended[cells].sum(-1), keys[cells].mean(1)
        features = model.model.pixel_shuffle(features.view(1, side, side, -1)).flatten(1, 2)
    return attended.tolist(), keys, features


def _cells(side: int, merge: int) -> torch.Tensor:
    """The patches of each unit on a square grid of ``side`` patches: int64 ``(units, patches per unit)``."""
    cells = torch.arange(side * side).view(side // merge, merge, side // merge, merge)
    return cells.transpose(1, 2).reshape(-1, merge * merge)
