"""Search the VFlowOpt settings that change a model's answers least (Yang et al., ICCV 2025, section on optimisation).

A setting is good if the last hidden state of the prompt's last token points where it points without pruning: the mean
cosine over some prompts is maximised by Bayesian optimisation. Follows the released ``llava_ov_opt_all.py``; there the
unpruned passes are repeated for every setting, nothing is saved, and the budget is missed where ``r_2`` cannot use it
up. Needs scikit-optimize: ``pip install ".[tune]"`` in a clone of the repository.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ...api import pruned
from ...errors import BudgetError, PolicyError, StateError
from ...policies.shares import solve_first
from ...policies.vflowopt import VFlowOpt
from ...registry import find_anatomy
from .search import Bounds, Point, Search, Study

NAMES = ("r_v", "r_1", "t", "m", "alpha")
"""The settings that are searched, in the order of a point's coordinates."""

Inputs = Mapping[str, Any]


def search_space(target: float, cuts: tuple[float, float], depth: int) -> Bounds:
    """Lower and upper bound of each of `NAMES`. For a target of 0.25 at 28 layers these are the released ones.

    ``r_v`` is bounded so that the layers in front of the last cut never hold more than the target by themselves.
    """
    most = min(1.5 * target, solve_first(target, 1.0, 0.0, cuts, depth))
    return [(target, most), (0.2 / 0.375, 1.0), (0.0, 50.0), (3.0, 24.0), (-1.0, 1.0)]


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        ratio: the budget it was made for.
        settings: fields of VFlowOpt.
        similarity: mean cosine to the unpruned model, 1 at best.
        about: how it was found.
    """

    ratio: float
    settings: dict[str, Any]
    similarity: float
    about: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write a config that ``prune(model, config=path)`` reads."""
        config = {"policy": "vflowopt", **asdict(self)}
        Path(path).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tune(
    model: nn.Module,
    data: Sequence[Inputs | tuple[Any, str]],
    target: float = 0.25,
    *,
    processor: Any = None,
    calls: int = 300,
    initial: int = 27,
    samples: int = 30,
    seed: int = 42,
    study: str | Path | None = None,
    output: str | Path | None = None,
    progress: bool = True,
    **fixed: Any,
) -> Tuned:
    """Search VFlowOpt's r_v, r_1, t, m and alpha for a model and a budget; ``r_2`` follows from the budget.

    The model is left as it was. A search makes ``calls`` forward passes of pruned prompts per sample, and one of the
    unpruned prompt.

    Args:
        model: a stock model, not pruned.
        data: prompts with images, as the processor returns them, or (image, text) pairs if ``processor`` is given.
        target: the budget, a share of the visual tokens averaged over the decoder's layers.
        processor: the model's processor; lends its pixel mean and deviation to the entropy too.
        calls: settings to try.
        initial: how many of them are drawn by lot.
        samples: prompts to use; drawn by lot if ``data`` has more.
        seed: of both draws.
        study: file that keeps the trials. If it exists, the search goes on where it stopped, and ends as if it had
            never been interrupted.
        output: file for the config to be found.
        progress: show a progress bar.
        fixed: fields of VFlowOpt to hold fixed; those that are searched otherwise are not then, as in ``alpha=0``.

    Raises:
        BudgetError: ``target`` is not between 0 and 1.
        PolicyError: ``data`` or a fixed field cannot be used.
        StateError: the model is pruned, or ``study`` is the file of another search.
        ImportError: scikit-optimize is not installed.
    """
    if not 0 < target < 1:
        raise BudgetError(f"target={target!r}: choose a share between 0 and 1, such as 0.25.")
    if getattr(model, "pruning", None) is not None:
        raise StateError(
            "This model is pruned, but tune() compares with the unpruned one: call unprune(model) first."
        )
    anatomy, prompts = find_anatomy(model), _prompts(data, processor, samples, seed)
    for name in ("r_2", "counts", "compat"):
        if name in fixed:
            raise PolicyError(
                f"tune: {name} cannot be fixed, the search needs an average budget that r_2 makes exact."
            )
    fixed = _with_pixel_statistics(fixed, processor)
    depth = len(anatomy.decoder_layers)
    try:
        cuts = VFlowOpt(**fixed).cuts(depth)
        bounds = dict(zip(NAMES, search_space(target, cuts, depth), strict=True))
        bounds = {name: bound for name, bound in bounds.items() if name not in fixed}
        VFlowOpt(**{**{name: high for name, (_, high) in bounds.items()}, **fixed})
    except (TypeError, ValueError) as error:
        raise PolicyError(f"tune: {error}") from error
    search = Search(list(bounds.values()), seed, initial)
    with _evaluating(model), torch.no_grad():
        unpruned = [last_hidden(anatomy.base, inputs) for inputs in prompts]
        header = {
            "tune": 1,
            "model": anatomy.family,
            "target": target,
            "bounds": bounds,
            "fixed": fixed,
            "seed": seed,
            "initial": initial,
            "data": _digest(prompts),
            "unpruned": f"{torch.cat(unpruned).norm():.3g}",
        }
        kept = Study.open(study, header)

        def value(point: Point) -> float:
            settings: dict[str, Any] = {**fixed, **dict(zip(bounds, point, strict=True))}
            with pruned(model, VFlowOpt(**settings), ratio=target):
                return sum(
                    similarity(last_hidden(anatomy.base, inputs), truth)
                    for inputs, truth in zip(prompts, unpruned, strict=True)
                )

        count = sum(map(len, unpruned))
        _run(search, kept, value, calls, count, progress)
    if search.best is None:
        raise PolicyError(f"calls={calls}: at least one setting has to be tried.")
    point, total = search.best
    found = Tuned(
        ratio=target,
        settings={**fixed, **dict(zip(bounds, point, strict=True))},
        similarity=total / count,
        about={**kept.header, "calls": len(kept.trials), "prompts": count},
    )
    if output is not None:
        found.save(output)
    return found


