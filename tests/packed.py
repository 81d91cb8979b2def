"""Tiny Qwen-VL models with random weights, and prompts with images and videos of mixed sizes for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from tests.padding import padded

IMAGE, VIDEO, PAD, TEXT, VOCAB = 60, 61, 0, range(3, 59), 64
PATCH, MERGE, FRAMES = 4, 2, 2
SIZES = [(8, 8), (6, 10), (4, 12), (10, 6)]
"""Rows and columns of patches of the images that prompts are made of, in turns."""
CLIP = (2, 4, 8)
"""Frames, rows and columns of patches of a video."""


def _text(**changes: Any) -> dict[str, Any]:
    base = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return {**base, **ids, "num_hidden_layers": 4, "rope_parameters": rope, **changes}


def _vision(**changes: Any) -> dict[str, Any]:
    sizes = {"patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": FRAMES}
    return {"depth": 5, "num_heads": 4, **sizes, **changes}


def _build(model: type, config: type, text: dict[str, Any], vision: dict[str, Any]) -> nn.Module:
    special = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": 62,
        "vision_end_token_id": 63,
    }
    return model(config(text_config=text, vision_config=vision, tie_word_embeddings=False, **special))


def _qwen2() -> nn.Module:
    vision = _vision(embed_dim=32, hidden_size=32, mlp_ratio=2)
    return _build(Qwen2VLForConditionalGeneration, Qwen2VLConfig, _text(), vision)


def _qwen2_5() -> nn.Module:
    vision = _vision(hidden_size=32, out_hidden_size=32, intermediate_size=48)
    vision |= {"window_size": 2 * MERGE * PATCH, "fullatt_block_indexes": [1, 4]}
    return _build(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, _text(), vision)


def _qwen3() -> nn.Module:
    vision = _vision(hidden_size=32, out_hidden_size=32, intermediate_size=48)
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2, 3]}
    return _build(Qwen3VLForConditionalGeneration, Qwen3VLConfig, _text(head_dim=8), vision)


def qwen3_moe() -> nn.Module:
    """A relative whose stock code may run on flex attention."""
    vision = _vision(hidden_size=32, out_hidden_size=32, intermediate_size=48)
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2, 3]}
    text = _text(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    return _build(Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig, text, vision)


PACKED: dict[str, Callable[[], nn.Module]] = {"qwen2_vl": _qwen2, "qwen2_5_vl": _qwen2_5, "qwen3_vl": _qwen3}
"""Adding such a family to the tests is one row."""


@dataclass
class Visual:
    """An image or a video: its patches ``(patches, values)``, and frames, rows and columns of them."""

    patches: torch.Tensor
    size: tuple[int, int, int]
    token: int

    @property
    def units(self) -> tuple[int, int]:
        """Rows and columns of the tokens of a frame."""
        return self.size[1] // MERGE, self.size[2] // MERGE

    @property
    def tiles(self) -> list[Visual]:
        """Its frames, one by one."""
        _, rows, columns = self.size
        return [Visual(x, (1, rows, columns), self.token) for x in self.patches.split(rows * columns)]


@dataclass
class PackedPrompt:
    """A batch of prompts. ``visuals[b]`` are those of row ``b`` in order."""

    ids: torch.Tensor
    mask: torch.Tensor
    visuals: list[list[Visual]]

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments for the model, as a processor returns them."""
        kinds = (self.ids == IMAGE).int() + 2 * (self.ids == VIDEO).int()
        inputs = {"input_ids": self.ids, "attention_mask": self.mask, "mm_token_type_ids": kinds}
        return {**inputs, **self.media}

    @property
    def media(self) -> dict[str, torch.Tensor]:
        """The part of `inputs` that is not text."""
        names = {IMAGE: ("pixel_values", "image_grid_thw"), VIDEO: ("pixel_values_videos", "video_grid_thw")}
        media = {}
        for token, (pixels, grid) in names.items():
            mine = [v for row in self.visuals for v in row if v.token == token]
            if mine:
                media[pixels] = torch.cat([v.patches for v in mine])
                media[grid] = torch.tensor([v.size for v in mine])
        return media

    @property
    def shown(self) -> list[Visual]:
        """Tiles of images, in the order of the receipt of a call that has images or videos only."""
        return [tile for row in self.visuals for v in row for tile in v.tiles]

    @property
    def tiles(self) -> list[list[int]]:
        """Numbers of each row's tiles among those."""
        counts = [sum(len(v.tiles) for v in row) for row in self.visuals]
        return [list(range(end - n, end)) for n, end in zip(counts, accumulate(counts), strict=True)]

    def rows(self) -> list[PackedPrompt]:
        """Each row alone, without padding."""
        there = self.mask.bool()
        return [
            PackedPrompt(self.ids[b : b + 1, there[b]], self.mask[b : b + 1, there[b]], [self.visuals[b]])
            for b in range(len(self.ids))
        ]


