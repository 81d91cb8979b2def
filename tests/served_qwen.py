"""The vision tower of a Hugging Face Qwen2.5-VL in the shape of vLLM's modules, for tests that have no vLLM."""

from __future__ import annotations

import copy

import torch
from torch import nn

from vlm_prune.serving.plan import tiles_of
from vlm_prune.serving.towers import qwen_parts


class PastHooks(nn.Module):
    """Like a class that vLLM may compile: calling it runs ``forward`` past all hooks."""

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)


class EncoderAttention(nn.Module):
    """Called with query, key and value ``(1, patches, heads, head size)``."""

    def __init__(self, head_size):
        super().__init__()
        self.head_size, self.scale = head_size, head_size**-0.5

    def forward(self, query, key, value, cu_seqlens, max_seqlen, sequence_lengths=None):
        lengths = cu_seqlens.diff().tolist()
        pieces = zip(*(x.transpose(1, 2).split(lengths, 2) for x in (query, key, value)), strict=True)
        attend = nn.functional.scaled_dot_product_attention
        return torch.cat([attend(*piece, scale=self.scale) for piece in pieces], 2).transpose(1, 2)


class Attention(nn.Module):
    """Projections around an `EncoderAttention`."""

    def __init__(self, stock):
        super().__init__()
        self.qkv, self.proj = stock.qkv, stock.proj
        self.attn = EncoderAttention(stock.head_dim)

    def forward(self, x, cos, sin, **sequences):
        query, key, value = self.qkv(x).unflatten(-1, (3, -1, self.attn.head_size)).unbind(1)
        query, key = (rotate(heads, cos, sin) for heads in (query, key))
        out = self.attn(query=query[None], key=key[None], value=value[None], **sequences)
        return self.proj(out[0].flatten(1))


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


class Block(PastHooks):
    """Hidden states ``(patches, 1, channels)``."""

    def __init__(self, stock):
        super().__init__()
        self.norm1, self.norm2, self.mlp = stock.norm1, stock.norm2, stock.mlp
        self.attn = Attention(stock.attn)

    def forward(self, x, *, rotary_pos_emb_cos, rotary_pos_emb_sin, **sequences):
        x = x[:, 0]
        x = x + self.attn(self.norm1(x), rotary_pos_emb_cos, rotary_pos_emb_sin, **sequences)
        return (x + self.mlp(self.norm2(x)))[:, None]


class Merger(PastHooks):
    def __init__(self, stock):
        super().__init__()
        self.stock = stock

    def forward(self, x):
        return self.stock(x.squeeze(1))


class StockCall(nn.Module):
    """Calls a block or a merger as vLLM's tower does, where transformers' tower calls it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, hidden, cu_seqlens=None, position_embeddings=None, max_seqlen=None, **kwargs):
        if cu_seqlens is None:
            return self.module(hidden[:, None])
        cos, sin = position_embeddings
        ends = {"cu_seqlens": cu_seqlens, "max_seqlen": None, "sequence_lengths": None}
        return self.module(hidden[:, None], rotary_pos_emb_cos=cos, rotary_pos_emb_sin=sin, **ends)[:, 0]


class Visual(nn.Module):
    """Called with patches and a list of lists, returns features ``(units, channels)``."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, stock):
        super().__init__()
        self.blocks = nn.ModuleList(Block(block) for block in stock.blocks)
        self.merger = Merger(stock.merger)
        stock.blocks = nn.ModuleList(StockCall(block) for block in self.blocks)
        stock.merger = StockCall(self.merger)
        self.stock = stock

    def input_norm(self, pixels, dtype):
        return pixels.to(dtype)

    def forward(self, x, grid_thw):
        return self.stock(x, torch.tensor(grid_thw)).pooler_output


class Qwen(nn.Module):
    """A copy of the vision side of ``model``."""

    def __init__(self, model):
        super().__init__()
        self.config = model.config
        self.visual = Visual(copy.deepcopy(model.model.visual))
        self.parts = qwen_parts(self, tiles_of(self.config))
