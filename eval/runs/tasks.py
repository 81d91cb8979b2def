"""What a run asks of its models: POPE, CHAIR, visual question answering, speed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from vlm_prune.eval.chair import VARIANTS
from vlm_prune.eval.pope import PARSERS
from vlm_prune.eval.records import choose
from vlm_prune.eval.runs.sources import CocoData, Data, ScenesData
from vlm_prune.eval.runs.strict import Count, Misplaced, Strict

Split = Literal["random", "popular", "adversarial"]


class TaskEntry(Strict):
    """What all tasks have.

    Attributes:
        label: how results call it; default the task's kind.
        data: where the samples come from.
        prompt: what is asked; ``{question}`` stands for the sample's question.
        max_new_tokens: the longest answer.
        batch_size: prompts answered together; default the run's.
        models: labels of the models it is run on, instead of all.
    """

    label: str = ""
    data: Data
    prompt: str = "{question}"
    max_new_tokens: Count = 16
    batch_size: Count | None = None
    models: list[str] | None = None

    @property
    def kind(self) -> str:
        """pope, chair, vqa or speed."""
        kind: str = self.task  # type: ignore[attr-defined]
        return kind

    @property
    def name(self) -> str:
        """The label, or else the kind."""
        return self.label or self.kind


def _asks(task: TaskEntry) -> None:
    """Raises where a prompt asks the same of every sample."""
    if "{question}" in task.prompt:
        return
    braces = re.findall(r"\{\w*\}", task.prompt)
    found = f"{braces[0]} is not replaced" if braces else "every sample would be asked the same"
    raise Misplaced(
        f"{task.prompt[:60]!r} has no {{question}}, and {found}: write {{question}} where the sample's question goes, "
        'such as "{question}\\nAnswer with one word."',
        "prompt",
    )


class PopeTask(TaskEntry):
    """Does a model say an object is there when it is not?

    Attributes:
        splits: which absent objects are asked for, where questions are built (scenes, coco).
        parser: how an answer is read.
    """

    task: Literal["pope"]
    splits: list[Split] = Field(["random", "popular", "adversarial"])
    parser: str = "official"

    @field_validator("parser")
    @classmethod
    def _known(cls, parser: str) -> str:
        return choose("POPE parser", parser, PARSERS)

    @model_validator(mode="after")
    def _prompted(self) -> PopeTask:
        _asks(self)
        return self


class ChairTask(TaskEntry):
    """Which objects of a caption are not in the image?

    Attributes:
        variant: how objects are found; default ``official`` for COCO's, ``plain`` for others.
        vocabulary: a table of objects and their words; default COCO's, or the scenes' own.
    """

    task: Literal["chair"]
    prompt: str = "Please describe this image in detail."
    max_new_tokens: Count = 512
    variant: str | None = None
    vocabulary: Path | None = None

    @field_validator("variant")
    @classmethod
    def _known(cls, variant: str | None) -> str | None:
        return None if variant is None else choose("CHAIR variant", variant, VARIANTS)

    @model_validator(mode="after")
    def _prompted(self) -> ChairTask:
        if "{question}" in self.prompt and isinstance(self.data, ScenesData | CocoData):
            raise Misplaced(
                f"{self.prompt[:60]!r} has {{question}}, and these data have no questions for captions: leave it out, "
                "or give jsonl, disk or hub",
                "prompt",
            )
        return self


class VqaTask(TaskEntry):
    """Short answers against accepted ones.

    Attributes:
        metric: ``exact``, right if it equals one of them; ``vqa``, VQAv2's: right to the share of annotators who agree;
            ``relaxed``, ChartQA's: numbers within 5 %; ``anls``, DocVQA's: by likeness of spelling.
    """

    task: Literal["vqa"]
    prompt: str = "{question}\nAnswer the question using a single word or phrase."
    metric: Literal["exact", "vqa", "relaxed", "anls"] = "exact"

    @model_validator(mode="after")
    def _prompted(self) -> VqaTask:
        _asks(self)
        return self


class SpeedTask(TaskEntry):
    """Times, operations and KV bytes of single prompts, in turn with the unpruned model.

    Attributes:
        prompts: how many prompts, each of another image.
        rounds: timed rounds, after one that warms up.
    """

    task: Literal["speed"]
    max_new_tokens: Count = 4
    prompts: Count = 2
    rounds: Count = 3


Task = Annotated[PopeTask | ChairTask | VqaTask | SpeedTask, Field(discriminator="task")]
