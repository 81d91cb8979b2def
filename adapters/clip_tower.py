"""The CLIP or SigLIP tower of a LLaVA-like model, and what configs say about consumed layers and sizes."""

from __future__ import annotations

from typing import Any

from ..contract.anatomy import Tower, feature_layers, square
from .versions import consumed_layers, flat_tower

CLS = {"clip_vision_model": True, "siglip_vision_model": False}
"""Towers that the LLaVA families come with, and whether their first token is CLS."""


def clip_like_tower(base: Any, config: Any, family: str, keeps_cls: bool) -> Tower:
    """The CLIP or SigLIP tower of a LLaVA-like model. ``keeps_cls``: it passes CLS on, if there is one."""
    tower, vision = base.vision_tower, config.vision_config
    if vision.model_type not in CLS:
        raise ValueError(
            f"{family} with a {vision.model_type!r} tower: this adapter knows {' and '.join(CLS)} only."
        )
    patch, layers = vision.patch_size, list(flat_tower(tower).encoder.layers)
    return Tower(
        module=tower,
        layers=layers,
        attentions=[layer.self_attn for layer in layers],
        patch_grid=lambda height, width: (height // patch, width // patch),
        image_size=square(vision.image_size),
        feature_layers=feature_layers(consumed_layers(config), vision.num_hidden_layers),
        has_cls=CLS[vision.model_type],
        keeps_cls=keeps_cls and CLS[vision.model_type],
        merge=1,
        resizing={"interpolate_pos_encoding": True},
    )
