"""Tiny LLaVAs whose decoders are not all of full attention: windows, linear attention, convolutions, indexers, MLA.

What a decoder does with a shortened prompt does not depend on the tower, so LLaVA's serves for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, LlavaForConditionalGeneration

from tests.models import VOCAB, _llava, peaky

WINDOW = 7
"""Shorter than what is left of an image, so that a window that counts wrongly is seen."""


def _text(model_type: str, **changes: Any) -> Any:
    base = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return CONFIG_MAPPING[model_type](**{**base, **ids, "num_hidden_layers": 4, "head_dim": 8, **changes})


MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}

DECODERS: dict[str, Callable[[], Any]] = {
    "mistral": lambda: _text("mistral", sliding_window=WINDOW),
    "cohere2": lambda: _text("cohere2", sliding_window=WINDOW, layer_types=MIXED),
    "exaone4": lambda: _text("exaone4", sliding_window=WINDOW, layer_types=MIXED),
    "gemma3": lambda: _text("gemma3_text", sliding_window=WINDOW, layer_types=MIXED),
    "qwen3_5": lambda: _text("qwen3_5_text", **LINEAR),
    "lfm2": lambda: _text("lfm2", layer_types=["conv", "full_attention", "conv", "full_attention"]),
    "deepseek_v3": lambda: _text(
        "deepseek_v3",
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
}
"""Decoder -> its config."""

WINDOWED = ["mistral", "cohere2", "exaone4", "gemma3"]
STATEFUL = ["qwen3_5", "lfm2"]


def make(decoder: str, attention: str = "sdpa") -> nn.Module:
    """A LLaVA with this decoder, as `tests.models.make` makes others."""
    return peaky(_llava(DECODERS[decoder]()), attention)


@cache
def shared(decoder: str, attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """The model of `make`, made once: for tests that give it back as it was."""
    return make(decoder, attention)
