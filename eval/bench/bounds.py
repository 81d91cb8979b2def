"""The bounds that pruning has to keep at the shapes of LLaVA-1.5-7B: measured, with what each is measured against."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlm_prune import pruned
from vlm_prune.call import stream
from vlm_prune.call.flops import tower_flops
from vlm_prune.contract.views import AttentionView, FeaturesView
from vlm_prune.eval.bench.calls import Call
from vlm_prune.eval.bench.clock import interleaved, moved_bytes, spent_in
from vlm_prune.eval.bench.speed import Row
from vlm_prune.eval.bench.subject import Subject
from vlm_prune.policies.scores import attention_mass
from vlm_prune.registry import POLICIES, find_anatomy, policy_class

GROWTH = (576, 1152, 2304, 4608, 11520)
"""Visual tokens at which the growth of cost is measured."""


BUSY = 16
"""Prompts of a batch from which on a GPU computes for most of a call."""

CALL_OVER_STOCK = {"agilepruner": 1.05, "vflowopt": 1.05, "flowcut": 1.05, "mustdrop": 1.15}
"""Wall time of an eager call of one prompt on a GPU, over stock; 1.02 for other policies."""

HOST_OVER_ORACLE = {"flowcut": 1.05, "mustdrop": 1.15}
"""Wall time of a call over the oracle's where arithmetic is nothing; 1.03 for other policies."""

MORE_WAITS = {"flowcut": 1, "mustdrop": 2}
"""Waits of a call of one prompt beyond those of stock; none for other policies."""


@dataclass(frozen=True)
class Bound:
    """``value`` must be at most ``limit``."""

    name: str
    value: float
    limit: float
    against: str

    @property
    def kept(self) -> bool:
        """Whether it is."""
        return self.value <= self.limit


def quietly(run: Callable[..., Any], *args: Any) -> None:
    """Call it for its time alone: what a timed run returns counts as its own milliseconds."""
    run(*args)


@torch.no_grad()
def bounds(subject: Subject, rows: list[Row], rounds: int) -> Iterator[Bound]:
    """Measure those of a CPU, which computes for most of a call; ``rows`` are those of `speed.speed`."""
    for row in rows:
        if row.prefill_over_oracle is not None and row.decode_over_oracle is not None:
            at = f"{row.policy} at {row.tokens}"
            yield Bound(f"prefill, {at}", row.prefill_over_oracle, 1.02, "oracle")
            yield Bound(f"decode step, {at}", row.decode_over_oracle, 1.02, "oracle")
    dense = rows[0].prefill_ms / subject.layers * subject.preset.depth
    for name in POLICIES:
        if policy_class(name).acts.inside or policy_class(name).reads_cls:
            spent = scoring_ms(subject, name, 2)
            if spent is not None:
                against = f"dense prefill of all {subject.preset.depth} layers"
                yield Bound(f"scoring, {name}", spent / dense, 0.02, against)
    yield flowcut_tower(subject, rounds)
    yield from selection(subject, rounds)
    yield import_time()
    yield from growth(rounds)


def gpu_bounds(rows: Sequence[Row], calls: Sequence[Call]) -> Iterator[Bound]:
    """What a GPU has to keep: one prompt takes the host little more than stock, a large batch the GPU hardly more than
    the oracle.

    A policy's own work compared with arithmetic says nothing there: at one prompt the GPU waits for the host. Batches
    between 1 and `BUSY` are held to nothing but decoding, since neither the host nor arithmetic decides. ``calls`` have
    the stock model's among them.
    """
    stock = {call.batch: call.counts.waits or 0 for call in calls if call.policy == "dense"}
    for call in calls:
        at, waits = f"{call.policy}, batch {call.batch}", call.counts.waits or 0
        if call.policy == "dense":
            continue
        if call.batch == 1:
            limit = CALL_OVER_STOCK.get(call.policy, 1.02)
            yield Bound(f"whole call, {at}", call.wall_over_dense, limit, "stock")
            yield Bound(f"waits, {at}", waits - stock[1], MORE_WAITS.get(call.policy, 0), "stock")
        elif call.batch >= BUSY:
            yield Bound(f"peak memory, {at}", call.peak_over_oracle, 1.05, "oracle")
    for row in rows:
        at = f"{row.policy} at {row.tokens}, batch {row.batch}"
        if row.prefill_over_oracle is not None:
            yield Bound(f"decode step, {at}", row.decode_over_dense, 1.01, "stock")
            if row.batch >= BUSY:
                yield Bound(f"prefill, {at}", row.prefill_over_oracle, 1.01, "oracle")


