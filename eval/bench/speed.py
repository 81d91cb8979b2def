"""What pruning saves, and how far from the oracle it stays: rows for table, JSON and plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlm_prune import prune, pruned, unprune
from vlm_prune.call.flops import decoder_flops
from vlm_prune.eval.bench.clock import Times, interleaved, peak_bytes
from vlm_prune.eval.bench.subject import Subject

ANSWER = 8
"""New tokens of an end-to-end run."""


@dataclass(frozen=True)
class Row:
    """One policy at one budget; ``policy="dense"`` is the stock model.

    Times are medians in milliseconds, ratios are medians of the ratios round by round. ``oracle`` compares with a stock
    model that is handed the shortened prompt, ``dense`` with the stock model on the whole one. ``flops`` are those of
    the language model's prefill by the receipt, ``flops_formula`` by the shapes of the shortened prompt.
    """

    policy: str
    tokens: int
    prompt_rows: int
    prefill_ms: float
    prefill_spread: float
    prefill_over_oracle: float | None
    prefill_over_dense: float
    decode_ms: float
    decode_over_oracle: float | None
    decode_over_dense: float
    tower_ms: float
    tower_over_dense: float
    end_to_end_ms: float
    end_to_end_over_dense: float
    peak_bytes: int
    kv_bytes: int
    kv_over_dense: float
    flops: int
    flops_formula: int

    def json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@torch.no_grad()
def speed(
    subject: Subject, policies: Sequence[str], budgets: Sequence[int], rounds: int, device: str
) -> list[Row]:
    """Measure the stock model, and each of ``policies`` at each of ``budgets`` beside it."""
    rows = [_dense(subject, rounds, device)]
    for policy in policies:
        for tokens in budgets:
            rows.append(_pruned(subject, policy, tokens, rounds, device, rows[0]))
    return rows


def _answer(subject: Subject) -> None:
    subject.model.generate(
        **subject.inputs, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, pad_token_id=0
    )


def _dense(subject: Subject, rounds: int, device: str) -> Row:
    times = interleaved(
        {
            "prefill": subject.prefill(),
            "decode": subject.dense_steps(),
            "tower": subject.encode(),
            "whole": lambda: _answer(subject),
        },
        rounds,
    )
    with pruned(subject.model, "none"):
        subject.model(**subject.inputs, use_cache=True, logits_to_keep=1)
        receipt = subject.model.pruning.receipt
    length = subject.inputs["input_ids"].shape[1]
    flops = decoder_flops(subject.decoder.config, [length] * subject.layers)
    return Row(
        "dense", subject.visual, length, times["prefill"].median, times["prefill"].spread, None, 1.0,
        times["decode"].median, None, 1.0, times["tower"].median, 1.0, times["whole"].median, 1.0,
        peak_bytes(subject.prefill(), device), receipt.kv_bytes_dense, 1.0, flops, flops,
    )  # fmt: skip


def _pruned(subject: Subject, policy: str, tokens: int, rounds: int, device: str, dense: Row) -> Row:
    options: dict[str, Any] = {"tokens": tokens}
    shortened = subject.shortened(policy, options)
    rows = shortened["inputs_embeds"].shape[1]
    stock = subject.oracle_prefill(shortened)
    oracle_step, dense_step = subject.oracle_steps(shortened), subject.dense_steps()
    model, prefill, encode = subject.model, subject.prefill(), subject.encode()
    prune(model, policy, **options)
    step = subject.dense_steps()
    peak = peak_bytes(prefill, device)
    receipt = model.pruning.receipt
    unprune(model)

    def inside(run: Any) -> Any:
        """Its own time, without that of pruning and unpruning the model around it."""

        def call() -> float:
            prune(model, policy, **options)
            try:
                return interleaved({"run": run}, 1, warm=0)["run"].median
            finally:
                unprune(model)

        return call

    # the two to compare closely take more turns, without the slow one between them
    times = interleaved({"ours": subject.pruned_prefill(policy, options), "oracle": stock}, 4 * rounds)
    decode = interleaved({"ours": inside(step), "oracle": oracle_step, "dense": dense_step}, max(rounds, 20))
    tower = interleaved({"ours": inside(encode), "dense": encode}, rounds)
    whole = interleaved(
        {"ours": inside(lambda: _answer(subject)), "dense": lambda: _answer(subject)}, max(3, rounds // 3)
    )

    def over(some: dict[str, Times], other: str = "dense") -> float:
        return some["ours"].over(some[other])

    return Row(
        policy, tokens, rows, times["ours"].median, times["ours"].spread, over(times, "oracle"),
        times["ours"].median / dense.prefill_ms,
        decode["ours"].median, over(decode, "oracle"), over(decode), tower["ours"].median, over(tower),
        whole["ours"].median, over(whole), peak, receipt.kv_bytes,
        receipt.kv_bytes / dense.kv_bytes, decoder_flops(subject.decoder.config, receipt.decoder_tokens),
        decoder_flops(subject.decoder.config, [rows] * subject.layers),
    )  # fmt: skip
