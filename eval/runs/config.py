"""The YAML file of a run, checked before anything is computed. docs/runs.md explains every key."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vlm_prune.errors import PolicyError
from vlm_prune.eval.records import choose
from vlm_prune.eval.runs.strict import Count, Misplaced, Ratio, Strict
from vlm_prune.eval.runs.tasks import Task
from vlm_prune.registry import load_plugins, named_policies

Per = Literal["tile", "image"]
Dtype = Literal["float32", "float16", "bfloat16"]
OnBadImage = Literal["fail", "skip"]

Budget = dict[str, Any]
"""``{"ratio": 0.25}`` or ``{"tokens": 64}``, with ``"per": "image"`` if it is for all tiles; or empty."""


class ModelEntry(Strict):
    """A model.

    Attributes:
        model: a shipped test model, a folder, or a name on the Hugging Face hub.
        label: how results call it; default ``model``.
        dtype: of weights and computation; default the run's. Policies score tokens in fp32 nevertheless.
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
        """The label, or the model's name."""
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
        """The label, or the policy's name."""
        return self.label or self.policy


class RunConfig(Strict):
    """What to run: every model under every policy at every budget on every task.

    Attributes:
        models: names or `ModelEntry` mappings.
        policies: names or `PolicyEntry` mappings. ``none`` is the unpruned model, run once.
        ratios: budgets: shares of the visual tokens to keep.
        tokens: budgets: tokens to keep per image, or per tile where images are cut into tiles.
        per: ``image``: budgets are of all tiles of an image together, where the model allows it.
        capture: whether vision tower and prefill are computed by CUDA graphs, where they can be.
        tasks: a list of tasks.
        seed: of scenes and of images and questions that are drawn.
        batch_size: prompts answered together. Figures do not depend on it beyond rounding.
        dtype: of weights and computation.
        on_bad_image: ``fail``: a cell fails if an image is missing or cannot be read; ``skip``: its samples are left
            out, and counted.
        output: the run folder.
        plugins: modules of your own to import first; they register policies or families.
    """

    plugins: list[str] = Field([])
    models: Annotated[list[ModelEntry], Field(min_length=1)]
    policies: Annotated[list[PolicyEntry], Field(min_length=1)]
    ratios: list[Ratio] = Field([])
    tokens: list[Count] = Field([])
    per: Per = "tile"
    capture: bool = False
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
        """Raise if two rows of results would have the same name, whether they are the same measurement or not."""
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
                with suppress(PolicyError):  # this is reported when the policy is made
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
    """Positions of values that appear earlier in the list."""
    return [at for at, value in enumerate(values) if value in values[:at]]
