"""A stock LLaVA whose visual features come out of a file, for cases recorded on a language model alone."""

from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.parity._files import Golden

VISUAL = 64
"""Vocabulary of the recorded language models; the placeholder of visual tokens is one id more."""


class Tower(nn.Module):
    """No layers; as many tokens as the picture has columns."""

    def __init__(self, config: Any):
        super().__init__()
        self.config, self.encoder = config, nn.Module()
        self.encoder.layers = nn.ModuleList()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        rows = pixel_values.new_zeros(len(pixel_values), 1 + pixel_values.shape[-1], self.config.hidden_size)
        return BaseModelOutputWithPooling(last_hidden_state=rows, hidden_states=(rows, rows))


class Projector(nn.Module):
    """Returns the recorded features, whatever it is given."""

    def __init__(self, features: torch.Tensor):
        super().__init__()
        self.features = features

    def forward(self, tower_features: torch.Tensor) -> torch.Tensor:
        return self.features.clone()


def load_llm(model: LlavaForConditionalGeneration, weights: dict[str, torch.Tensor]) -> None:
    """Load a Llama's recorded weights; the placeholder's row of embeddings and head stays what it is."""
    state = model.state_dict()
    for name, value in weights.items():
        target = name if name == "lm_head.weight" else "model.language_model." + name.removeprefix("model.")
        if target in state:
            state[target][: len(value)] = value.to(state[target].dtype)
    model.load_state_dict(state)


def embeds_model(
    golden: Golden, embeds: torch.Tensor, start: int, count: int
) -> tuple[LlavaForConditionalGeneration, dict[str, torch.Tensor]]:
    """The model and the call that lead to the recorded ``embeds`` ``(batch, rows, channels)`` in the decoder.

    Rows ``start`` to ``start + count`` are visual.
    """
    text = LlamaConfig(
        vocab_size=VISUAL + 1,
        hidden_size=int(golden["hidden_size"]),
        intermediate_size=int(golden["intermediate_size"]),
        num_hidden_layers=int(golden["num_layers"]),
        num_attention_heads=int(golden["num_heads"]),
        num_key_value_heads=int(golden["num_kv_heads"] if "num_kv_heads" in golden else golden["num_heads"]),
        rms_norm_eps=float(golden["rms_eps"]),
        rope_theta=float(golden["rope_theta"]),
        pad_token_id=None,
        eos_token_id=None,
    )
    return given_model(text, golden.prefixed("w/"), embeds, [start] * len(embeds), count)


def recorded_model(
    golden: Golden, starts: list[int]
) -> tuple[LlavaForConditionalGeneration, dict[str, torch.Tensor]]:
    """The same for cases whose sizes, number of visual rows and dtype are in their record.

    The image of sequence ``b`` begins at row ``starts[b]``.
    """
    meta = golden.meta
    dtype = getattr(torch, meta["dtype"])
    text = LlamaConfig(
        vocab_size=VISUAL + 1,
        hidden_size=meta["hidden"],
        intermediate_size=meta["intermediate"],
        num_hidden_layers=meta["layers"],
        num_attention_heads=meta["heads"],
        num_key_value_heads=meta["kv_heads"],
        rms_norm_eps=meta["rms_norm_eps"],
        rope_theta=meta["rope_theta"],
        pad_token_id=None,
        eos_token_id=None,
    )
    weights = golden.prefixed("w/") | {"lm_head.weight": golden["lm_head"]}
    return given_model(text, weights, golden["inputs_embeds"].to(dtype), starts, meta["n_visual"])


def given_model(
    text: LlamaConfig, weights: dict[str, torch.Tensor], embeds: torch.Tensor, starts: list[int], count: int
) -> tuple[LlavaForConditionalGeneration, dict[str, torch.Tensor]]:
    """A LLaVA around a language model, in the dtype of ``embeds``, and the call that leads to these."""
    vision = CLIPVisionConfig(
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        patch_size=1,
        image_size=2,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=VISUAL, vision_feature_layer=-1
    )
    model = LlavaForConditionalGeneration(config).eval().to(embeds.dtype)
    load_llm(model, weights)
    model.config.vision_config.image_size = (1, count)
    images = torch.tensor(starts)[:, None] + torch.arange(count)
    images = images[..., None].expand(-1, -1, embeds.shape[2])
    model.model.vision_tower = Tower(model.config.vision_config)
    model.model.multi_modal_projector = Projector(embeds.gather(1, images))
    placeholder = model.get_input_embeddings().weight[VISUAL].detach()
    given = embeds.scatter(1, images, placeholder.expand(images.shape))
    pixels = torch.zeros(len(embeds), 3, 1, count, dtype=embeds.dtype)
    return model, {"inputs_embeds": given, "pixel_values": pixels}
