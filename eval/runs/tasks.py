"""What a run asks of its models: POPE, CHAIR, AMBER, MME, multiple choice, visual question
answering, answers that a judge rates, speed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vlm_prune.eval.chair import VARIANTS
from vlm_prune.eval.pope import PARSERS
from vlm_prune.eval.records import choose
from vlm_prune.eval.runs.sources import CocoData, Data, JsonlData, ScenesData
from vlm_prune.eval.runs.strict import Count, Misplaced, Strict
from vlm_prune.registry import load_entry

Split = Literal["random", "popular", "adversarial"]


class TaskEntry(Strict):
    """What all tasks share.

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
        """pope, chair, amber_g, amber_d, mme, choice, vqa, judged or speed."""
        kind: str = self.task  # type: ignore[attr-defined]
        return kind

    @property
    def name(self) -> str:
        """The label, or the kind."""
        return self.label or self.kind


def _asks(task: TaskEntry) -> None:
    """Raise if a prompt would ask the same for every sample."""
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
    """POPE: does a model say that an object is there when it is not?

    Attributes:
        splits: which absent objects are asked for, where questions are built (scenes, coco).
        parser: how an answer is read.
        labels: other labels for the questions, by ``question_id``, one file for each of the data's: RePOPE's. Questions
            that they leave out are not asked.
    """

    task: Literal["pope"]
    labels: list[Path] = Field(default_factory=list)
    splits: list[Split] = Field(["random", "popular", "adversarial"])
    parser: str = "official"

    @field_validator("parser")
    @classmethod
    def _known(cls, parser: str) -> str:
        return choose("POPE parser", parser, PARSERS)

    @field_validator("labels", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _prompted(self) -> PopeTask:
        _asks(self)
        files = len(self.data.jsonl) if isinstance(self.data, JsonlData) else None
        if self.labels and files != len(self.labels):
            raise Misplaced(
                f"{len(self.labels)} files of other labels for {files or 'no'} jsonl files of questions: give one for "
                "each of the data's, in their order",
                "labels",
            )
        return self


class ChairTask(TaskEntry):
    """CHAIR: which objects of a caption are not in the image?

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


class AmberGenerativeTask(TaskEntry):
    """AMBER's descriptions: which nouns are not in the image?

    Attributes:
        annotations: AMBER's ``annotations.json``: for each id the objects that are there, and those that tend to be
            imagined.
        relations: AMBER's ``relation.json``: other words for each object.
        safe: AMBER's ``safe_words.txt``, words that are right in every image, one per line.
        nouns: ``plain`` takes every word that AMBER knows, in its singular; ``nltk`` those that NLTK tags as nouns, in
            their lemma, as the released script does.
    """

    task: Literal["amber_g"]
    annotations: Path
    relations: Path
    safe: Path | None = None
    nouns: Literal["plain", "nltk"] = "plain"
    max_new_tokens: Count = 512

    @model_validator(mode="after")
    def _rows(self) -> AmberGenerativeTask:
        _of_rows(self)
        return self


class AmberQuestionsTask(TaskEntry):
    """AMBER's yes-no questions, about existence, attributes and relations.

    Attributes:
        annotations: AMBER's ``annotations.json``: for each id the truth, and what is asked about.
        parser: ``word`` reads "Yes" or "No" from the first word of an answer, ignoring case; ``exact`` only from an
            answer of that one word, as the released script does.
    """

    task: Literal["amber_d"]
    annotations: Path
    parser: Literal["word", "exact"] = "word"
    prompt: str = "{question} Please answer yes or no."

    @model_validator(mode="after")
    def _rows(self) -> AmberQuestionsTask:
        _of_rows(self)
        _asks(self)
        return self


class MmeTask(TaskEntry):
    """MME: two yes-no questions per image; a category's score also counts images with both answers right."""

    task: Literal["mme"]

    @model_validator(mode="after")
    def _rows(self) -> MmeTask:
        _of_rows(self)
        _asks(self)
        if self.data.limit is not None:  # type: ignore[union-attr]
            raise Misplaced("MME needs both questions of each image: leave limit out", "data", "limit")
        return self


class ChoiceTask(TaskEntry):
    """Multiple choice, as MMBench asks it. ``{question}`` stands for the question, its hint and its lettered options.

    Attributes:
        circular: ask once for each option, with the options rotated; all answers have to be right.
    """

    task: Literal["choice"]
    circular: bool = True
    prompt: str = "{question}\nAnswer with the option's letter from the given choices directly."

    @model_validator(mode="after")
    def _rows(self) -> ChoiceTask:
        _of_rows(self)
        _asks(self)
        return self


class JudgedTask(TaskEntry):
    """Open answers, rated by a function of yours, as in MMHal-Bench.

    Attributes:
        judge: ``module:function`` of a module on the Python path. It is given ``question``, ``answer`` and
            ``reference`` (the row's answers, a list) and returns a number.
        good: a rating below it counts as bad; 3 of 6 in MMHal-Bench, whose hallucination rate that is.
    """

    task: Literal["judged"]
    judge: str
    good: float = 3.0
    max_new_tokens: Count = 256

    @field_validator("judge")
    @classmethod
    def _found(cls, judge: str) -> str:
        try:
            found = load_entry(judge)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{judge!r} cannot be imported ({error}): give module:function") from error
        if not callable(found):
            raise ValueError(f"{judge!r} is a {type(found).__name__}: a function is needed")
        return judge

    @model_validator(mode="after")
    def _rows(self) -> JudgedTask:
        _of_rows(self)
        _asks(self)
        return self


def _of_rows(task: TaskEntry) -> None:
    """Raises where data are no rows of a benchmark."""
    if isinstance(task.data, ScenesData | CocoData):
        raise Misplaced(f"{task.kind} is a data set of its own: give jsonl, disk or hub", "data")


class VqaTask(TaskEntry):
    """Short answers against accepted ones.

    Attributes:
        metric: ``exact``, right if it equals one of them; ``vqa``, VQAv2's: right to the share of annotators who agree;
            ``relaxed``, ChartQA's: numbers within 5 %; ``anls``, DocVQA's: by edit distance.
    """

    task: Literal["vqa"]
    prompt: str = "{question}\nAnswer the question using a single word or phrase."
    metric: Literal["exact", "vqa", "relaxed", "anls"] = "exact"

    @model_validator(mode="after")
    def _prompted(self) -> VqaTask:
        _asks(self)
        return self


class SpeedTask(TaskEntry):
    """Times, operations and KV bytes of single prompts, alternating with the unpruned model.

    Attributes:
        prompts: number of prompts, each with another image.
        rounds: timed rounds, after a warm-up.
    """

    task: Literal["speed"]
    max_new_tokens: Count = 4
    prompts: Count = 2
    rounds: Count = 3


Task = Annotated[
    PopeTask
    | ChairTask
    | AmberGenerativeTask
    | AmberQuestionsTask
    | MmeTask
    | ChoiceTask
    | VqaTask
    | JudgedTask
    | SpeedTask,
    Field(discriminator="task"),
]
