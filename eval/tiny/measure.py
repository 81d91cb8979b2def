"""Measure a shipped model on fresh scenes: every figure of its card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from rich.progress import track

from ..models import load_model
from ..scenes import make_scenes
from .curves import RATIOS, Subject
from .features import is_tiled
from .pruning import RULES
from .views import SIZES

SEED = 4242
"""Seed of the test scenes; training and its held-out scenes use others."""

ORIGINAL_RULES = ("random", "oracle")
"""Rules that are also measured with original positions."""


def settings() -> Iterator[tuple[str, float, bool]]:
    """Rule, ratio and position rule of every point of the curves; "all" is the common first point."""
    yield "all", 1.0, True
    for packed, rules in ((True, RULES), (False, ORIGINAL_RULES)):
        for rule in rules:
            for ratio in RATIOS[1:]:
                yield rule, ratio, packed


def measure(name: str, full: int, pruned: int) -> dict[str, Any]:
    """Figures of one model: all visual tokens on `full` scenes, the curves on the first `pruned` of them."""
    model, processor = load_model(name, dtype=torch.bfloat16)
    sizes = SIZES if is_tiled(model) else ((128, 128),)
    scenes = list(make_scenes(full, SEED, sizes, min_names=3))
    everything = Subject(model, processor, scenes)
    whole = everything.run("random", 1.0)
    subject = Subject(model, processor, scenes[:pruned], everything.encoded[:pruned])
    curve = [
        subject.run("random" if rule == "all" else rule, ratio, packed) | {"rule": rule}
        for rule, ratio, packed in track(list(settings()), name)
    ]
    parameters = {
        "tower": model.model.vision_tower.num_parameters(),
        "projector": sum(p.numel() for p in model.model.multi_modal_projector.parameters()),
        "total": model.num_parameters(),
    }
    return {
        "model": name,
        "seed": SEED,
        "scenes": full,
        "parameters": parameters,
        "full": whole,
        "curve": curve,
    }
