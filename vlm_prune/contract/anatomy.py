"""What the engine must know about a model: its `Anatomy`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Pack = Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]
"""From the projector's output ``(tiles, units, channels)`` and the row that represents a newline,
``(channels,)``, to the rows ``(rows, channels)`` of each image."""


@dataclass(frozen=True)
class Tower:
    """The vision encoder.

    Attributes:
        module: called with ``pixel_values`` ``(tiles, channels, height, width)``, returns a stock model output.
        layers: its transformer layers, in order; each returns hidden states ``(tiles, tokens, channels)``.
        attentions: the attention module of each layer.
        patch_grid: from the pixel height and width to the rows and columns of patches.
        image_size: height and width of the tiles that the processor prepares.
        feature_layers: 0-based numbers of the layers whose outputs the model consumes; several are concatenated.
        has_cls: whether token 0 is CLS.
        keeps_cls: whether the language model gets CLS too (``vision_feature_select_strategy="full"``).
        merge: side of the square of patches that a pixel shuffle turns into one token (1: no shuffle).
        resizing: keyword arguments of ``module`` that let it take an image of another size; ``None`` if nothing does.
        patch_mask: the argument of ``module``, if there is one, that says which patches are padding: bool ``(tiles,
            rows, columns)``.
    """

    module: nn.Module
    layers: list[nn.Module]
    attentions: list[nn.Module]
    patch_grid: Callable[[int, int], tuple[int, int]]
    image_size: tuple[int, int]
    feature_layers: tuple[int, ...]
    has_cls: bool
    keeps_cls: bool
    merge: int
    resizing: Mapping[str, Any] | None = field(default_factory=dict)
    patch_mask: str | None = None

    @property
    def feature_layer(self) -> int:
        """The last of `feature_layers`."""
        return max(self.feature_layers)

    def unit_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of language-model tokens for a tile of this size in pixels."""
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
        config: Any = self.module.config
        return int(config.hidden_size)

    @property
    def weights(self) -> int:
        """Elements in the matrices of one layer."""
        config: Any = self.module.config
        inner = getattr(config, "intermediate_size", None) or self.width * config.mlp_ratio
        return 4 * self.width**2 + 2 * self.width * int(inner)

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
    of patches. The ``merge`` x ``merge`` patches of a unit are contiguous. Every frame is a separate tile, because
    attention never crosses frames.

    Attributes:
        module: the encoder, its merger included.
        layers: its transformer blocks, each called with ``hidden_states``, ``cu_seqlens`` and ``position_embeddings``.
        attentions: the attention module of each block.
        merge: side of the square of patches that the merger turns into one token.
        patch: frames of a patch, and pixels along its side.
        window: side in units of the windows by which units are sorted, ``None`` where they are in raster order.
        deepstack: mergers whose output the decoder's first layers add to visual tokens, in order.
        single_patches: whether patches may be cut one by one, as FlowCut's released code does.
        width: channels of the hidden states.
        weights: elements of one block's matrices.
    """

    module: nn.Module
    layers: list[nn.Module]
    attentions: list[nn.Module]
    merge: int
    patch: tuple[int, int]
    window: int | None
    deepstack: list[nn.Module]
    single_patches: bool
    width: int
    weights: int

    units = None  # images may have any size
    has_cls = keeps_cls = False

    @property
    def feature_layer(self) -> int:
        """0-based number of the block whose output the merger consumes."""
        return len(self.layers) - 1

    def grids(self, sizes: list[list[int]]) -> list[tuple[int, int]]:
        """Rows and columns of units of each tile; ``sizes`` are those of ``grid_thw``."""
        merge = self.merge
        return [(h // merge, w // merge) for t, h, w in sizes for _ in range(t)]

    def placeholders(self, call: Mapping[str, Any]) -> list[int] | None:
        """How many placeholders each tile of a forward's arguments needs; ``None`` if it brings no pixels."""
        given = [("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")]
        sizes = [call.get(grid) for pixels, grid in given if call.get(pixels) is not None]
        known = [size for size in sizes if size is not None]
        if not known or len(known) < len(sizes):
            return None
        return [rows * columns for size in known for rows, columns in self.grids(size.tolist())]


