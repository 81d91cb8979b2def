"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: images cut into tiles of any resolution, and videos.

What happens between projector and language model (the grid of tiles, removing padding, newlines, resizing) remains the
stock models' own code: the engine gets it as `Arrangement.pack`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ..contract.anatomy import Anatomy, Arrangement, Family, FeatureCall
from .clip_tower import clip_like_tower
from .versions import video_pixels

FAMILIES = {
    "llava_next": Family("LLaVA-NeXT"),
    "llava_next_video": Family("LLaVA-NeXT-Video"),
    "llava_onevision": Family("LLaVA-OneVision", cls=False, resizes=True),
}
"""Families in the README's matrix."""


def next_anatomy(model: Any) -> Anatomy:
    """The parts of a ``LlavaNextForConditionalGeneration``."""
    return _anatomy(model, "llava_next", partial(_next_images, model.model))


def next_video_anatomy(model: Any) -> Anatomy:
    """The parts of a ``LlavaNextVideoForConditionalGeneration``."""
    base, config = model.model, model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    if side % config.spatial_pool_stride:
        raise ValueError(
            f"llava_next_video with spatial_pool_stride={config.spatial_pool_stride} on a grid of {side} x {side} "
            "patches: some patches would belong to no token."
        )
    return _anatomy(model, "llava_next_video", partial(_next_images, base), partial(_next_videos, base))


def onevision_anatomy(model: Any) -> Anatomy:
    """The parts of a ``LlavaOnevisionForConditionalGeneration``."""
    images, videos = partial(_onevision_images, model.model), partial(_onevision_videos, model.model)
    return _anatomy(model, "llava_onevision", images, videos)


def _anatomy(
    model: Any,
    family: str,
    images: Callable[[Mapping[str, Any]], Arrangement],
    videos: Callable[[Mapping[str, Any]], Arrangement] | None = None,
) -> Anatomy:
    base, config = model.model, model.config
    tower = clip_like_tower(base, config, family, keeps_cls=False)
    strategy, fits = config.vision_feature_select_strategy, "default" if tower.has_cls else "full"
    if strategy != fits:
        raise ValueError(
            f"{family} with vision_feature_select_strategy={strategy!r} and a {config.vision_config.model_type!r} "
            f"tower: tiles do not fill their grid. Set it to {fits!r}."
        )
    features = [FeatureCall("get_image_features", images)]
    tokens = [config.image_token_id]
    if videos is not None:
        features.append(FeatureCall("get_video_features", videos))
        tokens.append(config.video_token_id)
    return Anatomy(
        family=family,
        base=base,
        tower=tower,
        projector=base.multi_modal_projector,
        decoder=base.language_model,
        decoder_layers=list(base.language_model.layers),
        image_tokens=tuple(tokens),
        tile="tile",
        features=tuple(features),
    )


def _tiles(config: Any, sizes: Any) -> list[int]:
    """Tiles that the processor cuts images of these heights and widths into, the small one of all included."""
    pinpoints, side = config.image_grid_pinpoints, config.vision_config.image_size
    return [image_size_to_num_patches(size, grid_pinpoints=pinpoints, patch_size=side) for size in sizes]


def _sizes(given: Mapping[str, Any]) -> Any:
    """Heights and widths of the images, on the host: stock code reads them there, one by one."""
    sizes = given["image_sizes"]
    return sizes.cpu() if isinstance(sizes, torch.Tensor) else sizes


def _next_images(base: Any, given: Mapping[str, Any]) -> Arrangement:
    sizes = _sizes(given)
    images = _tiles(base.config, sizes)

    def pack(features: torch.Tensor, newline: torch.Tensor) -> list[torch.Tensor]:
        tiles = torch.split(features, images)
        strategy = base.config.vision_feature_select_strategy
        return base.pack_image_features(tiles, sizes, strategy, image_newline=newline)[0]

    return Arrangement(images, pack)


def _onevision_images(base: Any, given: Mapping[str, Any]) -> Arrangement:
    sizes, config = _sizes(given), base.config
    images, together = _tiles(config, sizes), given.get("batch_num_images")
    if together is not None:  # several images in one prompt come as one tile each
        alone = [int(n) == 1 for n in together for _ in range(int(n))]
        images = [n if cut else 1 for n, cut in zip(images, alone, strict=True)]
    ratio = given.get("vision_aspect_ratio") or config.vision_aspect_ratio

    def pack(features: torch.Tensor, newline: torch.Tensor) -> list[torch.Tensor]:
        tiles = torch.split(features, images)
        return base.pack_image_features(tiles, sizes, image_newline=newline, vision_aspect_ratio=ratio)[0]

    return Arrangement(images, pack)


def _next_videos(base: Any, given: Mapping[str, Any]) -> Arrangement:
    videos, frames = video_pixels(given).shape[:2]
    side = base.config.vision_config.image_size // base.config.vision_config.patch_size
    stride = base.config.spatial_pool_stride

    def pack(features: torch.Tensor, newline: torch.Tensor) -> list[torch.Tensor]:
        return list(features.unflatten(0, (videos, frames)).flatten(1, 2))

    return Arrangement([frames] * videos, pack, merge=stride, frame_grid=(side // stride, side // stride))


def _onevision_videos(base: Any, given: Mapping[str, Any]) -> Arrangement:
    videos, frames = video_pixels(given).shape[:2]
    side = math.ceil(
        base.config.vision_config.image_size // base.config.vision_config.patch_size / 2
    )  # of apply_pooling

    def pack(features: torch.Tensor, newline: torch.Tensor) -> list[torch.Tensor]:
        pooled = base.apply_pooling(features).unflatten(0, (videos, frames)).flatten(1, 2)
        return [torch.cat([video, newline[None]]) for video in pooled]

    return Arrangement([frames] * videos, pack, frame_grid=(side, side))