def packed_prompt(family: str, rows: list[tuple[Any, ...]], pad: str = "left", seed: int = 1) -> PackedPrompt:
    """Prompts from a sketch: ``5`` stands for five text tokens, ``-2`` for two images, ``"video"`` for a video.

    Images differ in size and contrast, so that an adaptive policy treats each differently. Between the frames of a
    video Qwen3-VL has text, which says when they were taken.
    """
    generator = torch.Generator().manual_seed(seed)
    made, sequences, visuals = 0, [], []

    def show(size: tuple[int, int, int], placeholder: int) -> list[int]:
        nonlocal made
        contrast, made = [0.3, 1.0, 3.0, 0.6][made % 4], made + 1
        count = size[0] * size[1] * size[2]
        patches = torch.randn(count, 3 * FRAMES * PATCH**2, generator=generator) * contrast
        visuals[-1].append(Visual(patches, size, placeholder))
        parts = [len(tile.patches) // MERGE**2 for tile in visuals[-1][-1].tiles]
        parts = parts if family == "qwen3_vl" else [sum(parts)]
        return [token for n in parts for token in (62, *[placeholder] * n, 63)]

    for row in rows:
        sequence: list[int] = []
        visuals.append([])
        for part in row:
            if part == "video":
                sequence += show(CLIP, VIDEO)
            elif part > 0:
                sequence += torch.randint(TEXT.start, TEXT.stop, (part,), generator=generator).tolist()
            else:
                for _ in range(-part):
                    sequence += show((1, *SIZES[made % 4]), IMAGE)
        sequences.append(sequence)
    ids, mask = padded(sequences, pad, PAD)
    return PackedPrompt(ids, mask, visuals)


VIDEO_LAYOUTS: dict[str, list[tuple[Any, ...]]] = {
    "video": [(3, "video", 5)],
    "videos-and-images": [(2, -1, 1, "video", 2, -1, 4), (1, "video", 2, -1, 3), (-1, 7), (9,)],
}
"""Batches with videos, see `packed_prompt`."""


def skip_unless_it_counts_on(model: nn.Module, family: str) -> None:
    """Skip where stock code has two opinions on the position after a prompt, as on Qwen2.5-VL in transformers 5.4.

    There the temporal position of an image is multiplied by the tokens of a second, so that it may be the highest of
    the prompt. ``generate`` counts on from the last one, and a forward that is given a cache from the highest.
    """
    if family not in PACKED:
        return
    batch = packed_prompt(family, [(3, -1, 4)], "left", 1)
    kinds, grid = batch.inputs["mm_token_type_ids"], batch.media["image_grid_thw"]
    places, delta = model.model.get_rope_index(batch.ids, kinds, image_grid_thw=grid)
    if int(places[..., -1].max()) + 1 != batch.ids.shape[1] + int(delta):
        pytest.skip("stock code counts on from different positions in generate and in forward")
