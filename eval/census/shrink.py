"""Tiny configs of any model type: the class's own defaults with every width, depth and count made small."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .settings import SETTINGS

TYPES: dict[str, str] = dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
"""Model type -> name of its class, for all that this version of transformers maps."""

IMAGE, VIDEO, AUDIO, START, END, PAD, VOCAB = 120, 121, 122, 123, 124, 0, 128
TEXT = range(5, 100)

WIDTH, INNER, DEPTH, HEADS, SHARED, HEAD = 32, 64, 4, 4, 2, 8
PATCH, SIDE = 4, 32
"""Pixels along a patch, and along an image."""


def _each(value: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, int] = {
    **_each(
        WIDTH,
        "hidden_size embed_dim d_model n_embd projection_dim out_hidden_size hidden_dim embedding_dim dim width "
        "encoder_hidden_size text_hidden_size vision_hidden_size output_hidden_size projector_hidden_size out_dim "
        "audio_hidden_size image_text_hidden_size vision_embed_dim text_embed_dim output_proj_dims projection_size "
        "adapter_hidden_size decoder_hidden_size vision_output_dim n_embed mm_hidden_size embed_channels output_dim "
        "emb_dim projection_hidden_size moe_intermediate_size shared_expert_intermediate_size share_expert_dim "
        "expert_ffn_hidden_size word_embed_proj_dim expert_intermediate_size",
    ),
    **_each(
        INNER,
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim mlp_dim n_inner d_ff adapter_intermediate_size "
        "shared_intermediate_size block_ff_dim projector_intermediate_size intermediate_size_mlp "
        "dense_intermediate_size merger_intermediate_size",
    ),
    **_each(DEPTH, "num_hidden_layers depth num_layers n_layer encoder_layers decoder_layers n_layers"),
    **_each(
        HEADS,
        "num_attention_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads n_head "
        "linear_num_key_heads linear_num_value_heads index_n_heads mamba_num_heads linear_num_heads num_experts "
        "n_routed_experts num_local_experts moe_num_experts qk_rope_head_dim",
    ),
    **_each(
        SHARED, "num_key_value_heads num_kv_heads num_query_groups num_experts_per_tok moe_k top_k_experts"
    ),
    **_each(
        HEAD,
        "head_dim attention_head_dim kv_channels v_head_dim qk_nope_head_dim index_head_dim d_kv linear_key_head_dim "
        "linear_value_head_dim linear_head_dim hidden_size_per_layer_input",
    ),
    **_each(16, "kv_lora_rank q_lora_rank num_query_tokens"),
    **_each(1, "n_group topk_group"),
    **_each(0, "num_kv_shared_layers num_nextn_predict_layers mtp_num_layers"),
    **_each(64, "num_position_embeddings position_embedding_size"),
    **_each(VOCAB, "vocab_size vocab_size_per_layer_input"),
    "max_position_embeddings": 256,
}
"""Names that configs have for sizes -> what they are here."""

WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "chunk_size")
LEFT_OUT = ("transformers_version", "architectures", "dtype", "id2label", "label2id", "per_layer_config")


def tiny_config(model_type: str) -> tuple[type, Any]:
    """The class of a model type, and a config that builds it small."""
    cls = getattr(transformers, TYPES[model_type])
    made = _shrunk(cls.config_class().to_dict(), vision=False)
    _merge(made, SETTINGS.get(model_type, {}))
    return cls, cls.config_class(**made)


def tiny_model(model_type: str) -> nn.Module:
    """A model in eval mode, with random weights that make every token matter."""
    cls, config = tiny_config(model_type)
    model: nn.Module = cls(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            continue
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 1 and name.endswith("weight"):  # of a norm; some count from 0, some from 1
            noise = weight.detach() + 0.1 * noise
        elif weight.dim() == 1 or "position" in name:
            noise = 0.2 * noise
        elif weight.dim() > 1 and "embed_tokens" not in name:
            noise = noise * 1.2 / weight[0].numel() ** 0.5
        weight.data.copy_(noise)
    settings: Any = getattr(model, "generation_config", None)
    if settings is not None:  # of a model that writes
        settings.pad_token_id, settings.bos_token_id, settings.eos_token_id = PAD, 1, None
    return model


def _shrunk(config: dict[str, Any], vision: bool) -> dict[str, Any]:
    small = {name: _value(name, value, vision) for name, value in config.items() if name not in LEFT_OUT}
    if isinstance(small.get("patch_size"), int):
        small["patch_size"] = PATCH
        if isinstance(small.get("image_size"), int):
            small["image_size"] = SIDE
    return small


def _value(name: str, value: Any, vision: bool) -> Any:
    """What a config's entry becomes."""
    if isinstance(value, dict):
        if name in ("rope_parameters", "rope_scaling"):
            return _rope(value)
        inside = name.endswith("config") or "model_type" in value
        return _shrunk(value, vision or "vision" in name) if inside else value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and name.endswith(
        ("token_id", "token_index", "token_idx", "_token", "patch_id")
    ):
        return _token(name, value)
    if name in SIZES:
        return [SIZES[name]] * len(value) if isinstance(value, list | tuple) else SIZES[name]
    if name in ("layer_types", "mlp_layer_types", "mlp_only_layers"):
        return [x for x in value if not isinstance(x, int) or x < DEPTH][:DEPTH]
    if name in WINDOWS and not vision and isinstance(value, int):
        return 8
    if name == "deepstack_visual_indexes":
        return [0, 1, 2]
    return [1, 3] if name == "fullatt_block_indexes" else value


def _token(name: str, value: int) -> int:
    if any(word in name for word in ("start", "begin", "boi")):
        return START
    if any(word in name for word in ("end", "eoi")):
        return END
    for word, number in (
        ("image", IMAGE),
        ("video", VIDEO),
        ("audio", AUDIO),
        ("pad", PAD),
        ("bos", 1),
        ("eos", 2),
    ):
        if word in name:
            return number
    return value if value < VOCAB else 3


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    value = copy.deepcopy(value)
    for name, x in value.items():
        value[name] = _rope(x) if isinstance(x, dict) else [1, 1, 2] if name == "mrope_section" else x
    return value


def _merge(config: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(name), dict) and name.endswith("config"):
            _merge(config[name], value)
        else:
            config[name] = copy.deepcopy(value)
