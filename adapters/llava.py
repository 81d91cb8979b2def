"""LLaVA-1.5: ``LlavaForConditionalGeneration`` around a CLIP tower and any Llama-like decoder."""

from __future__ import annotations

from typing import Any

from ..versions import flat_tower
from .base import Anatomy, Tower, feature_layer, square


def anatomy(model: Any) -> Anatomy:
    """The parts of a ``LlavaForConditionalGeneration``."""
    base = model.model
    tower, config = base.vision_tower, model.config
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        raise ValueError(
            f"llava with a {vision.model_type!r} tower: this adapter knows the CLIP tower (clip_vision_model) only."
        )
    patch, layers = vision.patch_size, list(flat_tower(tower).encoder.layers)
    return Anatomy(
        family="llava",
        base=base,
        tower=Tower(
            module=tower,
            layers=layers,
            attentions=[layer.self_attn for layer in layers],
            patch_grid=lambda height, width: (height // patch, width // patch),
            image_size=square(vision.image_size),
            feature_layer=feature_layer(config.vision_feature_layer, vision.num_hidden_layers, "llava"),
            has_cls=True,
            keeps_cls=config.vision_feature_select_strategy == "full",
            merge=1,
            resizing={"interpolate_pos_encoding": True},
        ),
        projector=base.multi_modal_projector,
        decoder=base.language_model,
        decoder_layers=list(base.language_model.layers),
        image_tokens=(config.image_token_id,),
        tile="image",
    )