def host_bounds(calls: Sequence[Call]) -> Iterator[Bound]:
    """What the host has to keep, on shapes so narrow that arithmetic is nothing."""
    for call in calls:
        if call.policy != "dense":
            limit = HOST_OVER_ORACLE.get(call.policy, 1.03)
            yield Bound(
                f"host time, {call.policy}, batch {call.batch}", call.wall_over_oracle, limit, "oracle"
            )


def scoring_ms(subject: Subject, name: str, rounds: int) -> float | None:
    """Milliseconds in a policy's own methods for one prompt, at the published depth; ``None`` if it has none there.

    Calls between decoder layers are measured on the layers built, and counted for as many layers as the policy asks at
    the published depth.
    """
    kind, depth = policy_class(name), subject.preset.depth
    # FastV's layer, among the few that were built
    settings: dict[str, Any] = {"k": 1} if "k" in kind.__dataclass_fields__ else {}
    try:
        policy = kind(**settings)
        budget = {"ratio": 1 / 9} if policy.prunes else {}
        with pruned(subject.model, [policy], **budget):
            owner = type(subject.model.pruning.policies[0])
            with spent_in(
                owner, ("encode", "encode_final", "entry", "prefill", "observe", "evict", "modulate")
            ) as spent:
                for _ in range(rounds):
                    subject.call()
            if not any(spent.values()):  # it acts elsewhere, as guided decoding does
                return None
            total = 0.0
            for stage, calls in spent.items():
                asked = {"prefill": policy.prefill_layers, "modulate": policy.modulate_layers}.get(stage)
                there, planned = (len(asked(subject.layers)), len(asked(depth))) if asked else (1, 1)
                size = len(calls) // rounds  # of one run
                runs = [sum(calls[size * run : size * (run + 1)]) for run in range(rounds)]
                total += min(runs) / max(there, 1) * planned
    except ValueError:  # a policy that needs more layers than were built, or files that are not there
        return None
    return total


def flowcut_tower(subject: Subject, rounds: int) -> Bound:
    """FlowCut's tower against the time that its schedule's operations would take at the dense tower's speed."""
    model, encode = subject.model, subject.encode()
    tower = find_anatomy(model).tower

    def ours() -> float:
        with pruned(model, "flowcut", tokens=subject.preset.tokens):
            return interleaved({"run": encode}, 1, warm=0)["run"].median

    times = interleaved({"ours": ours, "dense": encode}, rounds)
    with pruned(model, "flowcut", tokens=subject.preset.tokens):
        encode()
        receipt = model.pruning.receipt
    share = tower_flops(tower.width, tower.weights, receipt.tower_segments) / tower_flops(
        tower.width, tower.weights, receipt.tower_segments_dense
    )
    return Bound(
        "FlowCut's tower", times["ours"].over(times["dense"]) / share, 1.03, "operations of its schedule"
    )


