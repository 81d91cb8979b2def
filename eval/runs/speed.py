"""Times of single prompts, a policy alternating with the unpruned model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vlm_prune import pruned
from vlm_prune.eval.measure import receipt_of
from vlm_prune.eval.runs.asking import inputs_of, record, tiles_of
from vlm_prune.eval.runs.folder import Record
from vlm_prune.eval.runs.models import Loaded
from vlm_prune.eval.runs.samples import Sample
from vlm_prune.eval.runs.scoring import SPEED

STEPS = ("tower", "prefill", "answer")


@torch.no_grad()
def time_prompts(
    loaded: Loaded,
    policy: str,
    options: dict[str, Any],
    samples: Sequence[Sample],
    rounds: int,
    max_new_tokens: int,
    folder: Path,
    advance: Callable[[int], None],
) -> tuple[list[Record], dict[str, float]]:
    """Records of the samples with bytes and operations, and the times, in milliseconds.

    ``tower`` is the time from pixels to projected features, with the choice of tokens; ``prefill`` is the language
    model's; ``answer`` is all of ``generate``. Pruned and unpruned calls alternate within a round, and the order
    changes from round to round, so that drift and other work on the machine affect both equally. The first
    round warms up and is discarded. Times are medians over rounds and prompts.
    """
    inputs = [inputs_of(loaded, [sample]) for sample in samples]
    settings: list[tuple[str, str, dict[str, Any]]] = [("", policy, options), ("dense_", "none", {})]
    times: dict[str, list[float]] = {before + step: [] for before, _, _ in settings for step in STEPS}
    records: list[Record] = []
    for number in range(rounds + 1):
        for before, name, chosen in settings if number % 2 else reversed(settings):
            for sample, one in zip(samples, inputs, strict=True):
                with pruned(loaded.model, name, **chosen):
                    if chosen.get("capture"):  # graphs are recorded by a first call, and gone with the block
                        loaded.model.generate(**one, max_new_tokens=1, do_sample=False, num_beams=1)
                    begin = time.perf_counter()
                    loaded.model.generate(**one, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
                    if loaded.model.device.type == "cuda":
                        torch.cuda.synchronize(loaded.model.device)
                    elapsed = 1e3 * (time.perf_counter() - begin)
                    receipt = receipt_of(loaded.model)
                if number:
                    spent = (receipt.tower_ms or 0.0, receipt.prefill_ms or 0.0, elapsed)
                    for step, value in zip(STEPS, spent, strict=True):
                        times[before + step].append(value)
                elif not before:
                    (tiles,) = tiles_of(loaded, [sample], receipt)
                    costs = {key: int(getattr(receipt, key) or 0) for key in SPEED}
                    records.append(record(sample, tiles, folder) | {"scores": costs})
        advance(2 * len(samples))
    found = {f"{name}_ms": median(values) for name, values in times.items()}
    ratios = {f"{step}_ratio": found[f"{step}_ms"] / found[f"dense_{step}_ms"] for step in STEPS}
    return records, {**found, **ratios}
