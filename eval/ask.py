"""One question about one image, the answer as it is written, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin, TextStreamer

from vlm_prune import Receipt, pruned
from vlm_prune.eval.measure import receipt_of


@dataclass(frozen=True)
class Answer:
    """An answer and its cost.

    Attributes:
        text: without special tokens.
        receipt: what was kept of the image.
        new_tokens: length of the answer.
        first_ms: milliseconds until its first token.
        total_ms: milliseconds until its last.
        peak_bytes: most memory that was allocated on the GPU at a time, weights included; ``None`` on a CPU.
    """

    text: str
    receipt: Receipt
    new_tokens: int
    first_ms: float
    total_ms: float
    peak_bytes: int | None

    @property
    def entered(self) -> int:
        """Visual tokens that entered the language model."""
        return sum(map(len, self.receipt.kept))

    @property
    def left(self) -> int:
        """Visual tokens that its last layer still computed."""
        return sum(map(len, self.receipt.decoder_units[-1]))


class _Clocked(TextStreamer):
    """Hands on text as soon as it is whole words, and notes when the first token came."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.times = show, list[float]()

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then token after token."""
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece of the answer."""
        self.show(text)


def chat_inputs(processor: ProcessorMixin, image: Image.Image, question: str) -> BatchFeature:
    """What the model's own chat template makes of one image and a question about it."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs: BatchFeature = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return inputs


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    question: str,
    policy: str = "flowcut",
    options: Mapping[str, Any] = MappingProxyType({}),
    *,
    max_new_tokens: int = 128,
    show: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Ask an unpruned ``model`` under a policy, greedily; it is unpruned again afterwards.

    Args:
        model: of a supported family.
        processor: its processor, with a chat template.
        image: RGB.
        question: in words, without the template.
        policy: as in `vlm_prune.prune`; "none" keeps every token.
        options: a budget, and settings of the policy.
        max_new_tokens: where the answer ends at the latest.
        show: is handed the answer piece by piece as it is written.

    Raises:
        PruningError: as `vlm_prune.prune`.
    """
    inputs = chat_inputs(processor, image, question).to(model.device, model.dtype)
    on_gpu = model.device.type == "cuda"
    streamer = _Clocked(getattr(processor, "tokenizer", processor), show)
    with pruned(model, policy, **options):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(model.device)
        begun = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
        ended = time.perf_counter()  # a streamer has read every token, so nothing is under way on a GPU
        receipt = receipt_of(model)
    new = output[0, inputs["input_ids"].shape[1] :]
    text: str = processor.decode(new, skip_special_tokens=True)
    return Answer(
        text=text.strip(),
        receipt=receipt,
        new_tokens=len(new),
        first_ms=1e3 * (streamer.times[1] - begun),
        total_ms=1e3 * (ended - begun),
        peak_bytes=torch.cuda.max_memory_allocated(model.device) if on_gpu else None,
    )


def cost_rows(answers: Mapping[str, Answer]) -> list[list[str]]:
    """A table of what answers cost, a column each: its head, then a row for each quantity."""
    rows = [["", *answers]]

    def row(name: str, value: Callable[[Answer], str | None]) -> None:
        cells = [value(answer) for answer in answers.values()]
        if None not in cells:
            rows.append([name, *map(str, cells)])

    row("visual tokens", lambda a: str(a.entered))
    if any(a.left != a.entered for a in answers.values()):
        row("visual tokens, last layer", lambda a: str(a.left))
    row("vision tower", lambda a: _time(a.receipt.tower_ms))
    row("prefill", lambda a: _time(a.receipt.prefill_ms))
    row("first token after", lambda a: _time(a.first_ms))
    row("whole answer", lambda a: f"{_time(a.total_ms)}, {a.new_tokens} tokens")
    row("KV cache", lambda a: _mib(a.receipt.kv_bytes))
    row("peak GPU memory", lambda a: _mib(a.peak_bytes))
    row("compute to first token", lambda a: f"{a.receipt.flops / 1e12:.3g} TFLOP")
    return rows


def _time(milliseconds: float | None) -> str | None:
    return None if milliseconds is None else f"{milliseconds:.0f} ms"


def _mib(count: int | None) -> str | None:
    return None if count is None else f"{count / 2**20:.1f} MiB"
