"""The rows and bounds of a benchmark for people: a table, a plot, and a comparison with an earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vlm_prune.eval.bench.bounds import Bound
from vlm_prune.eval.bench.calls import Call
from vlm_prune.eval.bench.speed import Row

RATIOS = ("prefill_over_oracle", "decode_over_oracle", "kv_over_dense")
"""Ratios that do not depend on the machine, and so are compared with an earlier benchmark."""

SLACK = {"prefill_over_oracle": 0.03, "decode_over_oracle": 0.03, "kv_over_dense": 0.001}
"""How much worse each of them may get: what one and the same code differs by from run to run on a shared machine."""


def table(rows: Sequence[Row]) -> Table:
    """One line a policy and budget; ratios in brackets."""
    shown = Table(
        "policy", "batch", "tokens", "prefill ms", "over oracle", "decode ms", "over oracle", "tower ms",
        "end to end ms", "requests/s", "tokens/s", "peak MiB", "KV MiB", "TFLOP", box=SIMPLE_HEAD,
    )  # fmt: skip
    for row in rows:
        shown.add_row(
            row.policy,
            str(row.batch),
            str(row.tokens),
            f"{row.prefill_ms:.1f} ±{row.prefill_spread:.0%} ({row.prefill_over_dense:.2f})",
            "" if row.prefill_over_oracle is None else f"{row.prefill_over_oracle:.3f}",
            f"{row.decode_ms:.2f} ({row.decode_over_dense:.2f})",
            "" if row.decode_over_oracle is None else f"{row.decode_over_oracle:.3f}",
            f"{row.tower_ms:.0f} ({row.tower_over_dense:.2f})",
            f"{row.end_to_end_ms:.0f} ({row.end_to_end_over_dense:.2f})",
            f"{row.requests_per_s:.3g}",
            f"{row.tokens_per_s:.3g}",
            f"{row.peak_bytes / 2**20:.0f}",
            f"{row.kv_bytes / 2**20:.2f} ({row.kv_over_dense:.2f})",
            f"{row.flops / 1e12:.3f}",
        )
    return shown


def calls_table(calls: Sequence[Call]) -> Table:
    """One line a policy and batch: the whole call. Columns of the device are there where there is one."""
    device = ["device ms", "launches", "waits"] if any(c.counts.device_ms is not None for c in calls) else []
    graphs = ["over captured stock", "captured"] if any(c.captured is not None for c in calls) else []
    shown = Table(
        "whole call", "batch", "tokens", "wall ms", "over stock", "over oracle", *graphs, *device, "operations",
        "reads", "peak MiB", "over oracle", box=SIMPLE_HEAD,
    )  # fmt: skip
    for call in calls:
        seen = call.counts
        on_device = [] if seen.device_ms is None else [f"{seen.device_ms:.2f}", seen.launches, seen.waits]
        shown.add_row(
            call.policy,
            str(call.batch),
            str(call.tokens),
            f"{call.wall_ms:.1f} ±{call.wall_spread:.0%}",
            f"{call.wall_over_dense:.2f}",
            f"{call.wall_over_oracle:.2f}",
            *(_captured(call) if graphs else ()),
            *map(str, on_device),
            str(seen.operations),
            str(seen.reads),
            f"{call.peak_bytes / 2**20:.0f}",
            f"{call.peak_over_oracle:.2f}",
        )
    return shown


def _captured(call: Call) -> list[str]:
    """Its time over that of the captured stock call, and which parts of it were captured."""
    parts = [part for part, how in (call.captured or {}).items() if how == "captured"]
    over = "" if call.wall_over_captured is None else f"{call.wall_over_captured:.2f}"
    return [over, " and ".join(parts)]


def bounds_table(bounds: Sequence[Bound]) -> Table:
    """What is kept and what is missed."""
    shown = Table("bound", "measured", "limit", "against", "", box=SIMPLE_HEAD)
    for bound in bounds:
        verdict = "kept" if bound.kept else "[red]missed"
        shown.add_row(bound.name, f"{bound.value:.4g}", f"{bound.limit:.4g}", bound.against, verdict)
    return shown


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Prefill time and KV bytes against kept tokens, with the oracle's time as the ceiling of what can be saved.

    Of several batches the first is drawn.
    """
    from matplotlib.figure import Figure

    dense, *pruned = (row for row in rows if row.batch == rows[0].batch)
    others = sorted(pruned, key=lambda row: row.prompt_rows)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for policy in dict.fromkeys(row.policy for row in others):
        mine = [row for row in others if row.policy == policy] + [dense]
        kept = [row.tokens for row in mine]
        left.plot(kept, [row.prefill_ms for row in mine], marker="o", label=policy)
        right.plot(kept, [row.kv_bytes / 2**20 for row in mine], marker="o", label=policy)
    ceiling = [
        (row.tokens, row.prefill_ms / row.prefill_over_oracle) for row in others if row.prefill_over_oracle
    ]
    left.plot(*zip(*sorted(dict(ceiling).items()), strict=True), "k--", label="oracle")
    left.set(xlabel="visual tokens kept", ylabel="prefill, ms", ylim=(0, None))
    right.set(xlabel="visual tokens kept", ylabel="KV cache, MiB", ylim=(0, None))
    left.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def regressions(rows: Sequence[Row], before: dict[str, Any]) -> list[str]:
    """In words, the ratios that got worse than in an earlier benchmark's JSON by more than `SLACK`."""
    known = {(row["policy"], row.get("batch", 1), row["tokens"]): row for row in before["rows"]}
    worse = []
    for row in rows:
        old = known.get((row.policy, row.batch, row.tokens))
        if old is None:
            continue
        for name in RATIOS:
            now, then = getattr(row, name), old[name]
            if (
                now is not None
                and then is not None
                and now > max(then, 1.0 * (name != "kv_over_dense")) + SLACK[name]
            ):
                worse.append(f"{row.policy} at {row.tokens}: {name} {now:.3f}, was {then:.3f}")
    return worse
