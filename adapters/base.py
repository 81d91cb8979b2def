"""What the engine has to know about a model: its `Anatomy`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class Anatomy:
    """The parts of a vision-language model that pruning touches.

    Attributes:
        family: name of the model family.
        base: the module that joins tower and decoder; its forward takes ``pixel_values`` and ``input_ids``.
        tower: the vision encoder.
        projector: takes the tower's features ``(tiles, units, channels)``.
        decoder: the language model, called with ``inputs_embeds``.
        decoder_layers: its layers, in order.
        image_tokens: ids of the placeholders that visual features replace in ``input_ids``.
        tile: what one row of ``pixel_values`` is to the user ("image", "tile").
    """

    family: str
    base: nn.Module
    tower: Tower
    projector: nn.Module
    decoder: Any
    decoder_layers: list[nn.Module]
    image_tokens: tuple[int, ...]
    tile: str


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
