"""Answers in batches, and latencies that can be compared: what the demo's rows are made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from vlm_prune import Receipt, pruned


@dataclass(frozen=True)
class Setting:
    """A policy at a budget: ``ratio`` of the visual tokens is kept (``None``: the policy drops none by budget)."""

    policy: str
    ratio: float | None
    fields: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def options(self) -> dict[str, Any]:
        """What `prune` takes beside the policy."""
        return {**self.fields, **({} if self.ratio is None else {"ratio": self.ratio})}


@dataclass(frozen=True)
class Answers:
    """Texts in the order of the prompts, and the visual tokens that were really kept, per image on average."""

    texts: list[str]
    tokens: float


@dataclass(frozen=True)
class Latency:
    """Of one question about one image: medians of the times in milliseconds, mean bytes of the KV cache.

    ``tower_ms`` reaches from pixels to projected features, choosing tokens included; ``prefill_ms`` is the language
    model's; ``answer_ms`` is all of ``generate`` until the answer ends.
    """

    tower_ms: float
    prefill_ms: float
    answer_ms: float
    kv_bytes: int


def prompt_text(processor: ProcessorMixin, question: str) -> str:
    """The model's own chat prompt for one image and a question."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return text


def batches(prompts: Sequence[tuple[Image.Image, str]], size: int) -> Iterator[list[int]]:
    """Numbers of the prompts that go together: images of one size first, then similar lengths, so little padding."""
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i][0].size, len(prompts[i][1])))
    yield from (order[start : start + size] for start in range(0, len(order), size))


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Sequence[tuple[Image.Image, str]],
    max_new_tokens: int,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Greedy answers of a pruned model to ``(image, question)`` prompts; ``advance`` hears of each batch."""
    texts, kept = [""] * len(prompts), 0
    for batch in batches(prompts, batch_size):
        inputs = processor(
            images=[prompts[i][0] for i in batch],
            text=[prompt_text(processor, prompts[i][1]) for i in batch],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(batch, processor.batch_decode(new, skip_special_tokens=True), strict=True):
            texts[i] = text.strip()
        kept += sum(map(len, receipt_of(model).kept))
        advance(len(batch))
    return Answers(texts, kept / len(prompts))


def receipt_of(model: PreTrainedModel) -> Receipt:
    """The receipt of a pruned model's last call."""
    receipt: Receipt | None = model.pruning.receipt
    if receipt is None:
        raise RuntimeError("the pruned model has seen no image yet")
    return receipt


def latencies(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    settings: Sequence[Setting],
    prompts: Sequence[tuple[Image.Image, str]],
    rounds: int,
    max_new_tokens: int = 4,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[Setting, Latency]:
    """Time one prompt at a time under every setting, on the machine as it is.

    Settings take turns within a round, each round begins with another one, and prompts change from round to round,
    so that drift and neighbours on the machine hit all settings alike. The first round of each prompt warms up and
    is thrown away. ``model`` must not be pruned.
    """
    inputs = [
        processor(images=[image], text=[prompt_text(processor, text)], return_tensors="pt")
        for image, text in prompts
    ]
    found: dict[Setting, list[tuple[float, float, float, int]]] = {setting: [] for setting in settings}
    for number in range(rounds + 1):
        turn = number % len(settings)
        for setting in [*settings[turn:], *settings[:turn]]:
            for one in inputs:
                measured = _one_answer(model, setting, one, max_new_tokens)
                if number:
                    found[setting].append(measured)
        advance(len(inputs) * len(settings))
    return {
        setting: Latency(
            tower_ms=median(row[0] for row in rows),
            prefill_ms=median(row[1] for row in rows),
            answer_ms=median(row[2] for row in rows),
            kv_bytes=round(mean(row[3] for row in rows)),
        )
        for setting, rows in found.items()
    }


@torch.no_grad()
def _one_answer(
    model: PreTrainedModel, setting: Setting, inputs: Any, max_new_tokens: int
) -> tuple[float, float, float, int]:
    with pruned(model, setting.policy, **setting.options):
        begin = time.perf_counter()
        model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        elapsed = 1e3 * (time.perf_counter() - begin)
        receipt = receipt_of(model)
        return receipt.tower_ms or 0.0, receipt.prefill_ms or 0.0, elapsed, receipt.kv_bytes or 0
