"""What a model type needs beside small numbers: entries of its config that depend on each other."""

from __future__ import annotations

from typing import Any

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
AXES = {"text_config": {"rope_parameters": MROPE}}
SPECIAL = {"vision_start_token_id": 123, "vision_end_token_id": 124, "audio_start_token_id": 125}
OMNI = {**AXES, **SPECIAL, "audio_end_token_id": 126}
CODES = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
PINPOINTS = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
QUERIES = {"text_config": {"word_embed_proj_dim": 32}}
BOTH = {"image_token_id": 120, "video_token_id": 121}
SQUARE = {"vision_config": {"patch_size": [4, 4], "image_size": [32, 32]}}
MARKS = {"im_start_id": 123, "im_end_id": 124, "im_newline_id": 125}
LAST_SEES_ALL = {
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
}

SETTINGS: dict[str, dict[str, Any]] = {
    "apertus1p5": {"audio_config": {"codebook_dim": 32}, "audio_tokenizer_config": {"codebook_dim": 32}},
    "aria": {"projector_patch_to_query_dict": {64: 16}},
    "blip-2": {**QUERIES, "image_token_index": 120},
    "chameleon": {
        "image_token_id": 120,
        "vocabulary_map": {
            **{f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": 3 + i for i in range(100)},
            "<image>": 120,
        },
        "vq_config": {**CODES, "resolution": 32, "num_embeddings": 64},
    },
    "cohere_compass": {
        "text_config": {
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "rope_parameters": {
                "sliding_attention": MROPE,
                "full_attention": {**MROPE, "rope_theta": 50000.0},
            },
        },
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 3, "num_experts_per_tok": 2},
        "vision_config": {"sam_config": {"downsample_channels": [32, 32]}},
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": {"image_size": 64, "patch_size": 4}},
    "diffusion_gemma": {
        "text_config": {
            **LAST_SEES_ALL,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        }
    },
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4, "layer_types": None, "mlp_layer_types": None},
        "vision_config": {
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
            "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2,
            "num_experts_per_tok": 2,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "emu3": {
        "image_token_id": 120,
        "vocabulary_map": {
            **{f"<|visual token {i:06d}|>": 3 + i for i in range(100)},
            "<image>": 120,
            "<|extra_200|>": 126,
        },
        "vq_config": {**CODES, "codebook_size": 64},
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": MROPE, "moe_intermediate_size": [32, 32]}},
    "fast_vlm": {
        "vision_config": {"architecture": "test_efficientnet", "hidden_size": 256, "model_args": None}
    },
    "fuyu": {"patch_size": 4},
    "gemma3": {"mm_tokens_per_image": 16},
    "gemma3n": {
        "vision_soft_tokens_per_image": 4,
        "text_config": {
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "intermediate_size": 64,
            "activation_sparsity_pattern": None,
            "laurel_rank": 8,
            "num_kv_shared_layers": 0,
        },
        "vision_config": {
            "architecture": "test_convnext",
            "hidden_size": 64,
            "vocab_size": 8,
            "vocab_offset": 110,
        },
        "audio_config": {"vocab_size": 8, "vocab_offset": 118},
    },
    "gemma4": {
        "text_config": LAST_SEES_ALL,
        "vision_config": {
            **dict.fromkeys(("hidden_size", "intermediate_size"), 32),
            **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 4),
            "head_dim": 8,
            "patch_size": 4,
            "position_embedding_size": 64,
        },
    },
    "gemma4_unified": {"text_config": LAST_SEES_ALL, "vision_config": {"patch_size": 4}},
    "glm46v": AXES,
    "glm4v": AXES,
    "glm4v_moe": {"text_config": {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}},
    "glm5_next": {
        "video_start_token_id": 126,
        "video_end_token_id": 127,
        "text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": 0},
    },
    "glm_ocr": AXES,
    "glmga": AXES,
    "granite4_vision": {
        **PINPOINTS,
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[1, 0], [2, 1]],
        "spatial_target_layers": [0, 1, 2, 3],
        "vision_config": {"hidden_size": 64},
        "qformer_config": {"intermediate_size": 64},
    },
    "granite_docling": {"vision_config": {"use_fine_route": False, "scale_factor": 2}},
    "hunyuan_vl": {
        "text_config": {"rope_parameters": MROPE, "num_key_value_heads": 2, "head_dim": 8},
        **MARKS,
    },
    "hy_v4_vl": {
        "text_config": {
            "qk_rope_head_dim": 8,
            "head_dim": 16,
            "rope_parameters": MROPE,
            "num_key_value_heads": 4,
        },
        **MARKS,
    },
    "inkling2": {"text_config": {"unpadded_vocab_size": 128}},
    "inkling2_loop": {"text_config": {"unpadded_vocab_size": 128}},
    "inkling_mm_model": {"text_config": {"unpadded_vocab_size": 128}, "vision_config": {"patch_size": 40}},
    "instructblip": {**QUERIES, "image_token_index": 120},
    "instructblipvideo": {**QUERIES, "video_token_index": 121},
    "internvl": SQUARE,
    "kimi_k25": {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 8}},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "conv", "full_attention", "conv"]}},
    "llama4": {
        "vision_config": {
            "intermediate_size": 128,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "pixel_shuffle_ratio": 0.5,
        },
        "text_config": {"no_rope_layers": None, "moe_layers": None},
    },
    "llava_next": PINPOINTS,
    "llava_next_video": PINPOINTS,
    "llava_onevision": PINPOINTS,
    "minicpm_ocr": BOTH,
    "minicpmv4_6": BOTH,
    "minicpmv4_7": BOTH,
    "mistral_large4": {
        "text_config": {
            **dict.fromkeys(("kv_source_layers", "no_rope_layers", "indexer_types", "layer_types")),
            "mlp_layer_types": None,
            "num_key_value_heads": 4,
            "qk_rope_head_dim": 8,
            "index_topk": 4,
        }
    },
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [3, 1]},
        "text_config": {"additional_vocab_size": 8},
    },
    "muse_glimmer": {"projector_hidden_size": 32, "out_hidden_size": 128},
    "muse_spark": {"projector_hidden_size": 32, "out_hidden_size": 128},
    "nemotron_h_omni": {**BOTH, "text_config": {"n_groups": 1}},
    "paddleocr_vl": AXES,
    "perception_lm": {
        "vision_config": {
            "architecture": "test_vit",
            "num_features": 64,
            "do_pooling": False,
            "model_args": {"img_size": 32, "patch_size": 4, "embed_dim": 64},
        },
    },
    "qianfan_ocr": SQUARE,
    "qwen2_5_omni_thinker": OMNI,
    "qwen2_5_vl": AXES,
    "qwen2_vl": AXES,
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "rope_parameters": MROPE,
            "hc_lowrank": 8,
        },
    },
    "qwen3_omni_moe_thinker": OMNI,
    "shieldgemma2": {"mm_tokens_per_image": 16},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "vipllava": {"vision_feature_layers": [-2, -3, 1], "vision_feature_layer": [-2, -3, 1]},
}
"""Model type -> entries of its config, merged into the small one."""
