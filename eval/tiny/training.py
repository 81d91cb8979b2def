"""What every training stage shares: optimizers, schedule, checkpoints, log and progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

MUON_LR = 0.02
ADAM_LR = 1.5e-3


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) in float32: momentum whose matrices are made orthogonal by Newton-Schulz steps.

    torch.optim.Muon does these steps in bfloat16, which takes longer than the model itself on processors that
    have to emulate it. Matrices of one shape are taken together.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    STEPS = 5

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[nn.Parameter, torch.Tensor]]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault(matrix.shape, []).append((matrix, matrix.grad))
            for shape, pairs in shapes.items():
                self._update(group, shape, pairs)

    def _update(
        self, group: dict[str, Any], shape: torch.Size, pairs: list[tuple[nn.Parameter, torch.Tensor]]
    ) -> None:
        moved = []
        for matrix, gradient in pairs:
            average = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
            average.lerp_(gradient, 1 - group["momentum"])
            moved.append(gradient.lerp(average, group["momentum"]))
        lr = group["lr"]
        for (matrix, _), update in zip(pairs, orthogonal(torch.stack(moved)), strict=True):
            matrix.mul_(1 - lr * group["weight_decay"])
            matrix.add_(update, alpha=-lr * max(1.0, shape[0] / shape[1]) ** 0.5)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices `(count, rows, columns)` with all singular values near one."""
    a, b, c = Muon.COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(Muon.STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def make_optimizers(
    hidden: list[nn.Parameter], rest: list[nn.Parameter], scale: float = 1.0
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of hidden layers, AdamW for all the rest; `scale` multiplies both rates."""
    return [
        Muon(hidden, lr=MUON_LR * scale),
        torch.optim.AdamW(rest, lr=ADAM_LR * scale, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def rate(step: int, steps: int, warmup: int = 40, decay: float = 0.5) -> float:
    """Learning-rate factor: linear warm-up, flat, linear to zero over the last share `decay` of the steps."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (steps * decay))


def train(
    folder: Path,
    modules: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    steps: int,
    loss_at: Callable[[int], dict[str, torch.Tensor]],
    evaluate: Callable[[], dict[str, float]],
    every: int = 200,
) -> None:
    """Run `steps` optimizer steps, resuming from `folder`/checkpoint.pt when it is there.

    Args:
        folder: where the checkpoint and `log.jsonl` (one row per evaluation) go.
        modules: everything with trained parameters.
        optimizers: as made by `make_optimizers`.
        steps: total number of steps; a finished stage returns at once.
        loss_at: the losses of one step by name, summed for the backward pass. Must depend on the step number
            only, so that a resumed run sees the same data.
        evaluate: figures for the log.
        every: steps between evaluations and checkpoints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / "checkpoint.pt", folder / "log.jsonl"
    start, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        start, seconds = state["step"], state["seconds"]
        modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    if start:
        base = state["base"]
    clock = time.perf_counter() - seconds
    running: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(folder.name, total=steps, completed=start)
        for step in range(start, steps):
            factor = rate(step, steps)
            for optimizer, rates in zip(optimizers, base, strict=True):
                for group, value in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = value * factor
            modules.train()
            losses = loss_at(step)
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for name, loss in losses.items():
                running[name] = running.get(name, loss.item()) * 0.97 + loss.item() * 0.03
            progress.advance(task)
            if (step + 1) % every and step + 1 != steps:
                continue
            modules.eval()
            with torch.no_grad():
                figures = evaluate()
            seconds = time.perf_counter() - clock
            row = {"step": step + 1, "seconds": round(seconds, 1)}
            row |= {name: round(value, 4) for name, value in running.items()} | figures
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            progress.console.print(row)
            state = {
                "step": step + 1,
                "seconds": seconds,
                "base": base,
                "modules": modules.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    modules.eval()
