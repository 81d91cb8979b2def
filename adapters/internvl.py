"""InternVL 2.5, 3 and 3.5 in Hugging Face's own format: ``InternVLForConditionalGeneration``."""

from __future__ import annotations

from typing import Any

from ..contract.anatomy import Anatomy, Family, Tower, feature_layers, square

FAMILIES = {"internvl": Family("InternVL", frames=True)}
"""Families in the README's matrix."""


def anatomy(model: Any) -> Anatomy:
    """The parts of an ``InternVLForConditionalGeneration``."""
    base, config = model.model, model.config
    tower, vision = base.vision_tower, config.vision_config
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"internvl with vision_feature_select_strategy={config.vision_feature_select_strategy!r}: the pixel "
            'shuffle needs a grid without CLS; only "default" can work.'
        )
    patch_height, patch_width = square(vision.patch_size)
    return Anatomy(
        family="internvl",
        base=base,
        tower=Tower(
            module=tower,
            layers=list(tower.encoder.layer),
            attentions=[layer.attention for layer in tower.encoder.layer],
            patch_grid=lambda height, width: (height // patch_height, width // patch_width),
            image_size=square(vision.image_size),
            feature_layers=feature_layers(config.vision_feature_layer, vision.num_hidden_layers),
            has_cls=True,
            keeps_cls=False,
            merge=round(1 / config.downsample_ratio),
        ),
        projector=base.multi_modal_projector,
        decoder=base.language_model,
        decoder_layers=list(base.language_model.layers),
        image_tokens=(config.image_token_id,),
        tile="tile",
    )
