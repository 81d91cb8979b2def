"""What everything that asks a pruned model needs: the model's own prompt, and the receipt of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from vlm_prune import Receipt


def prompt_text(processor: ProcessorMixin, question: str) -> str:
    """The model's own chat prompt for one image and a question."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return text


def model_inputs(
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    names: Sequence[str],
    **options: Any,
) -> BatchFeature:
    """What a processor makes of prompts with one image each.

    Args:
        processor: the model's.
        images: as many as prompts.
        texts: the prompts.
        names: what to call the images in errors.
        options: of the processor.

    Raises:
        ValueError: the processor refuses an image, such as one that is far wider than high; says which one.
    """
    try:
        return processor(images=list(images), text=list(texts), return_tensors="pt", **options)
    except Exception as error:  # whatever processors raise
        if len(images) > 1:
            for one in zip(images, texts, names, strict=True):
                model_inputs(processor, [one[0]], [one[1]], [one[2]], **options)
            raise
        width, height = images[0].size
        raise ValueError(
            f"{type(processor).__name__} cannot take image {names[0]} of {width} x {height} pixels: {error}"
        ) from error


def receipt_of(model: PreTrainedModel) -> Receipt:
    """The receipt of a pruned model's last call."""
    receipt: Receipt | None = model.pruning.receipt
    if receipt is None:
        raise RuntimeError("the pruned model has seen no image yet")
    return receipt
