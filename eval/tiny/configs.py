"""Sizes of the three models in stock transformers configurations, and their processors."""

from __future__ import annotations

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
)
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from ..scenes import PATCH
from .views import SIDE
from .vocabulary import CHAT_TEMPLATE, build_tokenizer

MEAN, STD = list(IMAGENET_STANDARD_MEAN), list(IMAGENET_STANDARD_STD)
"""Pixel normalisation of both towers."""

CLIP_LAYER, INTERNVIT_LAYER = -2, -1
"""Hidden state that the language model consumes."""

MAX_TILES = 4
"""Most InternVL tiles, the thumbnail not counted."""


def clip_config() -> CLIPVisionConfig:
    """CLIP tower: 6 layers of width 128, 256 patches and CLS, 1.25 M parameters."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="gelu",
    )


def internvit_config() -> InternVLVisionConfig:
    """InternViT tower of the same size, with CLS, biases and layer scale one."""
    return InternVLVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        attention_bias=True,
        image_size=(SIDE, SIDE),
        patch_size=(PATCH, PATCH),
        layer_scale_init_value=1.0,
    )


def build_llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Untrained tiny-llava: 256 visual tokens, a Llama decoder of 8 layers and width 160."""
    tokenizer = build_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=8,
        num_attention_heads=5,
        head_dim=32,
        max_position_embeddings=1024,
        **_ids(tokenizer),
    )
    config = LlavaConfig(
        vision_config=clip_config(),
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=CLIP_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=MEAN,
        image_std=STD,
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return _finish(LlavaForConditionalGeneration(config)), processor


def build_internvl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Untrained tiny-internvl: 64 visual tokens a tile, Qwen2 of 8 layers, width 160, 10 / 5 heads."""
    tokenizer = build_tokenizer()
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=8,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        # vLLM's Qwen2 derives the head size from the width, and its Llama reads it: the same network with these biases
        architectures=["LlamaForCausalLM"],
        qkv_bias=True,
        **_ids(tokenizer),
    )
    per_tile = (SIDE // PATCH // 2) ** 2
    config = InternVLConfig(
        vision_config=internvit_config(),
        text_config=text,
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=per_tile,
        downsample_ratio=0.5,
        vision_feature_layer=INTERNVIT_LAYER,
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessor(
        size={"height": SIDE, "width": SIDE},
        crop_to_patches=True,
        min_patches=1,
        max_patches=MAX_TILES,
        image_mean=MEAN,
        image_std=STD,
    )
    video = InternVLVideoProcessor(size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=STD)
    processor = InternVLProcessor(
        images, tokenizer, video, image_seq_length=per_tile, chat_template=CHAT_TEMPLATE
    )
    return _finish(InternVLForConditionalGeneration(config)), processor


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _finish(model: PreTrainedModel) -> PreTrainedModel:
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        max_new_tokens=64,
        do_sample=False,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
    return model
