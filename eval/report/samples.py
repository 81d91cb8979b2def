"""The samples that a report lets one browse, as the small JSON that its script reads.

Images, layouts of tiles and sets of kept patches are written once each and referred to by number: most cells of a run
share them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vlm_prune.eval.report.overlay import data_uri, plates
from vlm_prune.eval.report.results import Entry, Results
from vlm_prune.eval.runs.folder import Record, RunFolder

AGAIN = "Run the config again: it does this cell again and writes a new report"


class Pool:
    """Values in the order in which they were first seen; `number` says which one a value is."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def number(self, key: Any, value: Any) -> int:
        """The number of ``key``, whose value is ``value`` if it is new."""
        if key not in self._numbers:
            self._numbers[key] = len(self.values)
            self.values.append(value() if callable(value) else value)
        return self._numbers[key]


@dataclass(frozen=True)
class Task:
    """A task's samples, and what every entry answered.

    Attributes:
        samples: ``id``, ``split``, ``question``, ``label`` (as text).
        answers: for each entry that has the task, its number and one answer a sample: ``text``, ``verdict`` ("right",
            "wrong" or ""), ``marks`` (start, end and object of what is hallucinated in it), ``tokens`` (kept and
            dense), the numbers of its ``image`` and ``layout`` (models may see images of different sizes), and per
            tile ``kept``, the number of a set of patches (-1: all), and ``last``, those that the decoder's last layer
            still has (-1: all the kept ones).
        total: samples that the task has in the run.
    """

    name: str
    kind: str
    samples: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    total: int


@dataclass
class Browser:
    """All that the script needs."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    layouts: list[list[dict[str, Any]]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)

    def payload(self) -> dict[str, Any]:
        """As plain lists and dicts."""
        return asdict(self)


def browse(folder: RunFolder, results: Results, limit: int) -> Browser:
    """Collect up to ``limit`` samples of each task, spread evenly over it."""
    pools = Pool(), Pool(), Pool()
    tasks = []
    for name, kind in results.tasks.items():
        entries = [entry for entry in results.entries if name in entry.cells]
        tasks.append(_task(folder, name, kind, entries, limit, *pools))
    images, layouts, kept = (pool.values for pool in pools)
    return Browser([_entry(entry) for entry in results.entries], images, layouts, kept, tasks)


def _entry(entry: Entry) -> dict[str, Any]:
    keys = ("model", "policy", "budget", "unpruned", "inside")
    return {key: getattr(entry, key) for key in keys}


def spread(count: int, limit: int) -> list[int]:
    """At most ``limit`` numbers below ``count``, evenly apart, the first among them."""
    shown = min(count, limit)
    return [i * count // shown for i in range(shown)]


def _task(
    folder: RunFolder, name: str, kind: str, entries: Sequence[Entry], limit: int,
    images: Pool, layouts: Pool, kept: Pool,
) -> Task:  # fmt: skip
    total = entries[0].samples[name]
    places = spread(total, limit)
    samples = [
        {
            "id": record["id"],
            "split": record["split"],
            "question": record["question"],
            "label": label_text(record["label"]),
        }
        for record in read_some(folder, entries[0].cells[name], places)
    ]
    answers = []
    for entry in entries:
        found = read_some(folder, entry.cells[name], places)
        if [record["id"] for record in found] != [sample["id"] for sample in samples]:
            raise ValueError(
                f"{folder.path}: the samples of {entry.cells[name]} are others than those of the first cell"
            )
        given = [_answer(folder, record, kind, images, layouts, kept) for record in found]
        answers.append({"entry": entry.number, "given": given})
    return Task(name, kind, samples, answers, total)


def read_some(folder: RunFolder, cell: str, places: Sequence[int]) -> list[Record]:
    """The records at some places of a cell's samples, ascending; the others, which may be many, are not parsed.

    Raises:
        ValueError: the samples are gone, or not whole.
    """
    wanted = set(places)
    path = folder.cell(cell) / "samples.jsonl"
    try:
        with path.open("rb") as file:
            found = [json.loads(line) for number, line in enumerate(file) if number in wanted]
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path} is gone or not whole ({error}). {AGAIN}") from error
    if len(found) < len(wanted):
        raise ValueError(f"{path} is not whole. {AGAIN}")
    return found


def label_text(label: Any) -> str:
    """What is true, in words."""
    if isinstance(label, dict):
        return "; ".join(f"{name}: {label_text(value)}" for name, value in label.items())
    return ", ".join(map(str, label)) if isinstance(label, list) else "" if label is None else str(label)


def _image(folder: RunFolder, record: Record) -> dict[str, Any]:
    width, height = record["image"]["size"]
    try:
        source, missing = data_uri(folder.image(record)), ""
    except ValueError:  # data sets move or break; the page says so, and shows the rest
        source, missing = "", record["image"]["path"]
    return {"source": source, "missing": missing, "width": width, "height": height}


def _answer(
    folder: RunFolder, record: Record, kind: str, images: Pool, layouts: Pool, kept: Pool
) -> dict[str, Any]:
    tiles = record["tiles"]
    size = tuple(record["image"]["size"])
    layout = tuple((tuple(tile["box"]), tuple(tile["grid"])) for tile in tiles)
    mentions = record["scores"].get("mentions", ())
    return {
        "text": record["answer"],
        "verdict": verdict(kind, record["scores"]),
        "marks": [[*m["span"], m["object"]] for m in mentions if m["hallucinated"]],
        "image": images.number(record["image"]["path"], lambda: _image(folder, record)),
        "layout": layouts.number((layout, size), lambda: _layout(layout, size)),
        "kept": [_set(kept, tile["kept"], tile["grid"]) for tile in tiles],
        "last": [_set(kept, tile.get("last"), tile["grid"]) for tile in tiles],
        "tokens": [record["tokens"], record["visual_tokens"]],
    }


def _set(kept: Pool, units: Sequence[int] | None, grid: Sequence[int]) -> int:
    if units is None:
        return -1
    bits = kept_bits(units, grid)
    return kept.number(bits, bits)


def verdict(kind: str, scores: Record) -> str:
    """How an answer was scored: "right", "wrong", or "" where it is no matter of right and wrong."""
    if "correct" in scores:
        return "right" if scores["correct"] else "wrong"
    if kind == "vqa":
        return "right" if scores["accuracy"] >= 0.5 else "wrong"
    return ""


def _layout(layout: Sequence[tuple[Any, Any]], size: tuple[int, int]) -> list[dict[str, Any]]:
    """The plates of an image, each with its tiles: ``view``, ``thumbnail``, and ``number, box, grid`` of each tile."""
    return [
        {
            "view": plate.view,
            "thumbnail": plate.thumbnail,
            "tiles": [{"number": i, "box": layout[i][0], "grid": layout[i][1]} for i in plate.tiles],
        }
        for plate in plates([box for box, _ in layout], size)
    ]


def kept_bits(kept: Sequence[int], grid: Sequence[int]) -> str:
    """A set of kept patches as hexadecimal digits, four patches each, the first patch in the highest bit."""
    alive = set(kept)
    count = grid[0] * grid[1]
    bits = "".join("1" if i in alive else "0" for i in range(count)).ljust(-(-count // 4) * 4, "0")
    return "".join(f"{int(bits[i : i + 4], 2):x}" for i in range(0, len(bits), 4))
