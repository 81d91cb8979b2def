"""The smallest budget that keeps a floor: how few visual tokens are enough, on your own samples, and how surely.

An image counts as *kept* if every one of its questions that the unpruned model answers rightly is answered no worse by
the pruned one. Of the images on which the unpruned model is right at all, the share that is kept has a one-sided
confidence bound (Clopper and Pearson 1934), exact for any number of them, and a budget passes if that bound is not
below the floor. What pruning mends does not count, so the mean loss of the score is within ``1 - floor`` too.

Each policy's budgets are tried from the largest down, and the first that fails ends it: testing in a fixed order needs
no correction, and among several policies the level is shared out (Bonferroni). So the confidence is that of the whole
search.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import beta

from ...api import pruned
from ...errors import BudgetError, PolicyError, StateError
from ...registry import make_policies
from ..measure import model_inputs, prompt_text, receipt_of
from ..vqa import METRICS
from .data import Example

RATIOS = (0.75, 0.5, 1 / 3, 0.25, 2 / 9, 1 / 6, 1 / 9, 1 / 18)
"""Budgets to try, from the largest down: those of the papers, and some between."""


def kept_bound(kept: int, of: int, level: float) -> float:
    """What the true share is not below, with confidence ``1 - level``, if ``kept`` of ``of`` were counted.

    >>> round(kept_bound(299, 299, 0.05), 3), round(kept_bound(0, 5, 0.05), 3)
    (0.99, 0.0)
    """
    return float(beta.ppf(level, kept, of - kept + 1)) if kept else 0.0


def images_needed(floor: float, level: float) -> int:
    """How many images there have to be for ``floor`` to be certain when all of them are kept.

    >>> images_needed(0.99, 0.05)
    299
    """
    return math.ceil(math.log(level) / math.log(floor))


@dataclass(frozen=True)
class Tried:
    """A policy at a budget.

    Attributes:
        policy: names joined by "+".
        ratio: its budget, a share of the visual tokens.
        images: on how many the unpruned model is right.
        kept: on how many of them the pruned one is no worse.
        bound: what the share of kept images is not below, with the confidence of the search.
        score: mean score of all samples.
        compute: operations of towers and prefills, as a share of the unpruned model's.
        passed: whether ``bound`` is not below the floor.
    """

    policy: str
    ratio: float
    images: int
    kept: int
    bound: float
    score: float
    compute: float
    passed: bool


@dataclass(frozen=True)
class Found:
    """What a search found: the passing budget that computes least, and all that were tried.

    Attributes:
        best: the budget; ``None`` if none passed.
        tried: in the order of trying.
        config: what `prune` takes as ``config``, with the search in ``about``; ``None`` if no budget passed.
    """

    best: Tried | None
    tried: list[Tried]
    config: dict[str, Any] | None

    def save(self, path: str | Path) -> None:
        """Write the config.

        Raises:
            BudgetError: no budget passed.
        """
        if self.config is None:
            raise BudgetError("no budget kept the floor, so there is no config to write")
        Path(path).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def find_budget(
    model: Any,
    processor: Any,
    samples: Sequence[Example],
    policies: Sequence[str],
    floor: float = 0.99,
    *,
    confidence: float = 0.95,
    ratios: Sequence[float] = RATIOS,
    metric: str = "exact",
    max_new_tokens: int = 16,
    batch_size: int = 8,
    watch: Callable[[Tried], None] = lambda tried: None,
) -> Found:
    """Try policies at ever smaller budgets, and find the one that computes least and keeps the floor.

    The model is left as it was.

    Args:
        model: a stock model, not pruned.
        processor: its processor.
        samples: questions with their answers; those about one image stand or fall together.
        policies: names, or names joined by "+". A composition's budget is that of its first policy that drops tokens.
        floor: share of the images on which the unpruned model is right that has to be kept.
        confidence: of the claim, over the whole search.
        ratios: budgets to try.
        metric: of `vqa.METRICS`, by which an answer is scored.
        max_new_tokens: the longest answer.
        batch_size: prompts answered together.
        watch: called with each budget that was tried.

    Raises:
        BudgetError: a floor, a confidence or a ratio is not between 0 and 1, or there are too few samples for the floor
            to be certain even if nothing is lost.
        PolicyError: no policy, an unknown one, one that drops no tokens, or an unknown metric.
        StateError: the model is pruned.
    """
    for name, value in {
        "floor": floor,
        "confidence": confidence,
        **{f"ratio {x:g}": x for x in ratios},
    }.items():
        if not 0 < value < 1:
            raise BudgetError(f"{name}={value!r}: choose a number between 0 and 1, such as 0.9.")
    if metric not in METRICS:
        raise PolicyError(f"metric={metric!r}: choose one of {', '.join(METRICS)}.")
    if not policies or len(set(policies)) < len(policies):
        raise PolicyError(f"policies={list(policies)}: name one or several, each once.")
    if idle := [name for name in policies if not any(p.prunes for p in make_policies(name, {}))]:
        raise PolicyError(
            f"{idle[0]} drops no tokens, so there is no budget to find: name a policy that does."
        )
    if getattr(model, "pruning", None) is not None:
        raise StateError(
            "This model is pruned, but the floor is that of the unpruned one: unprune(model) first."
        )
    level = (1 - confidence) / len(policies)
    images = [id(sample.image) for sample in samples]
    _enough(len(set(images)), floor, level, "images there are")

    def answers() -> Iterator[tuple[float, int, int]]:
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            yield from _scores(model, processor, batch, metric, max_new_tokens)

    with pruned(model, "none"):
        stock = [score for score, _, _ in answers()]
    right = {image for image, score in zip(images, stock, strict=True) if score > 0}
    _enough(len(right), floor, level, "images the unpruned model answers rightly")
    tried: list[Tried] = []
    configs: dict[int, dict[str, Any]] = {}
    for policy in policies:
        for ratio in sorted(set(ratios), reverse=True):
            with pruned(model, policy, ratio=ratio):
                configs[len(tried)] = model.pruning.config
                scores, spent, dense = zip(*answers(), strict=True)
            worse = {
                image for image, ours, theirs in zip(images, scores, stock, strict=True) if ours < theirs
            }
            kept = len(right - worse)
            bound = kept_bound(kept, len(right), level)
            mean = sum(scores) / len(scores)
            share = sum(spent) / sum(dense)
            tried.append(Tried(policy, ratio, len(right), kept, bound, mean, share, bound >= floor))
            watch(tried[-1])
            if not tried[-1].passed:
                break
    passed = [number for number, one in enumerate(tried) if one.passed]
    if not passed:
        return Found(None, tried, None)
    number = min(passed, key=lambda number: tried[number].compute)
    about = {
        "floor": floor,
        "confidence": confidence,
        "metric": metric,
        "samples": len(samples),
        "unpruned_score": sum(stock) / len(stock),
        **asdict(tried[number]),
        "tried": [[one.policy, one.ratio, one.passed] for one in tried],
    }
    return Found(tried[number], tried, {**configs[number], "about": about})


def _enough(count: int, floor: float, level: float, what: str) -> None:
    """Raise if ``floor`` would not be certain with all of ``count`` images kept."""
    need = images_needed(floor, level)
    if count < need:
        best = level ** (1 / count) if count else 0.0
        raise BudgetError(
            f"{count} {what}, and a floor of {floor:g} needs {need} at this confidence even if none is lost (with "
            f"{count} it can be {best:.3f}): give more samples, or ask for a lower floor or confidence."
        )


def _scores(
    model: Any, processor: Any, batch: Sequence[Example], metric: str, max_new_tokens: int
) -> Iterator[tuple[float, int, int]]:
    """Of each sample the score of the greedy answer, and its share of the batch's operations, spent and unpruned."""
    names = [f"of sample {number}" for number in range(len(batch))]
    texts = [prompt_text(processor, sample.question) for sample in batch]
    images = [sample.image for sample in batch]
    options = {"padding": True, "padding_side": "left"}
    inputs = model_inputs(processor, images, texts, names, **options).to(model.device, model.dtype)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    said = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    receipt = receipt_of(model)
    for text, sample in zip(said, batch, strict=True):
        score = METRICS[metric](text.strip(), [sample.answer])
        yield score, receipt.flops // len(batch), receipt.flops_dense // len(batch)
