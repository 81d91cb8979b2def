"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, packed into one sequence, with multimodal RoPE.

2.5 attends within windows in most blocks and sorts its units by window. 3 hands features of several blocks to the first
layers of the decoder (deepstack).
"""

from __future__ import annotations

from typing import Any

from ..contract.anatomy import Anatomy, PackedTower


def anatomy(model: Any) -> Anatomy:
    """The parts of a ``Qwen2VL-``, ``Qwen2_5_VL-`` or ``Qwen3VLForConditionalGeneration``."""
    base, config = model.model, model.config
    tower, vision = base.visual, config.vision_config
    windowed, first = config.model_type == "qwen2_5_vl", config.model_type == "qwen2_vl"
    # what the first generation calls hidden_size is that of the decoder
    width = vision.embed_dim if first else vision.hidden_size
    inner = int(width * vision.mlp_ratio) if first else vision.intermediate_size
    matrices = 3 if windowed else 2  # its MLP is gated
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
        decoder=base.language_model,
        decoder_layers=list(base.language_model.layers),
        image_tokens=(config.image_token_id, config.video_token_id),
        tile="image",
        mrope=True,
    )
