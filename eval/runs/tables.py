"""Rows of data sets: JSON lines, Hugging Face data sets on disk or on the hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vlm_prune.eval.choice import LETTERS
from vlm_prune.eval.pope_questions import SPLITS
from vlm_prune.eval.records import read_records
from vlm_prune.eval.runs.images import Picture
from vlm_prune.eval.runs.sources import Columns, DiskData, HubData, JsonlData

USUAL = {
    "id": ("question_id", "questionId", "id", "index"),
    "image": ("image", "image_path", "image_id", "file_name", "image_source"),
    "question": ("question", "text", "query"),
    "answer": ("label", "answer", "answers"),
    "objects": ("objects",),
    "split": ("category", "split"),
}
"""Usual names of each column."""


@dataclass(frozen=True)
class Row:
    """A row, read by the names of `Columns`."""

    values: dict[str, Any]
    columns: Columns
    images: Path | None
    number: int
    split: str
    where: str
    again: Callable[[], dict[str, Any]]

    def get(self, what: str) -> Any:
        """The value of a column, ``None`` if the row has none."""
        given = getattr(self.columns, what)
        if given is not None and given not in self.values:
            raise ValueError(
                f"{self.where}: no column {given!r} ({what}); there are {', '.join(map(str, self.values))}"
            )
        names = (given,) if given is not None else USUAL[what]
        return next((self.values[name] for name in names if self.values.get(name) is not None), None)

    def need(self, what: str, kind: type) -> Any:
        """The value of a column that is required, and has to be of a type."""
        value = self.get(what)
        if not isinstance(value, kind):
            names = " or ".join(USUAL[what])
            raise ValueError(
                f"{self.where}: {what} is {str(value)[:80]!r}, {kind.__name__} is needed; it is looked for under "
                f"{getattr(self.columns, what) or names} (columns: {{{what}: ...}} names another)"
            )
        return value

    @property
    def id(self) -> str:
        """Its id, or its number, from 1."""
        value = self.get("id")
        return str(self.number if value is None else value)

    def picture(self) -> Picture:
        """Its image."""
        bare = replace(self, values={})  # the bytes are read again when they are needed, not kept
        return Picture.of(
            self.get("image"),
            self.images,
            self.where,
            again=lambda: replace(bare, values=bare.again()).get("image")["bytes"],
        )

    def answers(self) -> list[str]:
        """The accepted answers: one, several, or VQAv2's list of mappings."""
        value = self.get("answer")
        listed = value if isinstance(value, list) else [value]
        found = [one.get("answer") if isinstance(one, dict) else one for one in listed]
        if not found or any(one is None or isinstance(one, list) for one in found):
            raise ValueError(f"{self.where}: an answer or a list of them is needed, got {str(value)[:80]!r}")
        return [str(one) for one in found]

    def options(self) -> list[str]:
        """The options of a multiple choice: columns A, B, C ... as MMBench has them, or a list in ``options``."""
        listed = self.values.get("options", self.values.get("choices"))
        if not isinstance(listed, list):
            listed = [self.values.get(letter) for letter in LETTERS]
        found = [str(one) for one in listed if one is not None and str(one).lower() not in ("", "nan")]
        if not 2 <= len(found) <= len(LETTERS):
            raise ValueError(
                f"{self.where}: {len(found)} options; columns A, B, ... or a list in the column options are needed"
            )
        return found

    def hint(self) -> str:
        """The hint before a multiple-choice question, or an empty string."""
        value = self.values.get("hint")
        return "" if value is None or str(value).lower() == "nan" else str(value)


def table_rows(data: JsonlData | DiskData | HubData) -> Iterator[Row]:
    """The rows of a table, at most ``limit`` of each split."""
    seen: Counter[str] = Counter()
    for split, name, rows in _parts(data):
        for number, values in enumerate(rows, 1):
            where = f"{name}, row {number}"
            row = Row(
                values, data.columns, data.images, number, split, where, partial(_row, rows, number - 1)
            )
            within = split or str(row.get("split") or "")
            seen[within] += 1
            if data.limit is None or seen[within] <= data.limit:
                yield replace(row, split=within)


def _row(rows: Any, number: int) -> dict[str, Any]:
    row: dict[str, Any] = rows[number]
    return row


def _parts(data: JsonlData | DiskData | HubData) -> Iterator[tuple[str, str, Iterable[dict[str, Any]]]]:
    """Split, what to call it, and rows."""
    if isinstance(data, JsonlData):
        named = [next((split for split in SPLITS if split in path.stem), path.stem) for path in data.jsonl]
        if len(set(named)) < len(named):
            raise ValueError(
                f"{', '.join(map(str, data.jsonl))}: two files would be the same split, rename one"
            )
        for split, path in zip(named, data.jsonl, strict=True):
            yield split if len(named) > 1 else "", str(path), read_records(path)
    else:
        name = str(data.disk) if isinstance(data, DiskData) else data.hub
        yield "", name, _undecoded(_disk(data) if isinstance(data, DiskData) else _hub(data))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "data sets on disk and on the hub need the package datasets: in a clone, pip install '.[eval]'"
        ) from error
    return datasets


def _disk(data: DiskData) -> Any:
    if not data.disk.is_dir():
        raise ValueError(f"{data.disk} is no folder; one that datasets' save_to_disk wrote is needed")
    try:
        found = _datasets().load_from_disk(str(data.disk))
    except FileNotFoundError as error:
        raise ValueError(f"{data.disk} was not written by datasets' save_to_disk") from error
    if isinstance(found, dict):
        names = list(found)
        if data.split is None and len(names) > 1:
            raise ValueError(f"{data.disk} has the splits {', '.join(names)}: name one with split:")
        split = names[0] if data.split is None else data.split
        if split not in found:
            raise ValueError(f"{data.disk} has no split {split!r}; it has {', '.join(names)}")
        return found[split]
    return found


def _hub(data: HubData) -> Any:
    try:
        return _datasets().load_dataset(data.hub, data.config, split=data.split, revision=data.revision)
    except Exception as error:  # anything that hub, network and cache may raise
        raise ValueError(
            f"the data set {data.hub} could not be loaded ({type(error).__name__}: {error}). Check its name, config "
            "and split; without a network, download it first or use save_to_disk and disk:"
        ) from error


def _undecoded(table: Any) -> Iterable[dict[str, Any]]:
    """Rows in which images are still bytes or paths: most of them are opened much later."""
    images = _datasets().Image
    for name, feature in table.features.items():
        if isinstance(feature, images):
            table = table.cast_column(name, images(decode=False))
    rows: Iterable[dict[str, Any]] = table
    return rows
