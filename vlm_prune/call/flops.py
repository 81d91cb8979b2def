"""Floating-point operations from shapes: 2 per multiply-add, attention without a causal discount."""

from __future__ import annotations

from typing import Any


def decoder_flops(config: Any, tokens: list[int]) -> int:
    """Prefill of a Llama-like decoder with ``tokens[i]`` rows in layer ``i`` (no embedding, no lm_head)."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    weights = 2 * hidden * head_dim * (heads + kv_heads) + 3 * hidden * config.intermediate_size
    return sum(2 * n * weights + 4 * n * n * heads * head_dim for n in tokens)


def tower_flops(width: int, weights: int, segments: list[list[int]]) -> int:
    """A ViT encoder whose layer ``i`` attends over sequences of ``segments[i]`` rows each, CLS counted.

    ``width`` channels, ``weights`` elements in the matrices of a layer; patch embedding and mergers are left out.
    """
    return sum(2 * n * weights + 4 * n * n * width for layer in segments for n in layer)
