"""The vision side of Hugging Face models in the shape of vLLM's modules, for tests of serving that have no vLLM."""

from __future__ import annotations

import copy
from types import SimpleNamespace

from torch import nn

from vlm_prune.serving.plan import tiles_of
from vlm_prune.serving.towers import internvl_parts, llava_parts


class EncoderAttention(nn.Module):
    """Called with query, key and value ``(tiles, tokens, heads * head size)``."""

    def __init__(self, head_size: int):
        super().__init__()
        self.head_size, self.scale = head_size, head_size**-0.5

    def forward(self, query, key, value):
        heads = [x.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for x in (query, key, value)]
        output = nn.functional.scaled_dot_product_attention(*heads, scale=self.scale)
        return output.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Projections around an `EncoderAttention`."""

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.inner = nn.ModuleList([stock.q_proj, stock.k_proj, stock.v_proj])
        self.outer = stock.projection_layer if hasattr(stock, "projection_layer") else stock.out_proj
        self.attn = EncoderAttention(stock.head_dim)

    def forward(self, hidden_states, attention_mask=None):
        return self.outer(self.attn(*[project(hidden_states) for project in self.inner])), None


class Stack(nn.Module):
    """Layers, and the last one's output as a tensor."""

    def __init__(self, layers, name, **options):
        super().__init__()
        setattr(self, name, nn.ModuleList(layers))
        self.all, self.options = layers, options

    def forward(self, hidden):
        for layer in self.all:
            hidden = layer(hidden, **self.options)
        return hidden


class Llava(nn.Module):
    """A CLIP tower that ends at the consumed layer, and selects patches itself."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.config, base = model.config, copy.deepcopy(model.model)
        tower = getattr(base.vision_tower, "vision_model", base.vision_tower)
        layers = list(tower.encoder.layers)[: self.config.vision_feature_layer + 1]
        for layer in layers:
            layer.self_attn = Attention(layer.self_attn)
        self.vision_tower = ClipTower(tower, Stack(layers, "layers", attention_mask=None))
        self.vision_tower.first = int(self.config.vision_feature_select_strategy == "default")
        self.multi_modal_projector = base.multi_modal_projector
        self.parts = llava_parts(self, tiles_of(self.config))

    def features(self, pixels):
        return self.multi_modal_projector(self.vision_tower(pixels))


class ClipTower(nn.Module):
    def __init__(self, stock, encoder):
        super().__init__()
        self.embeddings, self.norm = stock.embeddings, stock.pre_layrnorm
        self.vision_model = nn.Module()
        self.vision_model.encoder = encoder

    def forward(self, pixel_values):
        return self.vision_model.encoder(self.norm(self.embeddings(pixel_values)))[:, self.first :]


class InternVL(nn.Module):
    """An InternViT tower, the pixel shuffle after it in the model's own code."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.config, base = model.config, copy.deepcopy(model.model)
        layers = list(base.vision_tower.encoder.layer)
        for layer in layers:
            layer.attention = Attention(layer.attention)
        self.vision_tower = VitTower(base.vision_tower.embeddings, Stack(layers, "layer"))
        self.shuffle = base.pixel_shuffle
        self.multi_modal_projector = base.multi_modal_projector
        self.parts = internvl_parts(self, tiles_of(self.config))

    def features(self, pixels):
        patches = self.vision_tower(pixel_values=pixels)[:, 1:]
        side = int(patches.shape[1] ** 0.5)
        shuffled = self.shuffle(patches.unflatten(1, (side, side)), scale_factor=self.config.downsample_ratio)
        return self.multi_modal_projector(shuffled.flatten(1, 2))


class VitTower(nn.Module):
    def __init__(self, embeddings, encoder):
        super().__init__()
        self.embeddings, self.encoder = embeddings, encoder

    def forward(self, pixel_values):
        return self.encoder(self.embeddings(pixel_values))


def served(model: nn.Module) -> nn.Module:
    """A copy of the vision side of ``model``."""
    return {"llava": Llava, "internvl": InternVL}[model.config.model_type](model)


def with_plan(model: nn.Module, **plan) -> SimpleNamespace:
    """The config of ``model`` as an engine sees it, asked to prune."""
    config = copy.deepcopy(model.config)
    config.vlm_prune = plan
    return config
