"""The YAML file of a run, checked before anything is computed."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vlm_prune.eval.models import MODELS
from vlm_prune.eval.records import choose


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PolicyEntry(_Strict):
    """One row of the policy list.

    Attributes:
        policy: a name, or names joined by "+".
        label: how the table calls it; default the name.
        settings: fields of the policy; for a composition, a mapping of them per policy name.
        ratios: its budgets, instead of the run's; empty for a policy that drops no tokens.
        models: the models it is run on, instead of all.
    """

    policy: str
    label: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    ratios: list[float] | None = None
    models: list[str] | None = None

    @property
    def name(self) -> str:
        """The label, or else the policy's name."""
        return self.label or self.policy


class RunConfig(_Strict):
    """What to run.

    Attributes:
        models: names of shipped test models.
        sizes: width and height of a model's scenes; default one 128 x 128 tile.
        policies: names or `PolicyEntry` mappings.
        ratios: shares of visual tokens to keep.
        scenes: procedural scenes per model, each captioned once.
        splits: which absent objects POPE asks for; six questions per scene and split.
        rounds: timed rounds for the prefill and KV figures.
        bootstrap: draws behind each 95 % interval.
        seed: of scenes and questions.
        batch_size: prompts answered together.
        dtype: of weights and computation; choices between tokens are made in fp32 all the same.
        output: folder for the cells, ``results.json`` and ``results.md``.
    """

    models: list[str]
    sizes: dict[str, tuple[int, int]] = Field(default_factory=dict)
    policies: list[PolicyEntry]
    ratios: list[float] = [0.5, 0.25, 0.125]
    scenes: int = Field(default=48, ge=1)
    splits: list[Literal["random", "popular", "adversarial"]] = ["random", "popular", "adversarial"]
    rounds: int = Field(default=3, ge=1)
    seed: int = 2026
    batch_size: int = Field(default=16, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    output: Path

    @field_validator("policies", mode="before")
    @classmethod
    def _named(cls, entries: Any) -> Any:
        return [{"policy": e} if isinstance(e, str) else e for e in entries or ()]

    @field_validator("models")
    @classmethod
    def _known(cls, models: list[str]) -> list[str]:
        return [choose("model", name, MODELS) for name in models]


class ConfigError(ValueError):
    """A run's YAML file is not valid; the message names the line."""


def load_config(path: Path) -> RunConfig:
    """Read and check a YAML file. Raises `ConfigError` with file, line, what is wrong and what is allowed."""
    try:
        text = path.read_text(encoding="utf-8")
        node, data = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the file has to hold keys such as models: and policies:.")
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        problems = [f"{path}:{_line(node, e['loc'])}: {_explain(e)}" for e in error.errors(include_url=False)]
        raise ConfigError("\n".join(problems)) from error


def _explain(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']}"
    owner = PolicyEntry if error["loc"][0] == "policies" else RunConfig
    known = sorted(owner.model_fields)
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f'Did you mean "{near[0]}"? ' if near else ""
    return f"{where}: there is no such key. {hint}Available: {', '.join(known)}."


def _line(node: Any, loc: tuple[int | str, ...]) -> int:
    """Line, from 1, of the deepest part of ``loc`` that the file has."""
    line: int = node.start_mark.line + 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
