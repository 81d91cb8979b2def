"""The YAML file of a run, checked before anything is computed. docs/runs.md explains every key."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from vlm_prune.errors import PolicyError
from vlm_prune.eval.chair import VARIANTS
from vlm_prune.eval.pope import PARSERS
from vlm_prune.eval.records import choose
from vlm_prune.registry import load_plugins, named_policies

Split = Literal["random", "popular", "adversarial"]
Ratio = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Per = Literal["tile", "image"]
Dtype = Literal["float32", "float16", "bfloat16"]
OnBadImage = Literal["fail", "skip"]


Budget = dict[str, Any]
"""``{"ratio": 0.25}`` or ``{"tokens": 64}``, with ``"per": "image"`` where it is of all tiles; or nothing."""


class Misplaced(ValueError):
    """A mistake that shows only beside the rest of the file; ``loc`` is the way to it from there."""

    def __init__(self, message: str, *loc: int | str):
        super().__init__(message)
        self.loc = loc


class Strict(BaseModel):
    """A mapping of a YAML file in which every key is known."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelEntry(Strict):
    """A model.

    Attributes:
        model: a shipped test model, a folder, or a name on the Hugging Face hub.
        label: how results call it; default ``model``.
        dtype: of weights and computation; default the run's. Choices between tokens are made in fp32 all the same.
        device_map: as `from_pretrained` takes it; default the process's own GPU, or the CPU.
        attn_implementation: as `from_pretrained` takes it.
        revision: of a hub model.
        trust_remote_code: run code that comes with the model. Off unless you say so.
        processor: further arguments of `AutoProcessor.from_pretrained`.
    """

    model: str
    label: str = ""
    dtype: Dtype | None = None
    device_map: str | dict[str, int | str] | None = None
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    processor: dict[str, Any] = Field(default_factory=dict)

    @field_validator("device_map", mode="before")
    @classmethod
    def _placed(cls, value: Any) -> Any:
        flat = value.values() if isinstance(value, dict) else [value]
        if value is None or all(isinstance(one, str | int) and not isinstance(one, bool) for one in flat):
            return value
        raise ValueError(f'"auto", a device, or a mapping of modules to devices is needed, got {value!r}')

    @property
    def name(self) -> str:
        """The label, or else the model's name."""
        return self.label or self.model


class PolicyEntry(Strict):
    """A policy.

    Attributes:
        policy: a name, or names joined by "+".
        label: how results call it; default ``policy``.
        settings: fields of the policy; for a composition, a mapping of them per policy name.
        ratios: its budgets, instead of the run's: shares of the visual tokens.
        tokens: its budgets, instead of the run's: tokens per image, or per tile where images are cut into tiles.
        per: what its budgets are of, instead of the run's: ``tile`` or ``image``.
        models: labels of the models it is run on, instead of all.
    """

    policy: str
    label: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    ratios: list[Ratio] | None = None
    tokens: list[Count] | None = None
    per: Per | None = None
    models: list[str] | None = None

    @property
    def name(self) -> str:
        """The label, or else the policy's name."""
        return self.label or self.policy


class ScenesData(Strict):
    """Procedural scenes, made for the shipped models.

    Attributes:
        scenes: how many.
        kind: ``shapes``, a few coloured objects; ``desk``, with signs, charts, tiny objects and clutter as well, of
            which a ``vqa`` task asks one question a category.
        size: width and height in pixels.
        sizes: the same for single models, by label.
    """

    scenes: Annotated[int, Field(ge=1)]
    kind: Literal["shapes", "desk"] = "shapes"
    size: tuple[int, int] = (128, 128)
    sizes: dict[str, tuple[int, int]] = Field(default_factory=dict)


class Columns(Strict):
    """Which columns hold what; the first of the usual names that a data set has, unless given.

    Attributes:
        id: question_id, questionId or id; default the row's number.
        image: image, image_path, image_id, file_name or image_source; a path below ``images``, or the image itself.
        question: question, text or query.
        answer: label, answer or answers; for VQA a list of accepted answers, or of VQAv2's mappings with ``answer``.
        objects: objects: the names of what is in the image.
        split: category or split; default one split.
    """

    id: str | None = None
    image: str | None = None
    question: str | None = None
    answer: str | None = None
    objects: str | None = None
    split: str | None = None


