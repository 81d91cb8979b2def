"""Models with the layer shapes of published ones, random weights, as many layers as fit the machine: no download."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

TEXT_TOKENS = 32
"""Text of a prompt: 4 tokens in front of the image, the question after it."""

CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
VICUNA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32064}
QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 32064,  # of 152064: the embedding costs memory and no time
}
IMAGE = 32_000


@dataclass(frozen=True)
class Preset:
    """A published model's shapes.

    Attributes:
        model: what is built, in words.
        depth: decoder layers of the published model.
        layers: decoder layers built by default.
        tower_layers: vision layers built.
        tokens: visual tokens kept by default, per tile.
        image: the arguments of a forward that bring one image.
        build: from numbers of decoder and vision layers to a config and its class.
        typed: whether a prompt says of each token whether it stands for an image, as Qwen-VL's does.
    """

    model: str
    depth: int
    layers: int
    tower_layers: int
    tokens: int
    image: Callable[[], Mapping[str, torch.Tensor]]
    build: Callable[[int, int], tuple[type[PreTrainedModel], Any]]
    typed: bool = False

    def make(
        self, layers: int | None, dtype: torch.dtype, device: str, tower: int | None = None
    ) -> PreTrainedModel:
        """The model with ``layers`` decoder layers and ``tower`` vision layers, in eval mode."""
        kind, config = self.build(layers or self.layers, tower or self.tower_layers)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                model = kind(config)
            model = model.to_empty(device=device)
        finally:
            torch.set_default_dtype(before)
        with torch.no_grad():
            torch.manual_seed(0)
            for name, weight in model.named_parameters():
                if name.endswith("norm.weight") or "layer_norm" in name or "layernorm" in name:
                    weight.fill_(1 if name.endswith("weight") else 0)
                else:
                    weight.uniform_(-0.02, 0.02)
            restore_buffers(model, kind, config)
        return model.eval()


def restore_buffers(model: PreTrainedModel, kind: type[PreTrainedModel], config: Any) -> None:
    """Position numbers and rotary frequencies, which are no parameters, as a model of few layers has them."""
    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers = 1
    setattr(
        config.vision_config, "depth" if hasattr(config.vision_config, "depth") else "num_hidden_layers", 1
    )
    small = dict(kind(config).named_buffers())
    for name, buffer in model.named_buffers():
        if name in small:
            buffer.copy_(small[name])


def _llava(layers: int, tower: int) -> tuple[type[PreTrainedModel], Any]:
    vision = CLIPVisionConfig(**{**CLIP_L, "num_hidden_layers": tower}, image_size=336, patch_size=14)
    text = LlamaConfig(**VICUNA_7B, num_hidden_layers=layers)
    return LlavaForConditionalGeneration, LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE
    )


def _llava_next(layers: int, tower: int) -> tuple[type[PreTrainedModel], Any]:
    vision = CLIPVisionConfig(**{**CLIP_L, "num_hidden_layers": tower}, image_size=336, patch_size=14)
    text = LlamaConfig(**VICUNA_7B, num_hidden_layers=layers)
    return LlavaNextForConditionalGeneration, LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_grid_pinpoints=[[672, 672]]
    )


def _onevision(layers: int, tower: int) -> tuple[type[PreTrainedModel], Any]:
    vision = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=tower,
        image_size=384, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    text = Qwen2Config(**QWEN2_7B, num_hidden_layers=layers)
    return LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=IMAGE + 1,
        image_grid_pinpoints=[[768, 768]],
    )  # fmt: skip


def _internvl(layers: int, tower: int) -> tuple[type[PreTrainedModel], Any]:
    vision = InternVLVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=tower,
        image_size=448, patch_size=14, attention_bias=True,
    )  # fmt: skip
    text = Qwen2Config(**QWEN2_7B, num_hidden_layers=layers)
    return InternVLForConditionalGeneration, InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE
    )


def _qwen2_5(layers: int, tower: int) -> tuple[type[PreTrainedModel], Any]:
    vision = {
        "depth": tower, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1_000_000.0}
    text = {
        **QWEN2_7B,
        "num_hidden_layers": layers,
        "rope_parameters": rope,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2, vision_end_token_id=IMAGE + 3, tie_word_embeddings=False,
    )  # fmt: skip


def _host(layers: int, tower: int) -> tuple[type[PreTrainedModel], Any]:
    narrow = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**narrow, num_hidden_layers=tower, image_size=112, patch_size=14)
    text = LlamaConfig(**narrow, num_hidden_layers=layers, vocab_size=32064)
    return LlavaForConditionalGeneration, LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE
    )


def _quick(layers: int, tower: int) -> tuple[type[PreTrainedModel], Any]:
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_hidden_layers=tower,
        image_size=336, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=1024, intermediate_size=2816, num_attention_heads=16,
        num_hidden_layers=layers,
    )  # fmt: skip
    return LlavaForConditionalGeneration, LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE
    )


def _pixels(*shape: int, **more: torch.Tensor) -> Callable[[], Mapping[str, torch.Tensor]]:
    def make() -> Mapping[str, torch.Tensor]:
        return {"pixel_values": torch.randn(*shape, generator=torch.Generator().manual_seed(1)), **more}

    return make


PRESETS = {
    "llava-1.5-7b": Preset(
        "CLIP-L/336 and Vicuna-7B", 32, 2, 24, 64, _pixels(1, 3, 336, 336), _llava
    ),
    "llava-next-7b": Preset(
        "CLIP-L/336 and Vicuna-7B, 2 x 2 tiles", 32, 1, 6, 32,
        _pixels(1, 5, 3, 336, 336, image_sizes=torch.tensor([[672, 672]])), _llava_next,
    ),
    "llava-onevision-7b": Preset(
        "SigLIP-SO400M/384 and Qwen2-7B, 2 x 2 tiles", 28, 1, 6, 64,
        _pixels(1, 5, 3, 384, 384, image_sizes=torch.tensor([[768, 768]])), _onevision,
    ),
    "internvl3-8b": Preset(
        "InternViT-300M/448 and Qwen2.5-7B, 4 tiles", 28, 1, 6, 64, _pixels(4, 3, 448, 448), _internvl
    ),
    "qwen2.5-vl-7b": Preset(
        "Qwen2.5-VL-7B, 672 x 672 pixels", 28, 1, 8, 64,
        _pixels(48 * 48, 3 * 2 * 14 * 14, image_grid_thw=torch.tensor([[1, 48, 48]])), _qwen2_5, typed=True,
    ),
    "host": Preset(
        "LLaVA-1.5-7B's depth at a width of 32", 32, 32, 24, 8, _pixels(1, 3, 112, 112), _host
    ),
    "quick": Preset(
        "a small tower and a decoder of width 1024", 8, 8, 4, 64, _pixels(1, 3, 336, 336), _quick
    ),
}  # fmt: skip
"""Name -> shapes. ``quick`` and ``host`` are no published models; on ``host`` arithmetic is next to nothing."""
