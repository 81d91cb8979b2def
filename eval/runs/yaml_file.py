"""Reading a run's YAML file: errors name the line, what is wrong there and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from vlm_prune.eval.records import read_text
from vlm_prune.eval.runs.config import RunConfig
from vlm_prune.eval.runs.sources import SOURCES
from vlm_prune.eval.runs.strict import Misplaced, Strict

Loc = tuple[int | str, ...]
"""A path of field names and positions in lists. Pydantic's paths also contain tags of unions, see `_place`."""

DEEPEST = 50
"""The deepest nesting allowed in a file; Python's recursion limit would stop the reader without saying where."""


class ConfigError(ValueError):
    """A run's YAML file is not valid; the message names the line."""


def load_config(path: Path) -> RunConfig:
    """Read and check a YAML file. Raises `ConfigError` with file, line, what is wrong and what is allowed."""
    return parse_config(read_text(path), str(path))


def parse_config(text: str, path: str) -> RunConfig:
    """The same from text; ``path`` is its name in messages."""
    try:
        node, data = _read(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: not YAML: {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        where = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{where}: not YAML: {error.problem or error.context}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the file has to hold keys such as models:, policies: and tasks:.")
    if problems := [f"{path}:{line}: {message}" for line, message in _repeated(node)]:
        raise ConfigError("\n".join(problems))
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        found = [_explain(e) for e in error.errors(include_url=False)]
        raise ConfigError(
            "\n".join(f"{path}:{_line(node, loc)}: {message}" for loc, message in found)
        ) from error


# --- YAML ---


class _Loader(yaml.SafeLoader):
    """Says the line of a value that is none, such as a date of the 13th month."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node."""
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # anything that int, datetime and others raise
            value = str(getattr(node, "value", ""))[:80]
            problem = f"{value!r} is not what it looks like ({error}); quote it if it is a text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def _read(text: str) -> tuple[Any, Any]:
    """The nodes of a text, which know their lines, and the data."""
    _check_depth(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            problem = f"lists and mappings in one another, more than {DEEPEST} deep"
            mark: Any = event.start_mark
            raise yaml.MarkedYAMLError(None, None, problem, mark)


def _repeated(node: yaml.Node) -> Iterator[tuple[int, str]]:
    """Line and message of each key that appears twice in a mapping: YAML's reader would silently drop the first."""
    left, seen = [node], set()
    while left:
        at = left.pop()
        if id(at) in seen:  # an anchor may be used in many places
            continue
        seen.add(id(at))
        if isinstance(at, yaml.SequenceNode):
            left += reversed(at.value)
        elif isinstance(at, yaml.MappingNode):
            left += reversed([value for _, value in at.value])
            lines: dict[tuple[str, str], int] = {}
            for key, _ in at.value:
                name = key.tag, str(key.value)
                if name in lines:
                    yield key.start_mark.line + 1, f"{key.value}: appears twice, first in line {lines[name]}"
                lines.setdefault(name, key.start_mark.line + 1)


# --- messages ---


def _explain(error: Any) -> tuple[Loc, str]:
    """The position of a mistake, and its message."""
    place, owner, below = _place(error["loc"])
    kind, given = error["type"], error.get("input")
    context = error.get("ctx", {})
    message = error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        *_, key = place
        message = f"there is no such key. {_choice(key, sorted(owner.model_fields))}"
    elif kind == "union_tag_invalid":
        place += (context["discriminator"].strip("'"),)
        tasks = [name.strip(" '") for name in context["expected_tags"].split(",")]
        message = f'there is no task "{context["tag"]}". {_choice(context["tag"], tasks)}'
    elif kind == "union_tag_not_found":
        place, message = _unnamed(place, given, below, ["task"], "the key task has to say which task it is")
    elif kind == "no_source":
        place, message = _unnamed(place, given, below, list(SOURCES), message)
    elif kind == "literal_error":
        names = [name.strip("'") for name in context["expected"].replace(" or ", ", ").split(", ")]
        message = f'there is no such value as "{given}". {_choice(given, names)}'
    elif isinstance(context.get("error"), Misplaced):
        place += context["error"].loc
    elif kind != "value_error":
        message = _wrong(kind, given, context) or f"{message}, got {_short(given)}"
    where = ".".join(map(str, place))
    return place, f"{where}: {message}" if where else message


NEEDED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a number",
    "string": "a text",
    "bool": "true or false",
    "list": "a list, such as [a, b],",
    "tuple": "a list, such as [128, 128],",
    "dict": "a mapping, such as {key: value},",
    "model": "a mapping, such as {key: value},",
    "path": "a path",
}
"""The expected value of a field, by the first word of pydantic's type of error."""

LIMITS = {
    "greater_than_equal": ("{ge} or more", "ge"),
    "less_than_equal": ("{le} or less", "le"),
    "greater_than": ("more than {gt}", "gt"),
    "less_than": ("less than {lt}", "lt"),
}


def _wrong(kind: str, given: Any, context: dict[str, Any]) -> str:
    """What a value is, and what would be right; empty for a kind of error that no field has."""
    if kind == "missing":
        return "this is missing, and has to be given"
    if kind in LIMITS:
        text, name = LIMITS[kind]
        return f"{text.format(**{name: _plain(context[name])})} is needed, got {_short(given)}"
    if kind == "too_short":
        return f"at least {context['min_length']} is needed, got {_short(given)}"
    if kind == "too_long":
        return f"at most {context['max_length']} can be given, got {_short(given)}"
    needed = NEEDED.get(kind.split("_")[0])
    return f"{needed} is needed, got {_short(given)}" if needed else ""


def _plain(number: float) -> str:
    return f"{number:g}"


def _choice(given: Any, known: Iterable[str]) -> str:
    """The available names, the nearest one first."""
    options = list(known)
    near = difflib.get_close_matches(str(given), options, n=1, cutoff=0.5)
    hint = f'Did you mean "{near[0]}"? ' if near else ""
    return f"{hint}Available: {', '.join(options)}."


def _unnamed(
    place: Loc, given: Any, kinds: list[type[Strict]], wanted: list[str], message: str
) -> tuple[Loc, str]:
    """For a mapping without the key that says which of ``kinds`` it is: an unknown key may be a misspelling of it."""
    if not isinstance(given, dict):
        return place, f"{message}, got {_short(given)}"
    for key in given:
        known = any(key in kind.model_fields for kind in kinds)
        if not known and (near := difflib.get_close_matches(str(key), wanted, n=1, cutoff=0.5)):
            return (*place, str(key)), f'there is no such key. Did you mean "{near[0]}"? Otherwise {message}'
    return place, f"{message}, got {', '.join(map(str, given)) or 'no keys'}"


def _short(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- positions in the file ---


def _place(loc: Loc) -> tuple[Loc, type[Strict], list[type[Strict]]]:
    """``loc`` without the tags of unions, which are not in the file; what its last key stands in, and what it may hold.

    A tag is the key that names a source of data, or the value of ``task:``. As the former is a key of the mapping too,
    only the types can tell it from a step down.
    """
    owner: type[Strict] = RunConfig
    owners, place = [owner], []
    for part in loc:
        if len(owners) > 1 and isinstance(part, str):
            owners = [cls for cls in owners if _tag(cls, part)]
            continue
        place.append(part)
        if isinstance(part, str) and owners:
            owner = owners[0]
            field = owner.model_fields.get(part)
            owners = _mappings((field.annotation, *field.metadata)) if field else []
    return tuple(place), owner, owners


def _mappings(annotation: Any) -> list[type[Strict]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    parts = annotation if isinstance(annotation, tuple) else get_args(annotation)
    return [cls for part in parts for cls in _mappings(part)]


def _tag(cls: type[Strict], tag: str) -> bool:
    task = cls.model_fields.get("task")
    return tag in (get_args(task.annotation) if task else cls.model_fields)


def _line(node: Any, loc: Loc) -> int:
    """Line, from 1, of the deepest part of ``loc`` that the file has."""
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
