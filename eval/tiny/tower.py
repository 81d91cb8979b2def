"""Stage 0: pre-train a vision tower on dense patch labels and on multi-label CLS targets.

The CLS loss stands in for the contrastive loss of CLIP: it gives CLS attention a meaning. The dense labels
make the patch tokens of the consumed layer carry what a language model needs. Afterwards the tower is frozen.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, CLIPVisionConfig, InternVLVisionConfig, PreTrainedModel

from ..scenes import COLORS, SHAPES, Scene, make_desk, make_scene
from ..scenes.desk import CHARACTERS
from . import attention
from .training import make_optimizers, train
from .views import (
    GRID,
    IGNORE,
    PART_CLASSES,
    PRESENT_LABELS,
    SIZES,
    View,
    image_labels,
    normalize,
    patch_labels,
    views,
)

BATCH = 24
MAX_COUNT = 10


def build_tower(config: CLIPVisionConfig | InternVLVisionConfig, seed: int) -> PreTrainedModel:
    """A fresh tower; sin-cos positions and equal query and key weights make attention local at once."""
    torch.manual_seed(seed)
    config = copy.deepcopy(config)
    config._attn_implementation = attention.register()
    tower = AutoModel.from_config(config)
    positions = sincos_positions(config.hidden_size)
    with torch.no_grad():
        if config.model_type == "internvl_vision":
            tower.embeddings.position_embeddings[0, 1:] = positions
            nn.init.normal_(tower.embeddings.cls_token, std=0.1)
        else:
            embeddings = next(m for m in tower.modules() if hasattr(m, "position_embedding"))
            embeddings.position_embedding.weight[1:] = positions
        for module in tower.modules():
            if hasattr(module, "q_proj"):
                nn.init.normal_(module.q_proj.weight, std=0.07)
                module.k_proj.weight.copy_(module.q_proj.weight)
    return tower


def sincos_positions(width: int, scale: float = 0.5) -> torch.Tensor:
    """Two-dimensional sin-cos table, float32 `(256, width)`, times `scale`."""
    frequencies = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(GRID)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows = line[:, None].expand(GRID, GRID, -1)
    columns = line[None].expand(GRID, GRID, -1)
    return scale * torch.cat([rows, columns], -1).reshape(GRID * GRID, width)


class TowerHeads(nn.Module):
    """Linear read-outs of the patch tokens and of CLS, thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (PART_CLASSES + 1, len(COLORS) + 1, 3)
        self.patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self.sizes)))
        self.image = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, PRESENT_LABELS + MAX_COUNT + 1))

    def forward(self, patches: torch.Tensor, cls: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`(batch, 256, width)` and `(batch, width)` to shape, colour, geometry, label and count outputs."""
        shape, color, geometry = self.patch(patches).float().split(self.sizes, -1)
        image = self.image(cls).float()
        return shape, color, geometry, image[:, : -MAX_COUNT - 1], image[:, -MAX_COUNT - 1 :]


class TrainedTower(nn.Module):
    """A tower and its heads."""

    def __init__(self, config: CLIPVisionConfig | InternVLVisionConfig, layer: int, seed: int) -> None:
        super().__init__()
        self.layer = layer
        self.tower = build_tower(config, seed)
        self.heads = TowerHeads(config.hidden_size)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Head outputs for normalised pixels `(batch, 3, 128, 128)`."""
        with attention.autocast():
            outputs = self.tower(pixels, output_hidden_states=True)
            cls = (
                outputs.pooler_output
                if outputs.pooler_output is not None
                else outputs.last_hidden_state[:, 0]
            )
            return self.heads(outputs.hidden_states[self.layer][:, 1:], cls)


def training_views(seed: tuple[int, ...], count: int, tiled: bool, desks: float = 0.0) -> list[View]:
    """`count` views, half of the scenes dense; with `tiled` a third of all are tiles and thumbnails.

    The share `desks` of the scenes are desks.
    """
    rng = np.random.default_rng((*seed, 0))

    def scene(key: tuple[int, ...], size: tuple[int, int], dense: bool) -> Scene:
        return make_desk(key, size) if rng.random() < desks else make_scene(key, size, dense)

    found: list[View] = []
    while tiled and len(found) < count // 3:
        size, dense = SIZES[rng.integers(1, len(SIZES))], bool(rng.integers(2))
        found += views(scene((*seed, 1, len(found)), size, dense))
    found = found[: count // 3]
    for index in range(count - len(found)):
        found += views(scene((*seed, 2, index), (128, 128), index % 2 == 0))
    return found


def batch_labels(batch: list[View]) -> dict[str, torch.Tensor]:
    """Targets of `patch_labels` and `image_labels`, stacked."""
    rows = [patch_labels(view) | image_labels(view) for view in batch]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def cls_weight(progress: float, ramp: bool) -> float:
    """Weight of the CLS labels: 0.15, with `ramp` 0.02 at first and rising from 30 to 60 % of the steps.

    Where CLS shares its layer with the consumed patches (InternViT), a high weight holds the patches back.
    """
    return 0.02 + 0.13 * min(1.0, max(0.0, (progress - 0.3) / 0.3)) if ramp else 0.15


def tower_losses(
    outputs: tuple[torch.Tensor, ...], labels: dict[str, torch.Tensor], cls: float
) -> dict[str, torch.Tensor]:
    """Losses by name, CLS labels weighted by `cls`; background weighs half as much as objects."""
    shape, color, geometry, present, count = outputs
    seen = labels["object"] >= 0

    def classes(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(
            logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE, reduction="none"
        )
        losses = losses.view_as(target)
        background = target == logits.shape[-1] - 1
        decided = seen & (target != IGNORE)
        return losses[decided].mean() + 0.5 * losses[background].mean()

    multi = (
        F.binary_cross_entropy_with_logits(present, labels["present"], reduction="none") * labels["counted"]
    )
    return {
        "shape": classes(shape, labels["shape"]),
        "color": 0.5 * classes(color, labels["color"]),
        "geometry": 0.5 * F.smooth_l1_loss(geometry[seen], labels["geometry"][seen], beta=0.1),
        "cls": cls * multi.sum(1).mean(),
        "count": 0.1 * F.cross_entropy(count, labels["count"].clamp(max=MAX_COUNT), ignore_index=IGNORE),
    }


def tower_figures(
    model: TrainedTower, pixels: torch.Tensor, labels: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Held-out accuracy of the patch read-outs (on object patches) and F1 of the CLS labels."""
    parts = [model(chunk) for chunk in pixels.split(48)]
    shape, color, geometry, present, _ = (torch.cat(part) for part in zip(*parts, strict=True))
    seen = labels["object"] >= 0
    background = labels["shape"] == PART_CLASSES
    predicted, counted = (present > 0).float() * labels["counted"], labels["present"]

    def f1(columns: slice) -> float:
        hits = (predicted * counted)[:, columns].sum().item()
        return 2 * hits / max(1.0, (predicted + counted)[:, columns].sum().item())

    character = seen & (labels["shape"] >= len(SHAPES)) & (labels["shape"] < PART_CLASSES - 1)
    colored = seen & (labels["color"] != IGNORE)
    characters = (shape.argmax(-1) == labels["shape"])[character].float()
    offset = (geometry - labels["geometry"])[seen][:, :2].abs().mean().item() * 16
    return {
        "patch_shape_accuracy": round((shape.argmax(-1) == labels["shape"])[seen].float().mean().item(), 4),
        "patch_color_accuracy": round(
            (color.argmax(-1) == labels["color"])[colored].float().mean().item(), 4
        ),
        **({"patch_character_accuracy": round(characters.mean().item(), 4)} if len(characters) else {}),
        "background_accuracy": round((shape.argmax(-1) == PART_CLASSES)[background].float().mean().item(), 4),
        "offset_pixels": round(offset, 3),
        "cls_shape_f1": round(f1(slice(0, len(SHAPES))), 4),
        "cls_pair_f1": round(f1(slice(len(SHAPES) + len(COLORS), -len(CHARACTERS))), 4),
    }


def pretrain_tower(
    config: CLIPVisionConfig | InternVLVisionConfig,
    layer: int,
    mean: list[float],
    std: list[float],
    folder: Path,
    steps: int,
    seed: int,
    desks: float = 0.0,
    start: dict[str, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """Train, or resume, a tower whose `hidden_states[layer]` are consumed; return it frozen, in float32.

    Args:
        config: of the tower.
        layer: hidden state that the language model consumes.
        mean: of the pixels.
        std: of the pixels.
        folder: of the checkpoint and the log.
        steps: steps of `BATCH` views.
        seed: of weights and data.
        desks: share of the scenes that are desks.
        start: weights of a trained tower to begin with.
    """
    tiled = config.model_type == "internvl_vision"
    model = TrainedTower(config, layer, seed)
    if start is not None:
        model.tower.load_state_dict(start)
    matrices = [p for name, p in model.tower.named_parameters() if p.ndim == 2 and "embedding" not in name]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]

    def batch(key: tuple[int, ...], count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        chosen = training_views(key, count, tiled, desks)
        return normalize(torch.stack([view.pixels for view in chosen]), mean, std), batch_labels(chosen)

    held_out = batch((seed, 1), 144)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        pixels, labels = batch((seed, 0, step), BATCH)
        return tower_losses(model(pixels), labels, cls_weight(step / steps, ramp=tiled))

    train(
        folder,
        model,
        make_optimizers(matrices, rest),
        steps,
        loss_at,
        lambda: tower_figures(model, *held_out),
    )
    return model.tower.requires_grad_(False)
