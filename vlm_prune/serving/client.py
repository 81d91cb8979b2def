"""Pruning in front of the engine: embeddings made by a pruned Hugging Face model, where vLLM itself cannot prune."""

from __future__ import annotations

from typing import Any

import torch

from .. import stream
from ..errors import PolicyError, StateError


@torch.no_grad()
def image_embeds(model: Any, processor: Any, images: list[Any]) -> list[torch.Tensor]:
    """What is left of each image behind the projector of a pruned model: a list of ``(tokens, channels)``.

    Send them in place of the images, to an engine started with ``enable_mm_embeds=True``:
    ``{"prompt": prompt, "multi_modal_data": {"image": embeds}}``. Budgets may differ from image to image, and depend on
    what is in it.

    Args:
        model: pruned by `vlm_prune.prune`, of the checkpoint that the engine serves.
        processor: its processor.
        images: PIL images.

    Raises:
        StateError: the model is not pruned.
        PolicyError: its policy acts inside the language model, which the engine runs.
    """
    if (pruning := getattr(model, "pruning", None)) is None:
        raise StateError(f"This {type(model).__name__} is not pruned: call prune(model, ...) first.")
    for policy in pruning.policies:
        if policy.stages != ("encode",):
            raise PolicyError(
                f'policy="{policy.name}" acts in the {" and ".join(policy.stages)} stages, and an engine that is sent '
                "embeddings runs nothing but the encode stage. Choose a policy of that stage alone."
            )
    embeds = []
    for image in images:
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"].to(
            model.device, model.dtype
        )
        features = model.get_image_features(pixel_values=pixels).pooler_output
        rows = torch.cat([*features]) if isinstance(features, list | tuple) else features.flatten(0, 1)
        embeds.append(rows[~stream.find_holes(rows[None])[0]])
    return embeds
