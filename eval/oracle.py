"""What pruning itself costs in prefill: a pruned prompt against an oracle that never had the dropped tokens.

Both run the same language model in the same process, taking turns. The oracle gets the shortened embeddings, mask and
positions ready made, so the difference is all that this package adds: finding the holes, closing them, restoring the
full length, telling the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm_prune import pruned
from vlm_prune.versions import CACHE

VISUAL, TEXT = 576, 32
IMAGE_TOKEN = 31_999

Run = Callable[[], tuple[float, torch.Tensor]]


@dataclass(frozen=True)
class OracleResult:
    """Milliseconds of each round, in order; ``difference`` is the largest one between the two results."""

    tokens: int
    pruned_ms: list[float]
    oracle_ms: list[float]
    difference: float

    @property
    def ratio(self) -> float:
        """Median of the pruned prefills over median of the oracle's."""
        return median(self.pruned_ms) / median(self.oracle_ms)

    def __str__(self) -> str:
        return (
            f"prefill at {self.tokens} of {VISUAL} visual tokens and {TEXT} of text, median of {len(self.oracle_ms)}: "
            f"pruned {median(self.pruned_ms):.2f} ms, oracle {median(self.oracle_ms):.2f} ms, ratio {self.ratio:.3f} "
            f"(largest difference of the hidden states: {self.difference:.1e})"
        )


def build(hidden: int, layers: int) -> LlavaForConditionalGeneration:
    """LLaVA-1.5's layout, 24 x 24 patches, around a small tower; random weights."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=IMAGE_TOKEN + 1,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def compare(tokens: int = 64, hidden: int = 1024, layers: int = 8, rounds: int = 40) -> OracleResult:
    """Time ``rounds`` prefills of either kind, after two of each to warm up."""
    model = build(hidden, layers)
    ids = torch.randint(0, IMAGE_TOKEN, (1, VISUAL + TEXT))
    ids[:, 4 : 4 + VISUAL] = IMAGE_TOKEN
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 336, 336),
    }
    decoder = model.model.language_model
    shortened = shortened_inputs(model, inputs, tokens)

    def with_pruning() -> tuple[float, torch.Tensor]:
        with pruned(model, "uniform", tokens=tokens), timed(decoder) as spent:
            rows = model.model(**inputs, use_cache=True).last_hidden_state
        return spent[0], rows[rows.abs().sum(-1) > 0][None]

    def without() -> tuple[float, torch.Tensor]:
        with timed(decoder) as spent:
            rows = decoder(**shortened).last_hidden_state
        return spent[0], rows

    times: dict[Run, list[float]] = {with_pruning: [], without: []}
    for number in range(rounds + 2):
        results = {}
        for kind in (with_pruning, without) if number % 2 else (without, with_pruning):
            spent, results[kind] = kind()
            if number >= 2:
                times[kind].append(spent)
    difference = float((results[with_pruning] - results[without]).abs().max())
    return OracleResult(tokens, times[with_pruning], times[without], difference)


def shortened_inputs(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> dict[str, Any]:
    """What the first decoder layer of a pruned call is about to see, as arguments of the decoder."""
    seen: dict[str, Any] = {}

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    with pruned(model, "uniform", tokens=tokens):
        # registered last, so it sees what pruning made of the arguments
        handle = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
        model.model(**inputs, use_cache=True)
        handle.remove()
    seen.pop(CACHE, None)
    return seen


@contextmanager
def timed(module: torch.nn.Module) -> Iterator[list[float]]:
    """Milliseconds of each call of a module inside the block, all of its hooks included."""
    begun, found = [0.0], []

    def begin(*call: Any) -> None:
        begun[0] = time.perf_counter()

    def end(*call: Any) -> None:
        found.append(1e3 * (time.perf_counter() - begun[0]))

    # in front of the hooks that are there, and behind them
    handles = [module.register_forward_pre_hook(begin, prepend=True), module.register_forward_hook(end)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
