"""One cell of a run: a model under a policy at a budget, its answers scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from vlm_prune import pruned
from vlm_prune.eval.chair import CaptionReader, Vocabulary, score_captions
from vlm_prune.eval.measure import answer
from vlm_prune.eval.models import exit_gates, load_model
from vlm_prune.eval.pope import score_pope
from vlm_prune.eval.runs.config import PolicyEntry, RunConfig
from vlm_prune.eval.scenes import PLURALS, Scene, make_scenes, pope_questions
from vlm_prune.eval.tiny.metrics import bootstrap
from vlm_prune.registry import make_policies, policy_class

CAPTION_PROMPT = "Please describe this image in detail."
ANSWER_TOKENS, CAPTION_TOKENS = 2, 64


@dataclass(frozen=True)
class Cell:
    """A model, a policy and a budget (``None`` for a policy that drops no tokens)."""

    model: str
    entry: PolicyEntry
    ratio: float | None

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of the policy; ``gates: shipped`` stands for the gates trained for the model."""
        return _resolved(self.entry.settings, self.model)

    @property
    def options(self) -> dict[str, Any]:
        """What `prune` takes beside the policy."""
        return {**self.settings, **({} if self.ratio is None else {"ratio": self.ratio})}

    def key(self, config: RunConfig) -> str:
        """A name that changes with everything the cell's figures depend on."""
        what = [
            self.model, self.entry.policy, self.entry.settings, self.ratio, config.sizes.get(self.model),
            config.scenes, config.splits, config.seed, config.rounds, config.dtype,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _resolved(settings: dict[str, Any], model: str) -> dict[str, Any]:
    def one(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _resolved(value, model)
        return str(exit_gates(model)) if (name, value) == ("gates", "shipped") else value

    return {name: one(name, value) for name, value in settings.items()}


def cells(config: RunConfig) -> list[Cell]:
    """All cells, models outermost. Raises `PolicyError` for a policy that does not exist or has no such setting."""
    found = []
    for model in config.models:
        for entry in config.policies:
            if entry.models is not None and model not in entry.models:
                continue
            prunes = any(policy_class(name).stages != ("modulate",) for name in entry.policy.split("+"))
            # a wrong setting shall not come to light after an hour; a file may still be made until its turn comes
            with suppress(FileNotFoundError):
                make_policies(entry.policy, _resolved(entry.settings, model))
            ratios: Sequence[float | None] = config.ratios if entry.ratios is None else entry.ratios
            if entry.policy == "none":
                ratios = [1.0]
            elif not prunes or not ratios:
                ratios = [None]
            found += [Cell(model, entry, ratio) for ratio in ratios]
    return found


@dataclass(frozen=True)
class Exam:
    """A model with fresh scenes and the POPE questions about them, by split."""

    model: PreTrainedModel
    processor: ProcessorMixin
    scenes: list[Scene]
    questions: dict[str, list[dict[str, Any]]]

    @classmethod
    def build(cls, name: str, config: RunConfig) -> Exam:
        """Load a model and draw its scenes, each with three different objects at least."""
        size = config.sizes.get(name, (128, 128))
        scenes = list(make_scenes(config.scenes, config.seed, [size], min_names=3))
        questions: dict[str, list[dict[str, Any]]] = {
            split: pope_questions(scenes, split, config.seed) for split in config.splits
        }
        return cls(*load_model(name, getattr(torch, config.dtype)), scenes, questions)


def measure(exam: Exam, cell: Cell, config: RunConfig, advance: Callable[[int], None]) -> dict[str, Any]:
    """Answers, captions and their scores, as a flat row. Intervals hold 95 %, over scenes drawn with replacement."""

    def ask(prompts: Sequence[tuple[Image.Image, str]], limit: int) -> Any:
        return answer(exam.model, exam.processor, prompts, limit, config.batch_size, advance)

    row: dict[str, Any] = {}
    with pruned(exam.model, cell.entry.policy, **cell.options):
        counts = np.zeros((len(exam.scenes), 4))
        for split, questions in exam.questions.items():
            given = ask([(exam.scenes[q["image"]].image, q["text"]) for q in questions], ANSWER_TOKENS)
            row["tokens"] = given.tokens
            answers = [
                {"question_id": q["question_id"], "answer": text}
                for q, text in zip(questions, given.texts, strict=True)
            ]
            result = score_pope(questions, answers)
            row[f"pope_{split}_accuracy"], row[f"pope_{split}_f1"] = (
                result.rates["accuracy"],
                result.rates["f1"],
            )
            for question, yes in zip(questions, result.predictions, strict=True):
                true = question["label"] == "yes"
                counts[question["image"]] += [bool(yes) and true, bool(yes) and not true, true and not yes, 1]
        captions = ask([(scene.image, CAPTION_PROMPT) for scene in exam.scenes], CAPTION_TOKENS).texts
    row["pope_f1"] = float(np.mean([row[f"pope_{split}_f1"] for split in config.splits]))
    row["pope_accuracy"] = float(np.mean([row[f"pope_{split}_accuracy"] for split in config.splits]))
    row["pope_f1_interval"] = bootstrap(counts, lambda t: 2 * t[0] / max(1, 2 * t[0] + t[1] + t[2]))
    reader = CaptionReader(Vocabulary.of({name: [plural] for name, plural in PLURALS.items()}), "plain")
    chair = score_captions(enumerate(captions), {i: s.names for i, s in enumerate(exam.scenes)}, reader)
    for name in ("chair_s", "chair_i", "recall", "length", "repetition"):
        row[name if name.startswith("chair") else f"caption_{name}"] = chair.metrics[name]
    row["chair_s_interval"], row["recall_interval"] = chair.intervals["chair_s"], chair.intervals["recall"]
    row["n_questions"], row["n_captions"] = int(counts[:, 3].sum()), len(captions)
    return row


def stages_of(policy: str) -> str:
    """Where the policies of a composition act."""
    return ", ".join(
        dict.fromkeys(stage for name in policy.split("+") for stage in policy_class(name).stages)
    )
