"""Models with random weights, and processors of their kind: what the processor makes is what the model gets."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipVisionConfig,
)

from vlm_prune.eval.models import model_path

SIDE, PATCH = 64, 8
"""Of a tile, in pixels."""

PINPOINTS = [[64, 128], [128, 64], [128, 128]]
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
QWEN = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><image><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def _words() -> tuple[Any, str, dict[str, int]]:
    """Tokenizer and chat template of a shipped model, and the ids of its placeholders."""
    path = model_path("tiny-llava")
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<{kind}>") for kind in ("image", "video")}
    return tokenizer, (path / "chat_template.jinja").read_text(), ids


def llava_next() -> tuple[nn.Module, Any]:
    """LLaVA-NeXT: tiles of 64 pixels, which may be padded, newlines, and a thumbnail in front."""
    tokenizer, template, ids = _words()
    images = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )
    processor = LlavaNextProcessor(
        images, tokenizer, PATCH, "default", template, image_token="<image>", num_additional_image_tokens=1
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**WIDTHS, num_hidden_layers=5, patch_size=PATCH, image_size=SIDE),
        text_config=LlamaConfig(**WIDTHS, num_hidden_layers=3, vocab_size=len(tokenizer)),
        image_token_id=ids["image_token_id"],
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextForConditionalGeneration(config).eval(), processor


def llava_onevision() -> tuple[nn.Module, Any]:
    """LLaVA-OneVision, which resizes more than two tiles' worth of tokens."""
    tokenizer, template, ids = _words()
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[SIDE, SIDE], *PINPOINTS]),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template,
        image_token="<image>",
        vision_aspect_ratio="anyres_max_2",
    )
    vision = SiglipVisionConfig(
        **WIDTHS, num_hidden_layers=5, patch_size=PATCH, image_size=SIDE, vision_use_head=False
    )
    text = Qwen2Config(**WIDTHS, num_key_value_heads=2, num_hidden_layers=3, vocab_size=len(tokenizer))
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_grid_pinpoints=[[SIDE, SIDE], *PINPOINTS],
        vision_aspect_ratio="anyres_max_2",
        **ids,
    )
    return LlavaOnevisionForConditionalGeneration(config).eval(), processor


def qwen2_vl() -> tuple[nn.Module, Any]:
    """Qwen2-VL: one grid, at the image's own resolution."""
    tokenizer, _, ids = _words()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>"]})
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 40)
    processor = Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=QWEN)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**WIDTHS, "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": len(tokenizer)}
    config = Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={"depth": 4, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 14},
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        **ids,
    )
    return Qwen2VLForConditionalGeneration(config).eval(), processor
