"""The demo: what pruning two trained models costs in answers and wins in time and memory.

`run` goes from settings to rows, without printing or writing; `vlm-prune demo` shows and saves what it returns.
The scenes are procedural (`scenes.py`), fresh for the models, and never COCO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from vlm_prune import pruned
from vlm_prune.eval.chair import CaptionReader, Vocabulary, score_captions
from vlm_prune.eval.measure import Answers, Latency, Setting, answer, latencies
from vlm_prune.eval.models import load_model, model_path
from vlm_prune.eval.pope import score_pope
from vlm_prune.eval.scenes import PLURALS, Scene, make_scenes, pope_questions
from vlm_prune.eval.tiny.metrics import bootstrap
from vlm_prune.registry import make_policies

CAPTION_PROMPT = "Please describe this image in detail."
ANSWER_TOKENS, CAPTION_TOKENS = 2, 64
TIMED_SCENES = 2

Advance = Callable[[str, int], None]
"""Told what is being done, and how many prompts have been answered since."""


@dataclass(frozen=True)
class DemoSettings:
    """What to run.

    Attributes:
        models: names that `load_model` takes.
        sizes: width and height of a model's scenes, by name; default one 128 x 128 tile.
        policies: names of policies, or compositions; "none" is run once, at all tokens.
        ratios: shares of visual tokens to keep.
        scenes: scenes per model, each with one caption and six questions.
        split: which absent objects POPE asks for.
        rounds: timed rounds; each times every policy and budget once on every timed scene.
        seed: of the scenes; models were trained on others.
        batch_size: prompts answered together where nothing is timed.
    """

    models: tuple[str, ...] = ("tiny-llava", "tiny-internvl")
    sizes: dict[str, tuple[int, int]] = field(default_factory=lambda: {"tiny-internvl": (256, 128)})
    policies: tuple[str, ...] = ("none", "flowcut", "uniform", "random")
    ratios: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625)
    scenes: int = 24
    split: str = "adversarial"
    rounds: int = 7
    seed: int = 2026
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in self.models:
            model_path(name)
        for policy in self.policies:
            make_policies(policy, {})
        if bad := [ratio for ratio in self.ratios if not 0 < ratio <= 1]:
            raise ValueError(f"ratio {bad[0]}: choose shares above 0 and up to 1, such as 0.25")
        for name, least in (("scenes", 4), ("rounds", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: {least} or more is needed")

    def replaced(self, **changes: Any) -> DemoSettings:
        """A copy with other values."""
        return replace(self, **changes)

    def quick(self) -> DemoSettings:
        """Fewer scenes, budgets and rounds: figures with more noise."""
        return self.replaced(scenes=6, rounds=2, ratios=(1.0, 0.25, 0.0625))

    def cells(self) -> list[Setting]:
        """Every policy at every budget; once, at all tokens, one that drops none."""
        found = []
        for policy in self.policies:
            if policy == "none":
                found.append(Setting(policy, 1.0))
            elif any(part.prunes for part in make_policies(policy, {})):
                found += [Setting(policy, ratio) for ratio in self.ratios]
            else:
                found.append(Setting(policy, None))
        return found

    @property
    def prompts(self) -> int:
        """Prompts that `run` answers in all: the length of its progress bar."""
        per_cell = 7 * self.scenes + (self.rounds + 1) * TIMED_SCENES
        return len(self.models) * len(self.cells()) * per_cell


@dataclass(frozen=True)
class DemoRow:
    """One model, policy and budget.

    ``tokens`` are the visual tokens kept per image, all tiles together; times and ``kv_bytes`` are of one question
    about one image (`measure.Latency`). Intervals hold 95 %, over scenes drawn with replacement.
    """

    model: str
    policy: str
    ratio: float
    tokens: float
    pope_accuracy: float
    pope_f1: float
    pope_f1_interval: tuple[float, float]
    chair_s: float
    chair_i: float
    chair_recall: float
    chair_recall_interval: tuple[float, float]
    caption_length: float
    answer_ms: float
    tower_ms: float
    prefill_ms: float
    kv_bytes: int
    n_questions: int
    n_captions: int
    seed: int


@dataclass(frozen=True)
class Stage:
    """A model with its scenes and what it is asked about them."""

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin
    scenes: list[Scene]
    questions: list[dict[str, Any]]

    @classmethod
    def build(cls, name: str, settings: DemoSettings) -> Stage:
        """Load a model and draw its scenes, each with three different objects at least."""
        size = settings.sizes.get(name, (128, 128))
        scenes = list(make_scenes(settings.scenes, settings.seed, [size], min_names=3))
        return cls(name, *load_model(name), scenes, pope_questions(scenes, settings.split, settings.seed))

    @property
    def asked(self) -> list[tuple[Image.Image, str]]:
        """The questions as prompts."""
        return [(self.scenes[question["image"]].image, question["text"]) for question in self.questions]

    @property
    def described(self) -> list[tuple[Image.Image, str]]:
        """The caption prompt for each scene."""
        return [(scene.image, CAPTION_PROMPT) for scene in self.scenes]


def run(settings: DemoSettings, advance: Advance = lambda what, done: None) -> Iterator[DemoRow]:
    """Measure every model, policy and budget; rows come as they are finished."""
    for name in settings.models:
        stage = Stage.build(name, settings)
        timed = latencies(
            stage.model,
            stage.processor,
            settings.cells(),
            stage.asked[: 6 * TIMED_SCENES : 6],
            settings.rounds,
            advance=lambda done, name=name: advance(f"{name}: times", done),  # type: ignore[misc]
        )
        for cell in settings.cells():
            yield measure_cell(stage, cell, timed[cell], settings, advance)


def measure_cell(
    stage: Stage, cell: Setting, latency: Latency, settings: DemoSettings, advance: Advance
) -> DemoRow:
    """All answers and captions of one model under one policy and budget."""

    def ask(prompts: Sequence[tuple[Image.Image, str]], limit: int) -> Answers:
        return answer(
            stage.model,
            stage.processor,
            prompts,
            limit,
            settings.batch_size,
            lambda done: advance(f"{stage.name}: {cell.policy} {cell.ratio or 1:.4g}", done),
        )

    with pruned(stage.model, cell.policy, **cell.options):
        answers, captions = ask(stage.asked, ANSWER_TOKENS), ask(stage.described, CAPTION_TOKENS)
    given = [
        {"question_id": question["question_id"], "answer": text}
        for question, text in zip(stage.questions, answers.texts, strict=True)
    ]
    pope = score_pope(stage.questions, given)
    reader = CaptionReader(Vocabulary.of({name: [plural] for name, plural in PLURALS.items()}), "plain")
    chair = score_captions(
        enumerate(captions.texts), {i: scene.names for i, scene in enumerate(stage.scenes)}, reader
    )
    return DemoRow(
        model=stage.name,
        policy=cell.policy,
        ratio=1.0 if cell.ratio is None else cell.ratio,
        tokens=answers.tokens,
        pope_accuracy=pope.rates["accuracy"],
        pope_f1=pope.rates["f1"],
        pope_f1_interval=f1_interval(stage.questions, pope.predictions),
        chair_s=chair.metrics["chair_s"],
        chair_i=chair.metrics["chair_i"],
        chair_recall=chair.metrics["recall"],
        chair_recall_interval=chair.intervals["recall"],
        caption_length=chair.metrics["length"],
        **asdict(latency),
        n_questions=len(given),
        n_captions=len(captions.texts),
        seed=settings.seed,
    )


def f1_interval(questions: Sequence[dict[str, Any]], said: Sequence[bool | None]) -> tuple[float, float]:
    """95 % interval of POPE's F1, over scenes drawn with replacement."""
    counts = np.zeros((1 + max(question["image"] for question in questions), 3), int)
    for question, yes in zip(questions, said, strict=True):
        true = question["label"] == "yes"
        counts[question["image"]] += [bool(yes) and true, bool(yes) and not true, true and not yes]
    return bootstrap(counts, lambda total: 2 * total[0] / max(1, 2 * total[0] + total[1] + total[2]))
