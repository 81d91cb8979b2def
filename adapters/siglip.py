"""A SigLIP tower whose patches become tokens one by one (PaliGemma, DeepSeek-VL), or as means of squares (Gemma 3)."""

from __future__ import annotations

from typing import Any

from ..contract.anatomy import Anatomy, Tower, square
from .features import find_decoder
from .versions import flat_tower


def anatomy(model: Any) -> Anatomy:
    """The parts of a ``PaliGemma-``, ``DeepseekVL-`` or ``Gemma3ForConditionalGeneration``."""
    base, config = model.model, model.config
    tower = base.vision_tower if hasattr(base, "vision_tower") else base.vision_model
    vision, decoder = config.vision_config, find_decoder(model, base)
    if vision.model_type != "siglip_vision_model":
        raise ValueError(f"a {vision.model_type!r} tower: this adapter knows SigLIP only.")
    patch, layers = vision.patch_size, list(flat_tower(tower).encoder.layers)
    projector = base.multi_modal_projector if hasattr(base, "multi_modal_projector") else base.aligner
    merge = getattr(projector, "kernel_size", 1)
    if merge > 1:  # the preceding part of Gemma's projector pools patches, and holes into holes
        projector = projector.mm_soft_emb_norm
    return Anatomy(
        family=config.model_type,
        base=base,
        tower=Tower(
            module=tower,
            layers=layers,
            attentions=[layer.self_attn for layer in layers],
            patch_grid=lambda height, width: (height // patch, width // patch),
            image_size=square(vision.image_size),
            feature_layers=(len(layers) - 1,),
            has_cls=False,
            keeps_cls=False,
            merge=merge,
            resizing={"interpolate_pos_encoding": True},
        ),
        projector=projector,
        decoder=decoder,
        decoder_layers=list(decoder.layers),
        image_tokens=(config.image_token_id,),
        tile="image",
        computes_on=merge > 1,
    )
