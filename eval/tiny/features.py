"""The visual features a language model consumes, and a cache of them for training.

"Visual token" means a row that enters the language model: a patch of tiny-llava, a 2 x 2 cell of patches of
one tile of tiny-internvl.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..scenes import PATCH, Part, Scene, coverage, make_desk, make_scene
from . import attention
from .configs import MEAN, STD
from .views import SIZES, normalize, views

SIZE_PRIOR = (0.40, 0.14, 0.14, 0.16, 0.08, 0.08)
"""How often InternVL trains on each of `SIZES`."""


def is_tiled(model: PreTrainedModel) -> bool:
    """Whether the model cuts images into tiles and merges 2 x 2 patches (InternVL)."""
    return model.config.model_type == "internvl"


def consumed_features(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """Tower output right before the projector, for normalised pixels `(views, 3, 128, 128)`."""
    return select_features(model, model.model.vision_tower(pixels, output_hidden_states=True))


def select_features(model: PreTrainedModel, outputs: BaseModelOutputWithPooling) -> torch.Tensor:
    """What the projector consumes of a tower's outputs.

    Returns:
        `(views, 256, width)` for LLaVA, `(views, 64, 4 * width)` for InternVL.
    """
    config = model.config
    if not is_tiled(model):
        return outputs.hidden_states[config.vision_feature_layer][:, 1:]
    hidden = outputs.last_hidden_state[:, 1:]
    side = int(hidden.shape[1] ** 0.5)
    cells = model.model.pixel_shuffle(hidden.reshape(len(hidden), side, side, -1), config.downsample_ratio)
    return cells.flatten(1, 2)


def scene_pixels(scene: Scene) -> torch.Tensor:
    """Normalised tower inputs of a scene, float32 `(views, 3, 128, 128)`."""
    return normalize(torch.stack([view.pixels for view in views(scene)]), MEAN, STD)


def token_shares(scene: Scene, cell: int) -> np.ndarray:
    """How much of each part each visual token holds: float32 `(2, parts, tokens)`.

    The first plane spreads every part over the tiles, the second over the thumbnail (zeros without one);
    rows of a plane sum to one for every part that is visible there. `cell` is the side of a visual token
    in pixels.
    """
    count, found = len(scene.parts), views(scene)
    planes = [coverage(view.index_map, count, cell).reshape(count, -1) for view in found]
    shares = np.zeros((2, count, sum(plane.shape[1] for plane in planes)), np.float32)
    start = 0
    for position, plane in enumerate(planes):
        thumbnail = len(found) > 1 and position == len(found) - 1
        shares[int(thumbnail), :, start : start + plane.shape[1]] = plane
        start += plane.shape[1]
    return shares / np.maximum(shares.sum(-1, keepdims=True), 1e-6)


@dataclass
class FeatureCache:
    """Features of many scenes, one after the other.

    Attributes:
        features: bfloat16 `(all tokens, width)`.
        shares: `token_shares` of each scene, float16.
        starts: first row of each scene in `features`, and the end.
        parts: objects, characters and bars of each scene.
        sizes: width and height of each scene.
    """

    features: torch.Tensor
    shares: list[np.ndarray]
    starts: np.ndarray
    parts: list[tuple[Part, ...]]
    sizes: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.parts)

    def tokens(self, index: int) -> torch.Tensor:
        """Features of one scene, `(tokens, width)`."""
        return self.features[self.starts[index] : self.starts[index + 1]]


def training_scenes(count: int, seed: int, tiled: bool, desks: float = 0.0) -> Iterable[Scene]:
    """`count` scenes, of several sizes with `tiled`; the share `desks` of them are desks."""
    rng = np.random.default_rng((seed, 7))
    chosen = rng.choice(len(SIZES), size=count, p=SIZE_PRIOR) if tiled else np.zeros(count, int)
    desk = rng.random(count) < desks
    return (
        (make_desk if desk[index] else make_scene)((seed, 8, index), SIZES[size])
        for index, size in enumerate(chosen)
    )


@torch.no_grad()
def build_cache(model: PreTrainedModel, scenes: Iterable[Scene], count: int) -> FeatureCache:
    """Run the frozen tower once over all scenes."""
    cell = PATCH * 2 if is_tiled(model) else PATCH
    features, shares, parts, sizes = [], [], [], []
    waiting: list[torch.Tensor] = []

    def flush() -> None:
        with attention.autocast():
            features.append(consumed_features(model, torch.cat(waiting)).flatten(0, 1).bfloat16())
        waiting.clear()

    for scene in track(scenes, "features", total=count):
        waiting.append(scene_pixels(scene))
        shares.append(token_shares(scene, cell).astype(np.float16))
        parts.append(scene.parts)
        sizes.append(scene.image.size)
        if sum(map(len, waiting)) >= 32:
            flush()
    if waiting:
        flush()
    starts = np.cumsum([0, *(plane.shape[2] for plane in shares)])
    return FeatureCache(torch.cat(features), shares, starts, parts, sizes)


def load_or_build_cache(
    model: PreTrainedModel, path: Path, count: int, seed: int, desks: float = 0.0
) -> FeatureCache:
    """The training cache of `count` scenes, read from `path` when an earlier run left it there."""
    if path.exists():
        return torch.load(path, weights_only=False)
    cache = build_cache(model, training_scenes(count, seed, is_tiled(model), desks), count)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(cache, path)
    return cache
