"""Training of DyVTE's exit gates on a stock model: ``vlm-prune train-exit``.

Nothing of the model is trained or changed; two rows per layer and sequence reach the gates, so a step costs a forward
and a half. Follows the released ``finetune_visual_gate.sh``: AdamW without weight decay, warm-up and cosine, one random
layer per step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ...contract.anatomy import Anatomy
from ...errors import StateError, UnsupportedModelError
from ...policies.exit_gates import RELEASED_WIDTH, ExitGates, gate_loss, wants_exit
from ...registry import find_anatomy
from .observe_exit import Observation, observe

RELEASED_LR = 6e-5
"""For batches of 128 and about 50 steps; the paper's text says 4e-5."""


@dataclass(frozen=True)
class Step:
    """One update: mean loss, share of sequences that could have left, and of gates that judged right."""

    loss: float
    could_leave: float
    accuracy: float


def update(gates: ExitGates, optimiser: torch.optim.Optimizer, seen: dict[int, Observation]) -> Step | None:
    """Teach the gates of the observed layers. ``None`` if no sequence of the batch was usable."""
    usable = [(layer, o) for layer, o in seen.items() if bool(o.usable.any())]
    if not usable:
        return None
    optimiser.zero_grad(set_to_none=True)
    losses, could, right = [], [], []
    for layer, o in usable:
        logits, labels = gates(layer, o.features[o.usable]), o.labels[o.usable]
        losses.append(gate_loss(logits, labels))
        could.append(labels.float().mean())
        right.append((wants_exit(logits) == labels).float().mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    optimiser.step()
    gates.trained_steps += 1
    return Step(loss.item(), torch.stack(could).mean().item(), torch.stack(right).mean().item())


def lr_factor(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate at ``step`` of ``steps``: linear warm-up over a share of them, then half a cosine."""
    rise = max(1, math.ceil(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def observe_batch(
    model: nn.Module, anatomy: Anatomy, batch: dict[str, Any], exits: list[int]
) -> dict[int, Observation]:
    """`observe` for a batch as a processor makes it, with ``labels`` (-100 except on the answer).

    Raises:
        ValueError: there are no ``input_ids`` or no ``labels``.
        UnsupportedModelError: the decoder has no final norm, or the model no output layer, by their usual names.
    """
    inputs = dict(batch)
    labels, ids = inputs.pop("labels", None), inputs.get("input_ids")
    if labels is None or ids is None:
        raise ValueError(f"a training batch needs input_ids and labels, this one has {', '.join(batch)}")
    norm: Any = getattr(anatomy.decoder, "norm", None)
    head: Any = getattr(model, "lm_head", None)
    if norm is None or head is None:
        raise UnsupportedModelError(
            f"{type(anatomy.decoder).__name__} has no `norm`, or {type(model).__name__} no `lm_head`, so "
            "its answer cannot be computed from a layer on."
        )
    mask = inputs.get("attention_mask")
    return observe(
        run=lambda: anatomy.base(**inputs, use_cache=False).last_hidden_state,
        layers=anatomy.decoder_layers,
        norm=norm,
        head=head,
        visual=torch.isin(ids, ids.new_tensor(anatomy.image_tokens)),
        valid=torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool(),
        labels=labels,
        exits=exits,
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside the ``with`` block; each module's mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def train_exit(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    *,
    steps: int,
    gates: ExitGates | None = None,
    width: int = RELEASED_WIDTH,
    rank: int | None = None,
    lr: float = RELEASED_LR,
    warmup: float = 0.03,
    layers_per_step: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> tuple[ExitGates, list[Step]]:
    """Train exit gates for a stock model; returns them and what each step was like.

    Args:
        model: a transformers model of a supported family, not pruned.
        batches: what its processor makes, on its device, with ``labels``: -100 except on the answer. One turn each.
        steps: updates; fewer if ``batches`` end before.
        gates: gates to go on training; new ones of ``width`` and ``rank`` otherwise.
        lr: peak learning rate; ``warmup`` is the share of the steps that it takes to get there.
        layers_per_step: exit layers tried per batch. Each costs a pass from that layer on; all share the first pass.
        seed: of the layers drawn, and of new gates.

    Raises:
        StateError: the model is pruned.
        ValueError: a setting is out of range, or ``gates`` do not fit the model.
    """
    if getattr(model, "pruning", None) is not None:
        raise StateError("exit gates are trained on the stock model: call unprune(model) first")
    anatomy = find_anatomy(model)
    config: Any = anatomy.decoder.config
    depth, channels = len(anatomy.decoder_layers), config.hidden_size
    if steps < 1:
        raise ValueError(f"steps={steps}: choose 1 or more")
    if not 1 <= layers_per_step <= depth:
        raise ValueError(
            f"layers_per_step={layers_per_step}: this decoder has {depth} layers, choose 1 to {depth}"
        )
    if gates is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            gates = ExitGates(depth, channels, width, rank)
    gates.check_fits(depth, channels)
    gates.to(next(model.parameters()).device)
    optimiser = torch.optim.AdamW(gates.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: lr_factor(step, steps, warmup))
    draw, log = random.Random(seed), []
    columns = (TextColumn("exit gates"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with evaluating(model), Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
        task = bar.add_task("", total=steps, note="")
        for _, batch in zip(range(steps), batches, strict=False):
            exits = sorted(draw.sample(range(depth), layers_per_step))
            step = update(gates, optimiser, observe_batch(model, anatomy, batch, exits))
            if step is not None:
                schedule.step()
                log.append(step)
                note = f"loss {step.loss:.3f}  right {step.accuracy:.0%}  could leave {step.could_leave:.0%}"
                bar.update(task, note=note)
            bar.advance(task)
    return gates, log
