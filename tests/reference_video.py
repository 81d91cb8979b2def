"""Policies over the frames of a video as loops that anyone can check; ``x`` is ``(frames, tokens, channels)``."""

from __future__ import annotations

import math

import torch
from torch import nn

from tests import reference
from tests.reference_encode import ranking, seen


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / max(float(a.norm() * b.norm()), 1e-24))


def vidcom2_counts(
    x: torch.Tensor, ratio: float, temperature: float = 0.01
) -> tuple[list[int], list[list[float]]]:
    """Tokens of each frame as released, and how like each token is to its video and its frame together."""
    flat, tokens = x.flatten(0, 1), x.shape[1]
    spread = [float((flat[:, c] - flat[:, c].mean()).square().mean()) for c in range(x.shape[2])]
    steady = sorted(range(x.shape[2]), key=lambda c: (spread[c], c))[: max(1, x.shape[2] // 2)]
    unit = x[..., steady] / x[..., steady].norm(dim=-1, keepdim=True).clamp(min=1e-12)
    centre = unit.flatten(0, 1).mean(0)

    def like(token: torch.Tensor, centre: torch.Tensor) -> float:
        far = float((token - centre).square().sum())
        return sum(math.exp(-far / (2 * 2.0**k)) for k in range(-3, 2))

    video = [[like(token, centre) for token in frame] for frame in unit]
    both = [
        [like(token, frame.mean(0)) + seen for token, seen in zip(frame, line, strict=True)]
        for frame, line in zip(unit, video, strict=True)
    ]
    unlike = [-sum(line) / tokens for line in video]
    parts = [math.exp((u - max(unlike)) / temperature) for u in unlike]
    shares = [ratio * (1 + p / sum(parts) - 1 / len(parts)) for p in parts]
    return [min(max(round(min(s, 1.0) * tokens), 1), tokens) for s in shares], both


def vidcom2_units(x: torch.Tensor, keep: int) -> list[int]:
    """Kept tokens, numbered through the frames: the budget is met as vLLM meets its own."""
    frames, tokens, _ = x.shape
    counts, both = vidcom2_counts(x, keep / (frames * tokens))
    taken = [f * tokens + i for f in range(frames) for i in ranking([-v for v in both[f]])[: counts[f]]]
    alike = {f * tokens + i: round(v, 12) for f, line in enumerate(both) for i, v in enumerate(line)}
    while len(taken) > keep:
        taken.remove(max(taken, key=lambda i: (alike[i], i)))
    while len(taken) < keep:
        taken.append(min((i for i in alike if i not in taken), key=lambda i: (alike[i], i)))
    return sorted(taken)


def dycoke_units(x: torch.Tensor, keep: int) -> list[int]:
    """Kept tokens, numbered through the frames; if first frames of windows hold more, even stretches of these."""
    frames, tokens, _ = x.shape
    taken, others, first = [], [f for f in range(frames) if f % 4], range(0, frames, 4)
    if keep < tokens * len(first):
        for number, f in enumerate(first):
            count = keep // len(first) + (number < keep % len(first))
            taken += [f * tokens + -(-(k + 1) * tokens // count) - 1 for k in range(count)]
        return taken
    rest = keep - tokens * (frames - len(others))
    for f in range(frames):
        if f % 4 == 0:
            taken += range(f * tokens, (f + 1) * tokens)
            continue
        before = x[f - 2] if f % 4 == 2 else x[f - 1]
        new = ranking([-cosine(a, b) for a, b in zip(x[f], before, strict=True)])
        count = rest // len(others) + (others.index(f) < rest % len(others))
        taken += [f * tokens + i for i in new[:count]]
    return sorted(taken)


def fastvid_rows(
    x: torch.Tensor,
    attention: list[list[float]],
    keep: int,
    segments: int = 8,
    alike: float = 0.9,
    merged: float = 0.4,
    every: int = 4,
    own: float = 0.6,
) -> tuple[list[int], torch.Tensor]:
    """Kept tokens, numbered through the frames, and what they become; room in every anchor is taken for granted."""
    frames, tokens, channels = x.shape
    mean = x.mean(1)
    next_to = [cosine(mean[f], mean[f + 1]) for f in range(frames - 1)]
    cuts = {f for f in range(frames - 1) if next_to[f] < alike} | set(
        ranking([-c for c in next_to])[: segments - 1]
    )
    budget = [keep // frames + (f < keep % frames) for f in range(frames)]
    few = [int(b * merged) for b in budget]
    rows: dict[int, torch.Tensor] = {}
    rest: list[list[int]] = []
    for f in range(frames):
        order = ranking(attention[f])
        for i in order[: budget[f] - few[f]]:
            rows[f * tokens + i] = x[f, i]
        rest.append(sorted(order[budget[f] - few[f] :]))
    begin = 0
    for end in [*(c + 1 for c in sorted(cuts)), frames]:
        anchors = [f for f in range(begin, end) if (end - 1 - f) % every == 0]
        wanted = sum(few[begin:end])
        pool = torch.stack([x[f, i] for f in range(begin, end) for i in rest[f]])
        for number, f in enumerate(anchors):
            far = {
                i: {j: float((x[f, i] - x[f, j]).norm()) / channels**0.5 for j in rest[f]} for i in rest[f]
            }
            dense = {
                i: math.exp(-sum(d * d for d in sorted(far[i].values())[:4]) / min(4, len(far)))
                for i in rest[f]
            }
            most = max(max(line.values()) for line in far.values())
            gap = {i: min([far[i][j] for j in rest[f] if dense[j] > dense[i]], default=most) for i in rest[f]}
            count = wanted // len(anchors) + (number < wanted % len(anchors))
            centres = sorted(rest[f], key=lambda i: (-gap[i] * dense[i], i))[:count]
            mine: dict[int, list[torch.Tensor]] = {i: [] for i in centres}
            for token in pool if every > 1 else x[f, rest[f]]:
                if centres:
                    mine[max(centres, key=lambda i: (cosine(token, x[f, i]), -i))].append(token)
            for i in centres:
                weight = max(1 / (len(mine[i]) + 1), own)
                average = torch.stack(mine[i]).mean(0) if mine[i] else torch.zeros(channels)
                rows[f * tokens + i] = weight * x[f, i] + (1 - weight) * average
        begin = end
    return sorted(rows), torch.stack([rows[i] for i in sorted(rows)])


# --- of a model ---


def vidcom2(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """An image is a video of one frame."""
    return reference._pick(model, tile, vidcom2_units(_projected(model, tile), target))


def dycoke(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """An image is a video of one frame."""
    return reference._pick(model, tile, dycoke_units(_projected(model, tile), target))


def fastvid(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """An image is a video of one frame."""
    units, rows = fastvid_rows(_projected(model, tile), [seen(model, tile)[0]], target, every=1)
    cls = reference._cls(model)
    front = model.model.multi_modal_projector(seen(model, tile)[2])[0, :cls]
    return units, torch.cat([front, rows])


OF_IMAGES = {"vidcom2": vidcom2, "dycoke": dycoke, "fastvid": fastvid}
"""Policy -> the kept units of one tile and their projected features."""


def _projected(model: nn.Module, tile: torch.Tensor) -> torch.Tensor:
    features = seen(model, tile)[2]
    return model.model.multi_modal_projector(features)[:, reference._cls(model) :]
