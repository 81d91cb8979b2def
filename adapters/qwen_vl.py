"""Qwen-VL and the many families with such a tower: images of any size, packed into one sequence of patches.

Qwen2-VL, 2.5-VL, 3-VL and 3.5, their Omni and mixture-of-experts relatives, GLM-4.xV, GLM-OCR, EXAONE 4.5, Cosmos and
HyperCLOVA X. Some attend within windows in most blocks and sort their units by window (2.5), some hand features of
several blocks to the first layers of the decoder (deepstack, 3), most have multimodal RoPE: all read off the model.
"""

from __future__ import annotations

from typing import Any

from ..contract.anatomy import Anatomy, Family, PackedTower

FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL", cls=False),
    "qwen2_5_vl": Family("Qwen2.5-VL", cls=False),
    "qwen3_vl": Family("Qwen3-VL", cls=False),
}
"""Families in the README's matrix."""


def anatomy(model: Any) -> Anatomy:
    """The parts of a model whose tower has ``blocks`` and a ``merger``, under whatever name."""
    base, config = getattr(model, "model", model), model.config
    if not hasattr(
        base, "get_image_features"
    ):  # the language model's layers and its head are one module further up
        base = model
    tower, vision = base.visual if hasattr(base, "visual") else base.vision_model, config.vision_config
    # what the first generation calls hidden_size is that of the decoder
    first = hasattr(vision, "embed_dim")
    width = vision.embed_dim if first else vision.hidden_size
    inner = int(width * vision.mlp_ratio) if first else vision.intermediate_size
    matrices = 3 if hasattr(tower.blocks[0].mlp, "gate_proj") else 2
    windowed = hasattr(tower, "fullatt_block_indexes")
    decoder = base.language_model if hasattr(base, "language_model") else base.model
    tokens = (config.image_token_id, config.video_token_id)
    return Anatomy(
        family=config.model_type,
        base=base,
        tower=PackedTower(
            module=tower,
            layers=list(tower.blocks),
            attentions=[block.attn for block in tower.blocks],
            merge=vision.spatial_merge_size,
            patch=(vision.temporal_patch_size, vision.patch_size),
            window=vision.window_size // vision.spatial_merge_size // vision.patch_size if windowed else None,
            deepstack=list(getattr(tower, "deepstack_merger_list", ())),
            single_patches=first,
            width=width,
            weights=4 * width**2 + matrices * width * inner,
        ),
        projector=tower.merger,
        decoder=decoder,
        decoder_layers=list(decoder.layers),
        image_tokens=tuple(dict.fromkeys(tokens)),
        tile="image",
        mrope=hasattr(base, "get_rope_index"),
        computes_on=hasattr(base, "projector"),
    )