def selection(subject: Subject, rounds: int) -> Iterator[Bound]:
    """AgilePruner's and DivPrune's choice against the matrix product, and eigenvalues, in their definition."""
    generator = torch.Generator().manual_seed(4)
    channels = subject.decoder.config.hidden_size
    features = torch.randn(1, 576, channels, generator=generator)
    carry = {"cls_attention": torch.rand(1, 576, generator=generator)}
    keys = torch.zeros(1, dtype=torch.int64)

    def choose(name: str) -> Callable[[], None]:
        view = FeaturesView(features, (24, 24), 64, keys, None, carry)
        return lambda: quietly(policy_class(name)().encode_final, view)

    def product() -> torch.Tensor:
        return features @ features.mT

    def product_and_eigenvalues() -> None:
        torch.linalg.eigvalsh(product())

    for name, least, against in (
        ("divprune", lambda: quietly(product), "matrix product"),
        ("agilepruner", product_and_eigenvalues, "matrix product and eigenvalues"),
    ):
        times = interleaved({"ours": choose(name), "least": least}, max(rounds, 10))
        yield Bound(f"selection, {name}", times["ours"].over(times["least"]), 1.2, against)


def import_time() -> Bound:
    """Seconds that ``import vlm_prune`` takes once torch and transformers are imported."""
    code = (
        "import torch, transformers, time; a = time.perf_counter(); import vlm_prune; "
        "print(time.perf_counter() - a)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    return Bound("import vlm_prune, s", sorted(float(run.stdout) for run in runs)[1], 1.0, "0")


def growth(rounds: int) -> Iterator[Bound]:
    """How much faster cost grows than the prompt, from 576 to 11,520 visual tokens: bytes that move, and time.

    Bytes are counted, and compared with the number of tokens. Time is compared with that of two copies of the
    embeddings: large memory is slower for anyone than the caches that a small prompt fits in, and the token stream
    hands out two tensors of full length, one with holes and one restored.
    """
    for name, build in ADDED.items():
        counted = [moved_bytes(build(n)) / n for n in (GROWTH[0], GROWTH[-1])]
        yield Bound(f"growth of bytes, {name}", counted[1] / counted[0], 1.05, "growth of the prompt")
        runs = {
            f"{kind} {n}": run for n in GROWTH for kind, run in (("ours", build(n)), ("copies", _copies(n)))
        }
        times = interleaved(runs, max(rounds, 10))
        over = [times[f"ours {n}"].over(times[f"copies {n}"]) for n in GROWTH]
        curve = ", ".join(f"{n}: {times[f'ours {n}'].median:.2f}" for n in GROWTH)
        yield Bound(
            f"growth of time, {name}", over[-1] / over[0], 1.2, f"growth of two copies; ms at {curve}"
        )


def _copies(tokens: int) -> Callable[[], None]:
    embeds = torch.randn(1, tokens, 1024)
    return lambda: quietly(lambda: (embeds.clone(), embeds.clone()))


def _stream(tokens: int) -> Callable[[], None]:
    """Opening, finding and closing holes, and restoring the length: one in nine tokens stays, 1024 channels."""
    embeds = torch.randn(1, tokens, 1024)
    index = torch.arange(0, tokens, 9)[None]
    rows = embeds.gather(1, index[..., None].expand(-1, -1, 1024))

    def run() -> None:
        holed = stream.open_holes(rows, index, tokens, None)
        order = stream.live_order(~stream.find_holes(holed), index.shape[1])
        stream.restore(stream.compact(holed, order), order, tokens, None)

    return run


def _mass(tokens: int) -> Callable[[], None]:
    """Attention of 16 rows of text to all visual tokens, 32 heads of 128."""
    rows = tokens + 16
    query, key = torch.randn(1, 32, rows, 128), torch.randn(1, 32, rows, 128)
    view = AttentionView(query, key, key, 128**-0.5, has_cls=False)
    voters = torch.zeros(1, rows, dtype=torch.bool)
    voters[:, tokens:] = True
    return lambda: quietly(attention_mass, view, voters, 16)


ADDED: dict[str, Callable[[int], Callable[[], None]]] = {"token stream": _stream, "attention mass": _mass}
"""What every call adds, and what policies of the prefill stage add."""
