"""What pruning saves, and how far from the oracle it stays: rows for table, JSON and plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlm_prune import prune, pruned, unprune
from vlm_prune.call.flops import decoder_flops
from vlm_prune.eval.bench.calls import Call, calls
from vlm_prune.eval.bench.clock import Times, interleaved, peak_bytes
from vlm_prune.eval.bench.subject import Subject

ANSWER = 8
"""New tokens of an end-to-end run, where the caller does not say."""


@dataclass(frozen=True)
class Row:
    """One policy at one budget and batch; ``policy="dense"`` is the stock model.

    Times are medians in milliseconds, ratios are medians of the ratios round by round. ``oracle`` compares with a stock
    model that is handed the shortened prompt, ``dense`` with the stock model on the whole one. ``flops`` are those of
    the language model's prefill by the receipt, ``flops_formula`` by the shapes of the shortened prompt. An end-to-end
    run makes ``answer`` new tokens for each prompt. ``call`` is the whole forward.
    """

    policy: str
    batch: int
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
    answer: int
    call: Call

    @property
    def requests_per_s(self) -> float:
        """Prompts answered in a second, end to end."""
        return self.batch / self.end_to_end_ms * 1e3

    @property
    def tokens_per_s(self) -> float:
        """New tokens in a second, end to end."""
        return self.answer * self.requests_per_s

    def json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            **asdict(self),
            "requests_per_s": self.requests_per_s,
            "tokens_per_s": self.tokens_per_s,
        }


@torch.no_grad()
def speed(
    subject: Subject,
    policies: Sequence[str],
    budgets: Sequence[int],
    rounds: int,
    device: str,
    answer: int = ANSWER,
) -> Iterator[Row]:
    """Measure the stock model, and each of ``policies`` at each of ``budgets`` beside it; rows as they are measured."""
    whole = {tokens: calls(subject, policies, tokens, max(3, rounds // 2), device) for tokens in budgets}
    stock = [next(some) for some in whole.values()]
    dense = _dense(subject, rounds, device, answer, stock[0])
    yield dense
    for _ in policies:
        for tokens, some in whole.items():
            yield _pruned(subject, tokens, rounds, device, dense, next(some))


def answering(subject: Subject, answer: int) -> Callable[[], None]:
    """A run of ``generate`` with exactly ``answer`` new tokens."""

    def run() -> None:
        subject.model.generate(
            **subject.inputs, max_new_tokens=answer, min_new_tokens=answer, do_sample=False, pad_token_id=0
        )

    return run


def _dense(subject: Subject, rounds: int, device: str, answer: int, call: Call) -> Row:
    times = interleaved(
        {
            "prefill": subject.prefill(),
            "decode": subject.dense_steps(),
            "tower": subject.encode(),
            "whole": answering(subject, answer),
        },
        rounds,
    )
    with pruned(subject.model, "none"):
        subject.call()
        receipt = subject.model.pruning.receipt
    length = subject.inputs["input_ids"].shape[1]
    flops = decoder_flops(subject.decoder.config, [length] * subject.layers)
    return Row(
        "dense", subject.batch, subject.visual, length, times["prefill"].median, times["prefill"].spread, None, 1.0,
        times["decode"].median, None, 1.0, times["tower"].median, 1.0, times["whole"].median, 1.0,
        peak_bytes(subject.prefill(), device), receipt.kv_bytes_dense, 1.0, flops, flops,
        answer, call,
    )  # fmt: skip


def _pruned(subject: Subject, tokens: int, rounds: int, device: str, dense: Row, call: Call) -> Row:
    policy = call.policy
    options: dict[str, Any] = {"tokens": tokens}
    shortened = subject.shortened(policy, options)
    rows = shortened["inputs_embeds"].shape[1]
    stock = subject.oracle_prefill(shortened)
    oracle_step, dense_step = subject.oracle_steps(shortened), subject.dense_steps()
    model, prefill, encode = subject.model, subject.prefill(), subject.encode()
    whole_run = answering(subject, dense.answer)
    prune(model, policy, **options)
    step = subject.dense_steps()
    peak = peak_bytes(prefill, device)
    receipt = model.pruning.receipt
    unprune(model)

    def inside(run: Callable[[], Any]) -> Callable[[], float]:
        return subject.under(policy, options, run)

    # the two to compare closely take more turns, without the slow one between them
    times = interleaved({"ours": subject.pruned_prefill(policy, options), "oracle": stock}, 4 * rounds)
    decode = interleaved({"ours": inside(step), "oracle": oracle_step, "dense": dense_step}, max(rounds, 20))
    tower = interleaved({"ours": inside(encode), "dense": encode}, rounds)
    whole = interleaved({"ours": inside(whole_run), "dense": whole_run}, max(3, rounds // 3))

    def over(some: dict[str, Times], other: str = "dense") -> float:
        return some["ours"].over(some[other])

    return Row(
        policy, subject.batch, tokens, rows, times["ours"].median, times["ours"].spread, over(times, "oracle"),
        times["ours"].median / dense.prefill_ms,
        decode["ours"].median, over(decode, "oracle"), over(decode), tower["ours"].median, over(tower),
        whole["ours"].median, over(whole), peak, receipt.kv_bytes,
        receipt.kv_bytes / dense.kv_bytes, decoder_flops(subject.decoder.config, receipt.decoder_tokens),
        decoder_flops(subject.decoder.config, [rows] * subject.layers), dense.answer, call,
    )  # fmt: skip