class TableData(Strict):
    """What data of rows have in common.

    Attributes:
        images: folder of the images that rows name by path.
        columns: names of the columns, if they are not the usual ones.
        limit: only the first so many rows of each split.
    """

    images: Path | None = None
    columns: Columns = Columns()
    limit: Count | None = None


class JsonlData(TableData):
    """JSON lines (or a JSON list, or CSV), one file or one a split.

    Attributes:
        jsonl: the files. Of several, each is a split, called random, popular or adversarial if its name says so.
    """

    jsonl: list[Path]

    @field_validator("jsonl", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value


class DiskData(TableData):
    """A Hugging Face data set that ``save_to_disk`` wrote.

    Attributes:
        disk: its folder.
        split: of a folder with several.
    """

    disk: Path
    split: str | None = None


class HubData(TableData):
    """A data set on the Hugging Face hub.

    Attributes:
        hub: its name, such as ``lmms-lab/POPE``.
        config: its configuration, if it has several.
        split: the split.
        revision: a commit or tag.
    """

    hub: str
    config: str | None = None
    split: str = "test"
    revision: str | None = None


class CocoData(Strict):
    """Images with annotations in COCO's format.

    Attributes:
        coco: the folder with instances_*.json and captions_*.json, or one instances file (POPE only).
        images: folder of the images.
        image_ids: a saved list of image ids; these and no others.
        count: how many images to draw of those in the folder, instead (usual protocols take 500); default all.
    """

    coco: Path
    images: Path
    image_ids: Path | None = None
    count: Count | None = None

    @model_validator(mode="after")
    def _one_choice(self) -> CocoData:
        if self.image_ids and self.count:
            raise ValueError("image_ids and count both choose images: keep one")
        return self


SOURCES: dict[str, type[Strict]] = {
    "scenes": ScenesData,
    "jsonl": JsonlData,
    "disk": DiskData,
    "hub": HubData,
    "coco": CocoData,
}
"""The key that names a source -> its mapping."""


def _source(value: Any) -> str | None:
    if isinstance(value, dict):
        return next((key for key in SOURCES if key in value), None)
    return next((key for key, source in SOURCES.items() if isinstance(value, source)), None)


Data = Annotated[
    Annotated[ScenesData, Tag("scenes")]
    | Annotated[JsonlData, Tag("jsonl")]
    | Annotated[DiskData, Tag("disk")]
    | Annotated[HubData, Tag("hub")]
    | Annotated[CocoData, Tag("coco")],
    Discriminator(
        _source,
        custom_error_type="no_source",
        custom_error_message=f"one of the keys {', '.join(SOURCES)} has to say where the data are",
    ),
]


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
    splits: list[Split] = ["random", "popular", "adversarial"]
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


class RunConfig(Strict):
    """What to run: every model under every policy at every budget on every task.

    Attributes:
        models: names or `ModelEntry` mappings.
        policies: names or `PolicyEntry` mappings. ``none`` is the unpruned model, run once.
        ratios: budgets: shares of the visual tokens to keep.
        tokens: budgets: tokens to keep per image, or per tile where images are cut into tiles.
        per: ``image``: budgets are of all tiles of an image together, where the model allows it.
        tasks: a list of tasks.
        seed: of scenes and of images and questions that are drawn.
        batch_size: prompts answered together. Figures do not depend on it beyond rounding.
        dtype: of weights and computation.
        on_bad_image: ``fail``, a cell in which an image is missing or cannot be read fails; ``skip``, its samples are
            left out, and counted.
        output: the run folder.
        plugins: modules of your own to import first; they register policies or families.
    """

    plugins: list[str] = []
    models: Annotated[list[ModelEntry], Field(min_length=1)]
    policies: Annotated[list[PolicyEntry], Field(min_length=1)]
    ratios: list[Ratio] = []
    tokens: list[Count] = []
    per: Per = "tile"
    tasks: Annotated[list[Task], Field(min_length=1)]
    seed: int = 2026
    batch_size: Count = 16
    dtype: Dtype = "float32"
    on_bad_image: OnBadImage = "fail"
    output: Path

    @field_validator("plugins")
    @classmethod
    def _loaded(cls, modules: list[str]) -> list[str]:
        try:
            load_plugins(modules)
        except PolicyError as error:
            raise ValueError(str(error)) from error
        return modules

    @field_validator("models", "policies", mode="before")
    @classmethod
    def _named(cls, entries: Any, info: Any) -> Any:
        key = info.field_name.removesuffix("s").replace("policie", "policy")
        return (
            [{key: e} if isinstance(e, str) else e for e in entries] if isinstance(entries, list) else entries
        )

    def budgets(self, entry: PolicyEntry) -> list[Budget]:
        """A policy's own budgets or the run's. One that drops no tokens has none, and is run once.

        Raises:
            PolicyError: there is no such policy.
        """
        own = entry.ratios is not None or entry.tokens is not None
        ratios, tokens = (entry.ratios, entry.tokens) if own else (self.ratios, self.tokens)
        of = {"per": "image"} if (entry.per or self.per) == "image" else {}
        found: list[Budget] = [{"tokens": count, **of} for count in tokens or ()]
        found += [{"ratio": ratio, **of} for ratio in ratios or ()]
        prunes = any(policy.prunes for policy in named_policies(entry.policy))
        return found if prunes and found else [{}]

    @model_validator(mode="after")
    def _labels(self) -> RunConfig:
        entries: dict[str, list[ModelEntry] | list[Task]] = {"models": self.models, "tasks": self.tasks}
        for key, some in entries.items():
            names = [entry.name for entry in some]
            if twice := _repeats(names):
                raise Misplaced(
                    f"{names[twice[0]]!r} appears twice: give each a label of its own", key, twice[0]
                )
        return self

    @model_validator(mode="after")
    def _known_models(self) -> RunConfig:
        known = [model.name for model in self.models]
        named: dict[str, list[PolicyEntry] | list[Task]] = {"policies": self.policies, "tasks": self.tasks}
        for key, some in named.items():
            for at, entry in enumerate(some):
                for number, name in enumerate(entry.models or ()):
                    try:
                        choose("model", name, known)
                    except ValueError as error:
                        raise Misplaced(str(error), key, at, "models", number) from error
        return self

    @model_validator(mode="after")
    def _rows_differ(self) -> RunConfig:
        """No two rows of results may be called the same, be they two measurements or one made twice."""
        _differ(self)
        for at, entry in enumerate(self.policies):
            _differ(entry, "policies", at)
        for model in self.models:
            self._policies_differ(model.name)
        return self

    def _policies_differ(self, model: str) -> None:
        mine = [(at, e) for at, e in enumerate(self.policies) if e.models is None or model in e.models]
        for count, (at, entry) in enumerate(mine):
            for _, other in mine[:count]:
                if other.name != entry.name:
                    continue
                if (other.policy, other.settings) != (entry.policy, entry.settings):
                    message = (
                        f"{entry.name!r} appears twice, with other settings: give each a label of its own"
                    )
                    raise Misplaced(message, "policies", at)
                with suppress(PolicyError):  # which is reported when the policy is made
                    if any(budget in self.budgets(other) for budget in self.budgets(entry)):
                        message = f"{entry.name!r} appears twice, at the same budget: keep one"
                        raise Misplaced(message, "policies", at)


def _differ(owner: RunConfig | PolicyEntry, *loc: int | str) -> None:
    for key, given in {"ratios": owner.ratios, "tokens": owner.tokens}.items():
        if twice := _repeats(given or []):
            raise Misplaced(
                f"the budget {(given or [])[twice[0]]} appears twice: keep one", *loc, key, twice[0]
            )


def _repeats(values: list[Any]) -> list[int]:
    """Where values stand that stood further ahead already."""
    return [at for at, value in enumerate(values) if value in values[:at]]
