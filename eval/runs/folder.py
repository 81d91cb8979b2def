"""The run folder on disk; docs/runs.md describes it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_prune.eval.images import load_image
from vlm_prune.eval.records import read_json, read_records

Record = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run."""

    path: Path

    def rows(self) -> list[Record]:
        """The rows of ``results.json``: one per finished cell, in the order of the config."""
        rows: list[Record] = read_json(self.path / "results.json")
        return rows

    def times(self) -> dict[str, Record]:
        """The times of ``speed`` cells, by cell."""
        times: dict[str, Record] = read_json(self.path / "times.json")
        return times

    def samples(self, cell: str) -> list[Record]:
        """The records of a finished cell, in the order of its task."""
        return read_records(self.cell(cell) / "samples.jsonl")

    def image(self, record: Record) -> Image.Image:
        """The image of a record, as the model saw it: upright, in RGB.

        Raises:
            ValueError: it is missing or broken.
        """
        return load_image(self.path / record["image"]["path"])

    def cell(self, name: str) -> Path:
        """The folder of a cell."""
        return self.path / "cells" / name

    def row(self, cell: str) -> Record | None:
        """The row of a cell, if it is finished.

        Raises:
            ValueError: it was finished, but a file is missing or damaged, for example because the disk was full.
        """
        folder = self.cell(cell)
        path = folder / "row.json"
        if not path.exists():
            return None
        row = read_json(path)
        if not isinstance(row, dict) or row.get("cell") != cell or not isinstance(row.get("n"), int):
            raise ValueError(f"{path} is not the row of this cell")
        if row.get("kind") == "speed" and not isinstance(read_json(folder / "times.json"), dict):
            raise ValueError(f"{folder / 'times.json'} holds no times")
        samples = folder / "samples.jsonl"
        whole = count_lines(samples) if samples.exists() else 0
        if whole != row["n"]:
            raise ValueError(f"{samples} has {whole} of {row['n']} samples")
        record: Record = row
        return record


def count_lines(path: Path) -> int:
    """Complete lines of a file."""
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") and line[:1] == b"{" for line in file)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a reader, or a later start, finds the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    beside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """A JSON value, indented, by `write_whole`."""
    write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_lines(path: Path, records: Iterable[Record]) -> None:
    """JSON lines, by `write_whole`."""
    write_whole(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