def _run(
    search: Search, study: Study, value: Callable[[Point], float], calls: int, count: int, progress: bool
) -> None:
    """Ask, evaluate and tell until ``calls`` settings were tried, those of the study first."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("tune", total=calls)
        done = study.trials[:calls]
        for number in range(calls):
            point = search.ask()  # also for a known trial: the optimizer's own dice have to roll on
            if number < len(done):
                point, known = done[number]
                search.tell(point, known)
            else:
                found = value(point)
                study.add(point, found)
                search.tell(point, found)
            best = search.best[1] / count if search.best else 0.0
            bar.update(task, advance=1, description=f"tune, best similarity {best:.4f}")


def last_hidden(base: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Final hidden state of each prompt's last token: fp32 ``(batch, channels)``."""
    device = next(base.parameters()).device
    moved = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items() if k != "labels"
    }
    hidden: torch.Tensor = base(**moved).last_hidden_state
    mask = moved.get("attention_mask")
    if mask is None:
        return hidden[:, -1].float()
    last = (mask * torch.arange(mask.shape[1], device=device)).argmax(-1)
    return hidden[torch.arange(len(hidden), device=device), last].float()


def similarity(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Cosines of two ``(batch, channels)``, summed over the batch. NaN counts 0."""
    return float(torch.cosine_similarity(ours, truth, dim=-1).nan_to_num(nan=0.0).sum())


def _prompts(data: Sequence[Any], processor: Any, samples: int, seed: int) -> list[Inputs]:
    chosen = list(data)
    if not chosen or samples < 1:
        raise PolicyError(
            f"tune: {len(chosen)} prompts in data and samples={samples}: one at least is needed."
        )
    if len(chosen) > samples:
        chosen = random.Random(seed).sample(chosen, samples)
    prompts: list[Inputs] = []
    for item in chosen:
        if isinstance(item, Mapping):
            prompts.append(item)
        elif processor is not None and isinstance(item, tuple | list) and len(item) == 2:
            prompts.append(processor(images=item[0], text=item[1], return_tensors="pt"))
        else:
            raise PolicyError(
                f"tune: data holds a {type(item).__name__}: give what the processor returns, or (image, text) pairs "
                "and processor=."
            )
    return prompts


def _with_pixel_statistics(fixed: dict[str, Any], processor: Any) -> dict[str, Any]:
    """``fixed`` with the pixel mean and deviation of the processor, where it has them and they are not given."""
    images = getattr(processor, "image_processor", None)
    known = {name: getattr(images, name, None) for name in ("image_mean", "image_std")}
    return {**{name: tuple(x) for name, x in known.items() if x is not None}, **fixed}


def _digest(prompts: Sequence[Inputs]) -> str:
    """A fingerprint of the prompts' tensors."""
    digest = hashlib.sha256()
    for inputs in prompts:
        for name, value in sorted(inputs.items()):
            if isinstance(value, torch.Tensor):
                digest.update(f"{name} {tuple(value.shape)} ".encode())
                digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
