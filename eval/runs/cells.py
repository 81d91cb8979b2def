"""The cells of a run: a model, a policy at a budget, a task."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from vlm_prune.contract.stages import Stages
from vlm_prune.eval.models import MODELS, exit_gates
from vlm_prune.eval.runs.config import Budget, ModelEntry, PolicyEntry, RunConfig
from vlm_prune.eval.runs.samples import Sample, build_samples
from vlm_prune.eval.runs.sources import ScenesData
from vlm_prune.eval.runs.tasks import Task
from vlm_prune.registry import make_policies, named_policies

NOT_FIGURES = ("label", "batch_size", "models", "data")
"""Keys of an entry on which figures do not depend; the content of the data is compared instead."""


@dataclass(frozen=True)
class Cell:
    """One combination, with the samples that it asks.

    Attributes:
        capture: whether calls are captured, which changes times, and answers only by rounding.
        skipped: why samples are left out, one line each, with ``on_bad_image="skip"``.
    """

    model: ModelEntry
    entry: PolicyEntry
    budget: Budget
    task: Task
    samples: list[Sample]
    name: str
    skipped: tuple[str, ...] = ()
    capture: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The other arguments of `prune`; ``gates: shipped`` means the gates trained for the model."""
        captured = {"capture": True} if self.capture else {}
        return {**_resolved(self.entry.settings, self.model.model), **self.budget, **captured}

    def about(self) -> dict[str, Any]:
        """The part of its row that is known beforehand."""
        return {
            "cell": self.name,
            "model": self.model.name,
            "policy": self.entry.name,
            "task": self.task.name,
            "kind": self.task.kind,
            "stages": stages_of(self.entry.policy),
            "budget": self.budget,
            "skipped": len(self.skipped),
        }

    def remarks(self) -> list[str]:
        """Warnings for its row."""
        if not self.skipped:
            return []
        count = len(self.skipped) + len(self.samples)
        return [f"{len(self.skipped)} of {count} samples are skipped, first: {self.skipped[0]}"]

    def without(self, bad: Mapping[str, str]) -> Cell:
        """The cell without the samples of bad images, by digest; its name stays.

        Raises:
            ValueError: nothing is left.
        """
        left = [sample for sample in self.samples if sample.picture.digest not in bad]
        lost = tuple(bad[s.picture.digest] for s in self.samples if s.picture.digest in bad)
        if not left:
            raise ValueError(
                f"task {self.task.name}: none of its {len(lost)} images can be read, first: {lost[0]}"
            )
        return replace(self, samples=left, skipped=lost)

    def __str__(self) -> str:
        budget = " ".join(f"{name}={value}" for name, value in self.budget.items())
        return " ".join(filter(None, (self.model.name, self.entry.name, budget, self.task.name)))


def build_cells(config: RunConfig) -> list[Cell]:
    """All cells, models outermost, tasks innermost.

    Raises:
        PolicyError: a policy does not exist or has no such setting.
        ValueError: a task's data are missing or are not what it needs.
    """
    found = []
    known: dict[tuple[str, str], tuple[list[Sample], str]] = {}
    for model in config.models:
        tasks = [task for task in config.tasks if task.models is None or model.name in task.models]
        for task in tasks:
            if _place(task, model) not in known:
                samples = build_samples(task, model.name, config.seed, config.on_bad_image)
                known[_place(task, model)] = samples, _digest([sample.digest() for sample in samples])
        for entry, budget in settings(config, model):
            for task in tasks:
                samples, digest = known[_place(task, model)]
                figures = [
                    model.model_dump(mode="json", exclude={"label", "device_map", "dtype"}),
                    model.dtype or config.dtype,
                    entry.policy,
                    entry.settings,
                    budget,
                    task.model_dump(mode="json", exclude=set(NOT_FIGURES)),
                    digest,
                ]
                kept = "-".join(f"{name}-{value}" for name, value in budget.items())
                parts = (model.name, entry.name, kept, task.name, _digest(figures)[:8])
                name = ".".join(re.sub(r"[^\w.+-]+", "_", part)[-60:] for part in parts if part)
                found.append(Cell(model, entry, budget, task, samples, name, capture=config.capture))
    return found


def _place(task: Task, model: ModelEntry) -> tuple[str, str]:
    """The key that identifies a task's samples: scenes may have another size for a model."""
    return task.name, model.name if isinstance(task.data, ScenesData) else ""


def settings(config: RunConfig, model: ModelEntry) -> Iterator[tuple[PolicyEntry, Budget]]:
    """The policies that are run on a model, at each of their budgets; checked, so that a mistake shows early."""
    for entry in config.policies:
        if entry.models is not None and model.name not in entry.models:
            continue
        # a file that a setting names may still be made until its turn comes
        with suppress(FileNotFoundError):
            make_policies(entry.policy, _resolved(entry.settings, model.model))
        yield from ((entry, budget) for budget in config.budgets(entry))


def stages_of(policy: str) -> list[str]:
    """Where the policies of a composition act."""
    return list(Stages.joined(each.stages for each in named_policies(policy)))


def _resolved(settings: dict[str, Any], model: str) -> dict[str, Any]:
    def one(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _resolved(value, model)
        if (name, value) != ("gates", "shipped"):
            return value
        if model not in MODELS:
            raise ValueError(f'gates: shipped: there are gates for {", ".join(MODELS)}, not for "{model}"')
        return str(exit_gates(model))

    return {name: one(name, value) for name, value in settings.items()}


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
