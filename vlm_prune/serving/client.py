"""Pruning outside the engine, where vLLM itself cannot prune: embeddings from a pruned Hugging Face model."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..call import stream
from ..errors import PolicyError, StateError


@torch.no_grad()
def image_embeds(model: Any, processor: Any, images: list[Any]) -> list[torch.Tensor]:
    """The kept visual tokens of each image after the projector of a pruned model: a list of ``(tokens, channels)``.

    Send them in place of the images, to an engine started with ``enable_mm_embeds=True``:
    ``{"prompt": prompt, "multi_modal_data": {"image": embeds}}``. The number kept may differ from image to image, and
    depend on the image's content.

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
        if policy.acts.inside:
            raise PolicyError(
                f'policy="{policy.name}" acts in the {" and ".join(policy.stages)} stages, and embeddings carry only '
                "the encode stage to an engine. Choose a policy of that stage alone."
            )
    if pruning.positions == "original":
        raise PolicyError(
            f"{pruning.name} keeps the original positions of tokens, and an engine numbers embeddings without gaps. "
            "Leave positions out; a model with multimodal RoPE cannot be pruned outside an engine."
        )
    known = inspect.signature(model.get_image_features).parameters
    embeds = []
    for image in images:
        inputs = processor.image_processor(image, return_tensors="pt")
        given = {name: value for name, value in inputs.items() if name in known}
        given["pixel_values"] = given["pixel_values"].to(model.device, model.dtype)
        features = model.get_image_features(**given).pooler_output
        rows = torch.cat([*features]) if isinstance(features, list | tuple) else features.flatten(0, 1)
        embeds.append(rows[~stream.find_holes(rows[None])[0]])
    return embeds
