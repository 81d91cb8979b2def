"""Tiny LLaVAs whose decoders are not all of full attention: windows, linear attention, convolutions, indexers, MLA.

What a decoder does with a shortened prompt does not depend on the tower, so LLaVA's serves for all of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, LlavaForConditionalGeneration

from tests.models import VOCAB, _llava, peaky

WINDOW = 7
"""Shorter than what is left of an image, so that a window that counts wrongly is seen."""


MIXED = ["sliding_attention", "full_attention"] * 2
HYBRID = ["linear_attention", "full_attention"] * 2
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
INDEX = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 2, "mlp_layer_types": ["dense", "sparse"] * 2}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "cohere2": ("cohere2", {"sliding_window": WINDOW, "layer_types": MIXED}),
    "exaone4": ("exaone4", {"sliding_window": WINDOW, "layer_types": MIXED}),
    "gemma3": ("gemma3_text", {"sliding_window": WINDOW, "layer_types": MIXED}),
    "gemma3n": (
        "gemma3n_text",
        {
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": VOCAB,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "llama4": (
        "llama4_text",
        {
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "no_rope_layers": [1, 0, 1, 0],
            "moe_layers": [1],
        },
    ),
    "qwen3_5": (
        "qwen3_5_text",
        {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": HYBRID,
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    "lfm3": (
        "lfm3",
        {"sliding_window": WINDOW, "layer_types": ["conv", "full_attention", "sliding_attention", "conv"]},
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            **EXPERTS,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "full_attention"],
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "inkling2": (
        "inkling2_text",
        {
            **EXPERTS,
            "tie_word_embeddings": False,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": WINDOW,
            "d_rel": 4,
            "rel_extent": 16,
            "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **EXPERTS,
            **LATENT,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "head_dim": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "glm5_next": (
        "glm5_next_text",
        {
            **EXPERTS,
            **LATENT,
            **INDEX,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "layer_types": ["linear_attention", "indexed_attention"] * 2,
            "indexer_types": ["full"] * 4,
            "hc_mult": 2,
            "linear_head_dim": 8,
            "linear_num_heads": 2,
            "index_kpool": 2,
            "n_shared_experts": 1,
        },
    ),
    "hy_v4": (
        "hy_v4_vl_text",
        {
            **EXPERTS,
            **LATENT,
            **INDEX,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "layer_types": ["indexed_attention"] * 4,
            "indexer_types": ["full", "full", "shared", "full"],
            "hc_mult": 2,
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 1, 1]},
        },
    ),
    "minimax_m3": (
        "minimax_m3_vl_text",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "dense_intermediate_size": 32,
            "shared_intermediate_size": 16,
            "rotary_dim": 4,
            "mlp_layer_types": ["dense", "sparse"] * 2,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_block_size": 4,
            "index_topk_blocks": 2,
            "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        },
    ),
}
"""Decoder -> its model type, and what its config changes. A version of transformers may lack some."""

WINDOWED = ["mistral", "cohere2", "exaone4", "gemma3"]
STATEFUL = ["qwen3_5", "lfm2"]
INDEXED = [name for name in ("glm5_next", "hy_v4", "minimax_m3") if KINDS[name][0] in CONFIG_MAPPING]
"""Decoders whose attention looks at chosen keys. What stock code chooses depends on padding, and on what is cached."""
QUICK = ("exaone4", "qwen3_5")
DECODERS = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name, (model_type, _) in KINDS.items()
    if model_type in CONFIG_MAPPING and name not in INDEXED
]
OTHERS = ("gemma3n", "inkling2", "llama4", "lfm3", "nemotron_h")
PLAIN = [d for d in DECODERS if (d if isinstance(d, str) else d.values[0]) not in OTHERS]
"""Those between whose layers any token may be dropped, of four layers like each other two by two."""


def _config(decoder: str) -> Any:
    model_type, changes = KINDS[decoder]
    base = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return CONFIG_MAPPING[model_type](**{**base, **ids, "num_hidden_layers": 4, "head_dim": 8, **changes})


def make(decoder: str) -> LlavaForConditionalGeneration:
    """A LLaVA with this decoder, as `tests.models.make` makes others."""
    return peaky(_llava(_config(decoder)), "eager" if decoder in ("hy_v4", "inkling2") else "sdpa")


@cache
def shared(decoder: str) -> LlavaForConditionalGeneration:
    """The model of `make`, made once: for tests that give it back as it was."""
    return make(decoder)
