"""What everything that asks a pruned model needs: the model's own prompt, and the receipt of the answer."""

from __future__ import annotations

from transformers import PreTrainedModel, ProcessorMixin

from vlm_prune import Receipt


def prompt_text(processor: ProcessorMixin, question: str) -> str:
    """The model's own chat prompt for one image and a question."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return text


def receipt_of(model: PreTrainedModel) -> Receipt:
    """The receipt of a pruned model's last call."""
    receipt: Receipt | None = model.pruning.receipt
    if receipt is None:
        raise RuntimeError("the pruned model has seen no image yet")
    return receipt
