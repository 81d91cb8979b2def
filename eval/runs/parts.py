"""The records of a cell that is not finished yet.

Every process appends to a separate file, one line per batch. A line is complete or ignored, so a run that was killed
knows exactly which samples it has, and asks no sample twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm_prune.eval.runs.folder import Record


def read_parts(cell: Path) -> dict[str, Record]:
    """The records in a cell's parts, by id."""
    found: dict[str, Record] = {}
    for path in sorted(cell.glob("part-*.jsonl")):
        for records in _whole_lines(path):
            found |= {record["id"]: record for record in records}
    return found


def read_remains(cell: Path) -> dict[str, Record]:
    """The undamaged records of a cell that was finished once, by id."""
    path = cell / "samples.jsonl"
    return {record["id"]: record for record in _whole_lines(path)} if path.exists() else {}


def _whole_lines(path: Path) -> Iterator[Any]:
    for line in path.read_bytes().split(b"\n"):
        # a line that was not completely written, or that lost a block of the disk
        with suppress(ValueError):
            if line:
                yield json.loads(line)


def add_part(cell: Path, rank: int, records: list[Record]) -> None:
    """Write the records of a batch."""
    cell.mkdir(parents=True, exist_ok=True)
    path = cell / f"part-{rank}.jsonl"
    with path.open("ab") as file:
        # an incomplete line of a killed process must not damage this one
        begin = b"" if file.tell() == 0 else b"\n"
        file.write(begin + json.dumps(records, allow_nan=False).encode())


def remove_parts(cell: Path) -> None:
    """The cell is finished."""
    for path in cell.glob("part-*.jsonl"):
        path.unlink(missing_ok=True)
