"""Parts of models that have other names in other versions of transformers that we support (5.4 and later)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def consumed_layers(config: Any) -> int | list[int] | tuple[int, ...]:
    """``config.vision_feature_layer``, which VipLLaVA named differently in 5.19."""
    return getattr(config, "vision_feature_layers", None) or config.vision_feature_layer


def video_pixels(arguments: Mapping[str, Any]) -> Any:
    """A ``get_video_features`` call's ``pixel_values_videos``, which were called ``pixel_values`` in 5.4."""
    given = arguments.get("pixel_values_videos")
    return arguments["pixel_values"] if given is None else given


def flat_tower(tower: Any) -> Any:
    """The module in a CLIP vision model that has its layers: in older versions, one further in."""
    return getattr(tower, "vision_model", tower)