Sizes = Callable[[Mapping[str, Any], list[tuple[int, ...]]], list[tuple[int, int]]]
"""From a feature method's arguments by name, and the shapes of what it returned, channels left out, to rows and
columns of the tokens of each tile, in order."""


@dataclass(frozen=True)
class FeatureTower:
    """A vision encoder of which the engine knows only the output: features, ready for the language model.

    Its layers cannot be hooked, so policies that look at them are refused.

    Attributes:
        methods: names of the methods of the base module that return features.
        sizes: how these rows divide into tiles.
        deepstack: tower layers whose features the decoder's first layers add to visual tokens.
    """

    methods: tuple[str, ...]
    sizes: Sizes
    deepstack: tuple[int, ...] = ()

    units = None  # known once features exist
    has_cls = keeps_cls = False
    width = weights = 0
    feature_layer = -1

    @property
    def layers(self) -> list[nn.Module]:
        """No layer can be hooked."""
        return []

    def placeholders(self, call: Mapping[str, Any]) -> list[int] | None:
        """Unknown until the features exist."""
        return None


@dataclass(frozen=True)
class Arrangement:
    """How the tiles of one call become rows of the language model, where they are not simply concatenated.

    Attributes:
        images: tiles of each image, or frames of each video, in order.
        pack: the stock model's code between projector and language model.
        merge: side of the square of patches that is pooled into one token between tower and projector.
        frame_grid: rows and columns of tokens of a video's frame after `pack`; ``None`` for images.
    """

    images: list[int]
    pack: Pack
    merge: int = 1
    frame_grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class FeatureCall:
    """A method of a model's base module that turns pixels into features, through tower and projector.

    ``arrange`` takes the method's arguments by name and says how it will assemble their tiles.
    """

    method: str
    arrange: Callable[[Mapping[str, Any]], Arrangement]


@dataclass(frozen=True)
class Anatomy:
    """The parts of a vision-language model that pruning touches.

    Attributes:
        family: name of the model family.
        base: the module that contains tower and decoder; its forward takes ``pixel_values`` and ``input_ids``.
        tower: the vision encoder. Where it is packed, its merger is the projector.
        projector: takes the tower's features ``(tiles, units, channels)``; ``None`` for a `FeatureTower`.
        front: where the projector itself puts the patches of a unit together, the part of it that takes them as
            ``(tiles, units, channels)``, or the units as ``(tiles, rows, columns, channels)``.
        decoder: the language model, called with ``inputs_embeds``.
        decoder_layers: its layers, in order.
        image_tokens: ids of the placeholders that visual features replace in ``input_ids``; where videos have a
            separate one, it comes last.
        tile: what one row of ``pixel_values`` is to the user ("image", "tile").
        mrope: whether a visual token's position is its place in the image, not in the sequence.
        computes_on: whether stock code may compute with features after dropped ones have become holes.
        features: the methods of ``base`` that assemble tiles; empty where tiles are simply concatenated.
    """

    family: str
    base: nn.Module
    tower: Tower | PackedTower | FeatureTower
    projector: nn.Module | None
    decoder: Any
    decoder_layers: list[nn.Module]
    image_tokens: tuple[int, ...]
    tile: str
    mrope: bool = False
    computes_on: bool = False
    features: tuple[FeatureCall, ...] = ()
    front: nn.Module | None = None


@dataclass(frozen=True)
class Family:
    """What the README's matrix says about a model family, known without a model.

    An adapter lists the families that have their own column: ``FAMILIES``, by ``config.model_type``.

    Attributes:
        title: its display name.
        cls: whether its vision tower has a CLS token.
        resizes: whether the grid of large images, and of videos, is resized after the projector.
        frames: whether it hands on frames of videos like tiles of images, so that it is unknown which form a video.
    """

    title: str
    cls: bool = True
    resizes: bool = False
    frames: bool = False


def square(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """A size from a config, given as one number or two."""
    if isinstance(size, int):
        return size, size
    return size[0], size[1]


def feature_layers(setting: int | list[int] | tuple[int, ...], layers: int) -> tuple[int, ...]:
    """0-based numbers of the consumed layers, from ``config.vision_feature_layer`` (indices into hidden states)."""
    settings = (setting,) if isinstance(setting, int) else tuple(setting)
    return tuple((s if s >= 0 else layers + 1 + s) - 1 for s in settings)
