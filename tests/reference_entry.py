"""Policies that choose at the decoder's entry, as loops over one tile and the question asked about it."""

from __future__ import annotations

import torch
from torch import nn

from tests import reference
from tests.models import IMAGE, Prompt
from tests.reference_encode import cdpruner_units, mmtok_units


def cdpruner(tower: torch.Tensor, projected: torch.Tensor, question: torch.Tensor, keep: int) -> list[int]:
    """With default settings; ``projected`` is ``(tokens, channels)``, ``question`` ``(rows, channels)``."""
    cosine = torch.nn.functional.cosine_similarity(projected[:, None], question[None], dim=-1).mean(-1)
    quality = (cosine - cosine.min() + 1e-6) / (cosine.max() - cosine.min())
    return cdpruner_units(projected, keep, quality.tolist())


def mmtok(tower: torch.Tensor, projected: torch.Tensor, question: torch.Tensor, keep: int) -> list[int]:
    """With default settings; ``tower`` ``(tokens, ...)`` is what enters the projector."""
    return mmtok_units(tower, keep, question, projected)


ENTRY = {"cdpruner": cdpruner, "mmtok": mmtok}
"""Policy -> the kept units of one tile, from what enters and leaves the projector, and the question's embeddings."""


def entry_choose(model: nn.Module, prompt: Prompt, policy: str, target: int) -> reference.Kept:
    """Keep ``target`` units of every tile, going by the text after its prompt's last image."""
    kept = reference.Kept([], [])
    for ids, mask, tiles in zip(prompt.ids, prompt.mask.bool(), prompt.tiles, strict=True):
        ids = ids[mask]
        last = int((ids == IMAGE).nonzero().max()) if tiles else -1
        asked = ids[last + 1 :] if last + 1 < len(ids) else ids[ids != IMAGE]
        question = model.get_input_embeddings()(asked)
        for tile in tiles:
            _, projected = reference._pick(model, prompt.pixels[tile], range(reference._units(model)))
            units = ENTRY[policy](
                entering(model, prompt.pixels[tile]), projected[reference._cls(model) :], question, target
            )
            kept.units.append(units)
            kept.features.append(reference._pick(model, prompt.pixels[tile], units)[1])
    return kept


def entering(model: nn.Module, tile: torch.Tensor) -> torch.Tensor:
    """What the projector is called with for a tile, CLS left out: ``(units, channels)``."""
    seen: list[torch.Tensor] = []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.get_image_features(tile[None])
    handle.remove()
    return seen[0][0, reference._cls(model) :]
