"""Tiny stock models with random weights, prompts for them, and a fingerprint that shows whatever pruning leaves behind.

Adding a model family to the tests is one row of `FAMILIES`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.arranged import ARRANGED, ArrangedPrompt, arranged_prompt
from tests.packed import PACKED, PackedPrompt, packed_prompt
from tests.padding import padded
from vlm_prune.adapters.versions import flat_tower
from vlm_prune.versions import takes_encoded

IMAGE, PAD, TEXT, VOCAB = 60, 0, range(3, 59), 64


@dataclass(frozen=True)
class Family:
    """How a family is built, and how many placeholders a tile takes in the prompt."""

    build: Callable[..., nn.Module]
    size: int
    placeholders: int


def _vision(**changes: Any) -> dict[str, Any]:
    base = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 5}
    return {**base, "patch_size": 4, **changes}


def _text(kind: type, **changes: Any) -> Any:
    base = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
    return kind(**{**base, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, **changes})


def _llava(text: Any, strategy: str = "default", size: int = 24, **vision: Any) -> nn.Module:
    tower = CLIPVisionConfig(**_vision(image_size=size, **vision))
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_select_strategy=strategy,
        image_seq_length=(size // 4) ** 2 + (strategy == "full"),
    )
    return LlavaForConditionalGeneration(config)


def _vipllava(text: Any, size: int = 24, **vision: Any) -> nn.Module:
    tower = CLIPVisionConfig(**_vision(image_size=size, **vision))
    config = VipLlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layers=[-2, -4, 1],  # also the new name's alias, where there is one
        image_seq_length=(size // 4) ** 2,
    )
    return VipLlavaForConditionalGeneration(config)


def _internvl(text: Any, size: int = 32, **vision: Any) -> nn.Module:
    tower = InternVLVisionConfig(**_vision(image_size=size, **{"num_hidden_layers": 4, **vision}))
    config = InternVLConfig(
        vision_config=tower,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=(size // 8) ** 2,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)


def _qwen2(**changes: Any) -> Qwen2Config:
    return _text(Qwen2Config, num_key_value_heads=2, **changes)


FAMILIES = {
    "llava": Family(lambda **kw: _llava(_text(LlamaConfig), **kw), 24, 36),
    "llava-gqa": Family(lambda **kw: _llava(_qwen2(), **kw), 24, 36),
    "llava-full": Family(lambda **kw: _llava(_text(LlamaConfig), "full", **kw), 24, 37),
    "internvl": Family(lambda **kw: _internvl(_qwen2(), **kw), 32, 16),
    "vipllava": Family(lambda **kw: _vipllava(_text(LlamaConfig), **kw), 24, 36),
}


QUICK = ("llava_next", "qwen3_vl")
EVERY = [
    *FAMILIES,
    *(f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in (*ARRANGED, *PACKED)),
]
"""All families: those with one tile per image or tiles of one grid, those that assemble tiles into images, and those
that pack images of any size. The quick tests take one of each kind."""


@cache
def shared(family: str, attention: str = "sdpa") -> nn.Module:
    """The model of `make`, made once: for tests that give it back as it was."""
    return make(family, attention)


def make(family: str, attention: str = "sdpa", seed: int = 0, **changes: Any) -> nn.Module:
    """A model of ``family`` in eval mode, with weights that make attention peaky and every token matter."""
    others = {**PACKED, **ARRANGED}
    model = others[family]() if family in others else FAMILIES[family].build(**changes)
    return peaky(model, attention, seed)


def peaky(model: nn.Module, attention: str = "sdpa", seed: int = 0) -> nn.Module:
    """``model`` in eval mode, with weights that make attention peaky and every token matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "lambda_" in name:
            noise = 0.7 + 0.1 * noise
        elif "norm" in name and name.endswith("weight"):
            noise = 1 + 0.1 * noise
        elif weight.dim() == 1 or "position" in name:
            noise = 0.2 * noise
        elif "q_proj" in name or "k_proj" in name or "qkv" in name:
            noise = noise * 1.8 / weight[0].numel() ** 0.5
        elif weight.dim() > 1 and "embed" not in name:
            noise = noise * 1.2 / weight[0].numel() ** 0.5
        weight.data.copy_(noise)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    model.set_attn_implementation(attention)
    return model.eval()


