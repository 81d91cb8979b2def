"""Where the parts of vLLM's models are, as `vlm_prune.adapters` says for models of transformers."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ..contract.anatomy import PackedTower, Tower, square
from .plan import Tiles


class Parts(NamedTuple):
    """The modules of a vLLM model that pruning touches.

    Attributes:
        tower: its ``attentions`` are vLLM's encoder attention modules, called with query, key and value
            ``(tiles, tokens, heads * head size)``.
        stack: runs the tower's layers and returns their last hidden states, CLS first.
        projector: takes the tower's features ``(tiles, units, channels)``.
        heads: of a tower layer, over all tensor-parallel ranks.
    """

    tower: Tower
    stack: nn.Module
    projector: nn.Module
    heads: int


class PackedParts(NamedTuple):
    """The same of a model whose tower takes images of any size.

    Attributes:
        tower: its ``attentions`` are called with query, key and value ``(1, patches, heads, head size)``, after the
            rotary embedding, once for all images and windows.
        projector: the merger, takes ``(patches, 1, channels)``.
        heads: of a tower layer, over all tensor-parallel ranks.
    """

    tower: PackedTower
    projector: nn.Module
    heads: int


def llava_parts(model: Any, tiles: Tiles) -> Parts:
    """Of vLLM's ``LlavaForConditionalGeneration``, whose CLIP tower ends at the consumed layer."""
    vision, stack = model.config.vision_config, model.vision_tower.vision_model.encoder
    patch, layers = vision.patch_size, list(stack.layers)
    tower = Tower(
        module=model.vision_tower,
        layers=layers,
        attentions=[layer.self_attn.attn for layer in layers],
        patch_grid=lambda height, width: (height // patch, width // patch),
        image_size=square(vision.image_size),
        feature_layers=(tiles.feature_layer,),
        has_cls=True,
        keeps_cls=bool(tiles.extra),
        merge=1,
    )
    return Parts(tower, stack, model.multi_modal_projector, vision.num_attention_heads)


def internvl_parts(model: Any, tiles: Tiles) -> Parts:
    """Of vLLM's ``InternS1ForConditionalGeneration``, which runs InternVL checkpoints in Hugging Face's format."""
    vision, stack = model.config.vision_config, model.vision_tower.encoder
    patch_height, patch_width = square(vision.patch_size)
    layers = list(stack.layer)
    tower = Tower(
        module=model.vision_tower,
        layers=layers,
        attentions=[layer.attention.attn for layer in layers],
        patch_grid=lambda height, width: (height // patch_height, width // patch_width),
        image_size=square(vision.image_size),
        feature_layers=(tiles.feature_layer,),
        has_cls=True,
        keeps_cls=False,
        merge=round(1 / model.config.downsample_ratio),
    )
    return Parts(tower, stack, model.multi_modal_projector, vision.num_attention_heads)


def qwen_parts(model: Any, tiles: Tiles) -> PackedParts:
    """Of vLLM's ``Qwen2_5_VLForConditionalGeneration`` and ``Qwen3VLForConditionalGeneration``."""
    vision, module = model.config.vision_config, model.visual
    blocks, width = list(module.blocks), vision.hidden_size
    windowed = hasattr(vision, "window_size")
    tower = PackedTower(
        module=module,
        layers=blocks,
        attentions=[block.attn.attn for block in blocks],
        merge=vision.spatial_merge_size,
        patch=(vision.temporal_patch_size, vision.patch_size),
        window=vision.window_size // vision.spatial_merge_size // vision.patch_size if windowed else None,
        deepstack=list(getattr(module, "deepstack_merger_list", ())),
        single_patches=False,
        width=width,
        weights=4 * width**2 + (3 if windowed else 2) * width * vision.intermediate_size,
    )
    return PackedParts(tower, module.merger, vision.num_heads)
