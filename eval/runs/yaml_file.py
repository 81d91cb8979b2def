"""Reading a run's YAML file: errors name the line, what is wrong there and what is allowed."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from vlm_prune.eval.records import read_text
from vlm_prune.eval.runs.config import RunConfig, Strict


class ConfigError(ValueError):
    """A run's YAML file is not valid; the message names the line."""


def load_config(path: Path) -> RunConfig:
    """Read and check a YAML file. Raises `ConfigError` with file, line, what is wrong and what is allowed."""
    return parse_config(read_text(path), str(path))


def parse_config(text: str, path: str) -> RunConfig:
    """The same from text; ``path`` is what messages call it."""
    try:
        node, data = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the file has to hold keys such as models:, policies: and tasks:.")
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        problems = [f"{path}:{_line(node, e['loc'])}: {_explain(e)}" for e in error.errors(include_url=False)]
        raise ConfigError("\n".join(problems)) from error


def _explain(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        message = error["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    *above, key = error["loc"]
    known = sorted(_owner(tuple(above)).model_fields)
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    hint = f'Did you mean "{near[0]}"? ' if near else ""
    return f"{where}: there is no such key. {hint}Available: {', '.join(known)}."


def _owner(loc: tuple[int | str, ...]) -> type[Strict]:
    """The mapping that stands at ``loc``: a way of field names, positions in lists and tags of unions."""
    owners: list[type[Strict]] = [RunConfig]
    for part in loc:
        fields = [owner.model_fields[str(part)] for owner in owners if part in owner.model_fields]
        if len(owners) == 1 and fields:
            owners = [cls for field in fields for cls in _mappings((field.annotation, *field.metadata))]
        elif isinstance(part, str):  # the tag of a union: the key that names a source, or the value of task:
            owners = [cls for cls in owners if _tag(cls, part)]
    return owners[0]


def _mappings(annotation: Any) -> list[type[Strict]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    parts = annotation if isinstance(annotation, tuple) else get_args(annotation)
    return [cls for part in parts for cls in _mappings(part)]


def _tag(cls: type[Strict], tag: str) -> bool:
    task = cls.model_fields.get("task")
    return tag in (get_args(task.annotation) if task else cls.model_fields)


def _line(node: Any, loc: tuple[int | str, ...]) -> int:
    """Line, from 1, of the deepest part of ``loc`` that the file has; tags of unions are not in it."""
    line: int = node.start_mark.line + 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if found is not None:
                line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