def tower(model: nn.Module) -> nn.Module:
    """A model's vision encoder."""
    return model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower


def clip_layers() -> str:
    """Where in a LLaVA the layers of its tower are."""
    tower = shared("llava").model.vision_tower
    return f"model.vision_tower{'' if flat_tower(tower) is tower else '.vision_model'}.encoder.layers"


@dataclass
class Prompt:
    """A batch of prompts. ``tiles[b]`` are the numbers of the tiles of row ``b`` in ``pixels``."""

    ids: torch.Tensor
    mask: torch.Tensor
    pixels: torch.Tensor | None
    tiles: list[list[int]]

    @property
    def media(self) -> dict[str, torch.Tensor]:
        """The part of `inputs` that is not text."""
        return {} if self.pixels is None else {"pixel_values": self.pixels}

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments for the model, as a processor returns them."""
        return {"input_ids": self.ids, "attention_mask": self.mask, **self.media}

    def rows(self) -> list[Prompt]:
        """Each row alone, without padding."""
        return [
            Prompt(
                self.ids[b : b + 1, self.mask[b].bool()],
                self.mask[b : b + 1, self.mask[b].bool()],
                self.pixels[self.tiles[b]] if self.tiles[b] else None,
                [list(range(len(self.tiles[b])))],
            )
            for b in range(len(self.ids))
        ]


def prompt(
    family: str, rows: list[tuple[Any, ...]], pad: str = "left", seed: int = 1
) -> Prompt | PackedPrompt | ArrangedPrompt:
    """Prompts from a sketch: ``5`` stands for five text tokens, ``-2`` for an image of two tiles.

    Images differ in contrast, so that an adaptive policy treats each differently.
    """
    if family in PACKED:
        return packed_prompt(family, rows, pad, seed)
    if family in ARRANGED:
        return arranged_prompt(family, rows, pad, seed)
    generator = torch.Generator().manual_seed(seed)
    spec, sequences, tiles = FAMILIES[family], [], []
    number = 0
    for row in rows:
        sequence: list[int] = []
        tiles.append([])
        for part in row:
            if part > 0:
                sequence += torch.randint(TEXT.start, TEXT.stop, (part,), generator=generator).tolist()
            else:
                sequence += [IMAGE] * (spec.placeholders * -part)
                tiles[-1] += range(number, number - part)
                number -= part
        sequences.append(sequence)
    ids, mask = padded(sequences, pad, PAD)
    contrast = torch.tensor([0.3, 1.0, 3.0, 0.6]).repeat(number)[:number, None, None, None]
    pixels = torch.randn(number, 3, spec.size, spec.size, generator=generator) * contrast
    return Prompt(ids, mask, pixels if number else None, tiles)


LAYOUTS: dict[str, list[tuple[int, ...]]] = {
    "single": [(3, -1, 5)],
    "several-images": [(2, -1, 1, -1, 4), (1, -3, 3)],
    "ragged": [(2, -1, 4), (1, -1, 2, -2, 3), (-1, 9)],
    "row-without-image": [(2, -1, 4), (9,), (45,)],
}
"""Batches that a user may pass, see `prompt`."""


def repeatable(model: nn.Module, family: str) -> list[tuple[int, ...]]:
    """A ragged batch that ``generate`` can repeat for beams and samples.

    Where it does not encode images first (transformers 5.4), stock code repeats each image by itself, which mixes up
    those of a prompt with several.
    """
    if takes_encoded(model) or family in PACKED:
        return LAYOUTS["ragged"]
    return [(2, -1, 4), (1, -1, 3), (-1, 9)]


def attention_functions() -> set[str]:
    """The names in transformers' table, when models that other tests pruned and dropped are gone."""
    gc.collect()
    return set(ALL_ATTENTION_FUNCTIONS.keys())


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that pruning could leave on a model, except tensors."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        seen[name] = {
            "type": type(module),
            "attributes": sorted(vars(module)),
            "values": {
                key: value if isinstance(value, bool | int | float | str) else id(value)
                for key, value in vars(module).items()
                if not key.startswith("_")
            },
            "hooks": {
                key: list(value) for key, value in vars(module).items() if isinstance(value, dict) and value
            },
            "config": module.config.to_dict() if hasattr(module, "config") else None,
        }
    if hasattr(model, "generation_config"):
        seen["generation"] = model.generation_config.to_dict()
    return seen
