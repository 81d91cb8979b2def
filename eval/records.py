"""Reading lists of records from files, with errors that say which file, which line and what is wrong."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error


def read_records(path: Path | str) -> list[dict[str, Any]]:
    """Records from JSON lines, a JSON list, one JSON object, or CHAIR's ``{"imgToEval": {id: record}}``.

    The content decides, not the file's ending: POPE's own question files are JSON lines named ``.json``.
    """
    text = read_text(path)
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
        found = _json_lines(path, text)
    if isinstance(found, dict):
        found = list(found["imgToEval"].values()) if isinstance(found.get("imgToEval"), dict) else [found]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path}: a list of JSON objects is needed, or one object a line")
    if not found:
        raise ValueError(f"{path} holds no records")
    return found


def _json_lines(path: Path | str, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
    return rows
