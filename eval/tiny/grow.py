"""Start one decoder from another: a Qwen2 decoder with grouped queries from a Llama decoder of the same width."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def grow_decoder(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Copy language model and output layer of `source` (Llama) into `target` (Qwen2), in place.

    Both have as many key heads; the target has several query heads for each. The first query head of a group is the
    head of the source; the others are new and silent: their part of the output projection is zero. So the target
    computes at first just what the source does.
    """
    target.get_input_embeddings().weight.copy_(source.get_input_embeddings().weight)
    target.lm_head.weight.copy_(source.lm_head.weight)
    old, new = source.model.language_model, target.model.language_model
    new.norm.load_state_dict(old.norm.state_dict())
    for before, after in zip(old.layers, new.layers, strict=True):
        for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
            getattr(after, name).load_state_dict(getattr(before, name).state_dict())
        for name in ("k_proj", "v_proj"):
            getattr(after.self_attn, name).weight.copy_(getattr(before.self_attn, name).weight)
        for name in ("q_proj", "k_proj", "v_proj"):
            nn.init.zeros_(getattr(after.self_attn, name).bias)
        heads, groups = old.config.num_attention_heads, after.self_attn.num_key_value_groups
        width, size = old.config.hidden_size, after.self_attn.head_dim
        queries = after.self_attn.q_proj.weight.view(heads, groups, size, width)
        queries[:, 0] = before.self_attn.q_proj.weight.view(heads, size, width)
        outputs = after.self_attn.o_proj.weight.view(width, heads, groups, size)
        outputs.zero_()
        outputs[:, :, 0] = before.self_attn.o_proj.weight.view(width, heads, size)
