"""Reading lists of records from files, with errors that say which file, which line and what is wrong."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_WHOLE = re.compile(r"\d+\.0")
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
    """``7`` for ``7.0`` or "7.0", which pandas makes of whole numbers in a column with gaps; anything else as it is."""
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value.removesuffix(".0"))
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


def read_records(path: Path | str, by_id: tuple[str, str] | None = None) -> list[dict[str, Any]]:
    """Records from JSON lines or any other JSON objects one after another, a JSON list, one JSON object, or CSV.

    Of one object, ``{"annotations": [record ..]}`` and CHAIR's ``{"imgToEval": {id: record}}`` are taken apart. The
    content decides, not the file's ending: POPE's own question files are JSON lines named ``.json``. Only ``.csv`` and
    ``.tsv`` are tables, with a line of names first; all that they hold is text.

    Args:
        path: the file.
        by_id: what to call id and text of a JSON object ``{id: text}``; ``{id: record}`` is understood then, too.
    """
    text = read_text(path)
    if Path(path).suffix.lower() in _DELIMITERS:
        return _table(path, text)
    values = _values(path, text)
    found = values[0] if len(values) == 1 else values
    if isinstance(found, dict):
        if isinstance(mapped := found.get("imgToEval"), dict):
            found = [
                {"image_id": key, **row} if isinstance(row, dict) else row for key, row in mapped.items()
            ]
        elif isinstance(found.get("annotations"), list):
            found = found["annotations"]
        else:
            found = _by_id(found, by_id) if by_id else [found]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path}: a list of JSON objects is needed, or one object a line")
    if not found:
        raise ValueError(f"{path} holds no records")
    return found


_DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}
"""What may stand between the cells of a table, by the file's ending."""


def _table(path: Path | str, text: str) -> list[dict[str, Any]]:
    head = text.split("\n", 1)[0]
    delimiter = max(_DELIMITERS[Path(path).suffix.lower()], key=head.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        found = []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num}: the line has more or fewer cells than the first, which names "
                    f"{', '.join(reader.fieldnames or ())}"
                )
            found.append(row)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    if not found:
        raise ValueError(f"{path} holds no records")
    return found


def _by_id(found: dict[str, Any], names: tuple[str, str]) -> list[dict[str, Any]]:
    """The records of ``{id: text}`` or ``{id: record}``; one record if it is neither."""
    key_name, text_name = names
    if found and all(isinstance(value, dict) for value in found.values()):
        return [{key_name: key, **row} for key, row in found.items()]
    ids = all(any(letter.isdigit() for letter in key) for key in found)
    if found and ids and all(isinstance(value, str) for value in found.values()):
        return [{key_name: key, text_name: value} for key, value in found.items()]
    return [found]


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
