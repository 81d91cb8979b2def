"""Reading lists of records from files, with errors that say which file, which line and what is wrong."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_SPACE, _COMMA = re.compile(r"\s*"), re.compile(r"\s*,?\s*")


def choose(kind: str, name: str, allowed: Iterable[str]) -> str:
    """``name`` if it is allowed.

    Raises:
        ValueError: it is not; the message lists what is, and the nearest.
    """
    options = list(allowed)
    if name in options:
        return name
    near = difflib.get_close_matches(str(name), options, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(options[:20]) + (f" ... ({len(options)} in all)" if len(options) > 20 else "")
    raise ValueError(f"unknown {kind} {name!r}.{hint} Available: {shown}")


def whole(value: Any) -> Any:
    """``7`` for ``7.0``, which pandas makes of whole numbers in a column with gaps; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_text(path: Path | str) -> str:
    """UTF-8 text of a file; a folder or a missing file is an error that says so."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder, a file is needed" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {what}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); JSON or JSON lines are needed") from error


def read_json(path: Path | str) -> Any:
    """One JSON value from a file."""
    values = _values(path, read_text(path))
    if len(values) > 1:
        raise ValueError(f"{path}: one JSON value is needed, and several stand one after another")
    return values[0]


def read_records(path: Path | str) -> list[dict[str, Any]]:
    """Records from JSON lines or any other JSON objects one after another, a JSON list, or one JSON object.

    Of one object, ``{"annotations": [record ..]}`` and CHAIR's ``{"imgToEval": {id: record}}`` are taken apart. The
    content decides, not the file's ending: POPE's own question files are JSON lines named ``.json``.
    """
    values = _values(path, read_text(path))
    found = values[0] if len(values) == 1 else values
    if isinstance(found, dict):
        if isinstance(by_id := found.get("imgToEval"), dict):
            found = [{"image_id": key, **row} if isinstance(row, dict) else row for key, row in by_id.items()]
        else:
            found = found["annotations"] if isinstance(found.get("annotations"), list) else [found]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path}: a list of JSON objects is needed, or one object a line")
    if not found:
        raise ValueError(f"{path} holds no records")
    return found


def _values(path: Path | str, text: str) -> list[Any]:
    """The JSON values of a text, at least one. A comma may stand between them."""
    decoder, at = json.JSONDecoder(), 0
    values: list[Any] = []
    while (at := _gap(text, at, comma=bool(values))) < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
        except RecursionError as error:
            line = text.count("\n", 0, at) + 1
            raise ValueError(f"{path}, line {line}: JSON nested too deeply to be read") from error
        values.append(value)
    if not values:
        raise ValueError(f"{path} is empty")
    return values


def _gap(text: str, at: int, comma: bool) -> int:
    """Where the white space that begins at ``at`` ends, with a comma in it if one may be there."""
    match = (_COMMA if comma else _SPACE).match(text, at)
    return match.end() if match else at
