"""Tiny models that cut images of any resolution into tiles, and prompts for them, their layout worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.padding import padded

PAD, IMAGE, VIDEO, VOCAB, SIDE = 0, 60, 61, 64, 6
"""``SIDE`` is that of a tile in patches."""

GRIDS = [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]
"""Rows and columns of tiles that an image may be cut into."""

SIZES = [(30, 50), (60, 20), (40, 90)]
"""Heights and widths of the images of a prompt, by the number of their sketch."""

_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 5}
_TEXT = {**_VISION, "num_hidden_layers": 3, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}


def _next(kind: type, model: type, **more: Any) -> nn.Module:
    return model(
        kind(
            vision_config=CLIPVisionConfig(**_VISION, patch_size=4, image_size=4 * SIDE),
            text_config=LlamaConfig(**_TEXT),
            image_grid_pinpoints=[[h * 4 * SIDE, w * 4 * SIDE] for h, w in GRIDS],
            image_token_id=IMAGE,
            **more,
        )
    )


def _onevision() -> nn.Module:
    """A grid of more than two tiles' tokens is resized."""
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_VISION, patch_size=4, image_size=4 * SIDE, vision_use_head=False),
        text_config=Qwen2Config(**_TEXT, num_key_value_heads=2),
        image_grid_pinpoints=[[h * 4 * SIDE, w * 4 * SIDE] for h, w in GRIDS],
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_aspect_ratio="anyres_max_2",
    )
    return LlavaOnevisionForConditionalGeneration(config)


ARRANGED = {
    "llava_next": lambda: _next(LlavaNextConfig, LlavaNextForConditionalGeneration),
    "llava_next_video": lambda: _next(
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
        video_token_id=VIDEO,
        spatial_pool_stride=2,
    ),
    "llava_onevision": _onevision,
}


@dataclass(frozen=True)
class Canvas:
    """What the model makes of one image, worked out by hand.

    ``grid`` rows and columns of tiles; ``rows`` and ``columns`` of patches that are left without padding.
    """

    grid: tuple[int, int]
    rows: range
    columns: range

    @classmethod
    def of(cls, height: int, width: int) -> Canvas:
        """The grid that shows most of the image, and of these the smallest."""
        tile = 4 * SIDE

        def fit(grid: tuple[int, int]) -> tuple[int, int]:
            scale = min(grid[0] * tile / height, grid[1] * tile / width)
            shown = min(int(height * scale) * int(width * scale), height * width)
            return shown, shown - grid[0] * grid[1] * tile * tile

        grid = max(GRIDS, key=fit)
        tall, wide = grid[0] * SIDE, grid[1] * SIDE
        if width / height > wide / tall:
            cut = (tall - int(height * wide / width + 1e-7)) // 2
            return cls(grid, range(cut, tall - cut), range(wide))
        cut = (wide - int(width * tall / height + 1e-7)) // 2
        return cls(grid, range(tall), range(cut, wide - cut))

    def place(self, row: int, column: int) -> tuple[int, int]:
        """Tile (the small one is 0) and unit of a patch of the canvas."""
        tile = 1 + row // SIDE * self.grid[1] + column // SIDE
        return tile, row % SIDE * SIDE + column % SIDE


@dataclass
class ArrangedPrompt:
    """A batch of prompts. ``tiles[b]`` are the numbers of the images of row ``b`` in ``pictures`` and ``sizes``."""

    family: str
    ids: torch.Tensor
    mask: torch.Tensor
    pictures: list[torch.Tensor]
    sizes: list[tuple[int, int]]
    tiles: list[list[int]]

    @property
    def media(self) -> dict[str, torch.Tensor]:
        """The part of `inputs` that is not text: tiles filled up to the largest number."""
        if not self.pictures:
            return {}
        most = max(map(len, self.pictures))
        filled = [torch.cat([t, t.new_zeros(most - len(t), *t.shape[1:])]) for t in self.pictures]
        media = {"pixel_values": torch.stack(filled), "image_sizes": torch.tensor(self.sizes)}
        if self.family == "llava_onevision":
            media["batch_num_images"] = torch.tensor([len(row) for row in self.tiles if row])
        return media

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments for the model, as a processor returns them."""
        return {"input_ids": self.ids, "attention_mask": self.mask, **self.media}

    def rows(self) -> list[ArrangedPrompt]:
        """Each row alone, without padding."""
        alone = []
        for b, images in enumerate(self.tiles):
            real = self.mask[b].bool()
            pictures, sizes = [self.pictures[i] for i in images], [self.sizes[i] for i in images]
            ids, mask = self.ids[b : b + 1, real], self.mask[b : b + 1, real]
            alone.append(ArrangedPrompt(self.family, ids, mask, pictures, sizes, [list(range(len(images)))]))
        return alone


def _length(family: str, size: tuple[int, int], single: bool) -> int:
    """Placeholders of an image."""
    if single:
        return SIDE * SIDE + 1
    canvas = Canvas.of(*size)
    height, width = shape(family, canvas)
    return SIDE * SIDE + height * (width + 1)


def shape(family: str, canvas: Canvas) -> tuple[int, int]:
    """Rows and columns of tokens of the canvas, after resizing."""
    height, width = len(canvas.rows), len(canvas.columns)
    ratio = (height * width / (2 * SIDE * SIDE)) ** 0.5
    if family == "llava_onevision" and ratio > 1.1:
        return int(height // ratio), int(width // ratio)
    return height, width


def arranged_prompt(
    family: str, rows: list[tuple[int, ...]], pad: str = "left", seed: int = 1
) -> ArrangedPrompt:
    """Prompts from a sketch: ``5`` stands for five text tokens, ``-2`` for an image of the second of `SIZES`."""
    generator = torch.Generator().manual_seed(seed)
    sequences, pictures, sizes, tiles = [], [], [], []
    for row in rows:
        tiles.append([])
        # OneVision shows several images of one prompt as one tile each
        single = family == "llava_onevision" and sum(part < 0 for part in row) > 1
        sequence: list[int] = []
        for part in row:
            if part > 0:
                sequence += torch.randint(3, 59, (part,), generator=generator).tolist()
                continue
            size = SIZES[-part - 1]
            grid = Canvas.of(*size).grid
            count = 1 if single else 1 + grid[0] * grid[1]
            contrast = (0.3, 1.0, 3.0, 0.6)[len(pictures) % 4]
            pixels = torch.randn(count, 3, 4 * SIDE, 4 * SIDE, generator=generator)
            tiles[-1].append(len(pictures))
            pictures.append(pixels * contrast * torch.linspace(0.5, 2, count)[:, None, None, None])
            sizes.append(size)
            sequence += [IMAGE] * _length(family, size, single)
        sequences.append(sequence)
    ids, mask = padded(sequences, pad, PAD)
    return ArrangedPrompt(family, ids, mask, pictures, sizes, tiles)
