"""What the engine has to know about a model: its `Anatomy`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Tower:
    """The vision encoder.

    Attributes:
        module: called with ``pixel_values`` ``(tiles, channels, height, width)``, returns a stock model output.
        layers: its transformer layers, in order; each returns hidden states ``(tiles, tokens, channels)``.
        attentions: the attention module of each layer.
        patch_grid: from the pixel height and width to the rows and columns of patches.
        image_size: height and width the processor prepares tiles at.
        feature_layer: 0-based number of the layer whose output the model consumes.
        has_cls: whether token 0 is CLS.
        keeps_cls: whether CLS is handed to the language model too (``vision_feature_select_strategy="full"``).
        merge: side of the square of patches that a pixel shuffle turns into one token (1: no shuffle).
        resizing: keyword arguments of ``module`` that let it take an image of another size.
    """

    module: nn.Module
    layers: list[nn.Module]
    attentions: list[nn.Module]
    patch_grid: Callable[[int, int], tuple[int, int]]
    image_size: tuple[int, int]
    feature_layer: int
    has_cls: bool
    keeps_cls: bool
    merge: int
    resizing: Mapping[str, Any] = field(default_factory=dict)

    def unit_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of language-model tokens that a tile of this size in pixels gives."""
        rows, columns = self.patch_grid(height, width)
        return rows // self.merge, columns // self.merge

    @property
    def units(self) -> int:
        """Visual tokens per tile at the size that the processor prepares, CLS not counted."""
        rows, columns = self.unit_grid(*self.image_size)
        return rows * columns

    @property
    def width(self) -> int:
        """Channels of the hidden states."""
        return int(self.module.config.hidden_size)

    @property
    def weights(self) -> int:
        """Elements of one layer's matrices."""
        return 4 * self.width**2 + 2 * self.width * int(self.module.config.intermediate_size)

    def placeholders(self, call: Mapping[str, Any]) -> list[int] | None:
        """How many placeholders each tile of a forward's arguments needs; ``None`` if it brings no pixels."""
        pixels = call.get("pixel_values")
        if pixels is None or pixels.dim() != 4:
            return None
        rows, columns = self.unit_grid(*pixels.shape[-2:])
        return [rows * columns + int(self.keeps_cls)] * len(pixels)


@dataclass(frozen=True)
class PackedTower:
    """A vision encoder that takes images of any size, all patches of a call in one sequence.

    It is called with ``hidden_states`` ``(patches, values)`` and ``grid_thw`` ``(images, 3)``: frames, rows and columns
    of patches. The ``merge`` x ``merge`` patches of a unit stand together. Every frame is a tile of its own, because
    attention never goes from one to the other.

    Attributes:
        module: the encoder, its merger included.
        layers: its transformer blocks, each called with ``hidden_states``, ``cu_seqlens`` and ``position_embeddings``.
        attentions: the attention module of each block.
        merge: side of the square of patches that the merger turns into one token.
        window: side in units of the windows by which units are sorted, ``None`` where they stand in raster order.
        deepstack: mergers whose output the decoder's first layers add to visual tokens, in order.
        single_patches: whether patches may be cut one by one, as FlowCut's released code does.
        width: channels of the hidden states.
        weights: elements of one block's matrices.
    """

    module: nn.Module
    layers: list[nn.Module]
    attentions: list[nn.Module]
    merge: int
    window: int | None
    deepstack: list[nn.Module]
    single_patches: bool
    width: int
    weights: int

    units = None  # images have the size they have
    has_cls = keeps_cls = False

    @property
    def feature_layer(self) -> int:
        """0-based number of the block whose output the merger consumes."""
        return len(self.layers) - 1

    def grids(self, grid_thw: torch.Tensor) -> list[tuple[int, int]]:
        """Rows and columns of units of each tile."""
        merge = self.merge
        return [(h // merge, w // merge) for t, h, w in grid_thw.tolist() for _ in range(t)]

    def placeholders(self, call: Mapping[str, Any]) -> list[int] | None:
        """How many placeholders each tile of a forward's arguments needs; ``None`` if it brings no pixels."""
        given = [("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")]
        grids = [call.get(grid) for pixels, grid in given if call.get(pixels) is not None]
        if not grids or any(grid is None for grid in grids):
            return None
        return [rows * columns for grid in grids for rows, columns in self.grids(grid)]


@dataclass(frozen=True)
class Anatomy:
    """The parts of a vision-language model that pruning touches.

    Attributes:
        family: name of the model family.
        base: the module that joins tower and decoder; its forward takes ``pixel_values`` and ``input_ids``.
        tower: the vision encoder. Where it is packed, its merger is the projector.
        projector: takes the tower's features ``(tiles, units, channels)``.
        decoder: the language model, called with ``inputs_embeds``.
        decoder_layers: its layers, in order.
        image_tokens: ids of the placeholders that visual features replace in ``input_ids``; where videos have another
            one than images, it comes last.
        tile: what one row of ``pixel_values`` is to the user ("image", "tile").
        mrope: whether a visual token's position is its place in the image, not in the sequence.
    """

    family: str
    base: nn.Module
    tower: Tower | PackedTower
    projector: nn.Module
    decoder: Any
    decoder_layers: list[nn.Module]
    image_tokens: tuple[int, ...]
    tile: str
    mrope: bool = False


def square(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """A config's size, written as one number or as two."""
    if isinstance(size, int):
        return size, size
    return size[0], size[1]


def feature_layer(setting: int | list[int], layers: int, family: str) -> int:
    """0-based number of the consumed layer, from ``config.vision_feature_layer`` (an index into hidden states)."""
    if not isinstance(setting, int):
        raise ValueError(
            f"{family} with vision_feature_layer={setting!r}: features of several layers are concatenated, and after "
            "an in-tower cut these layers would hold different tokens. Set config.vision_feature_layer to one layer."
        )
    return (setting if setting >= 0 else layers + 1 + setting) - 1
