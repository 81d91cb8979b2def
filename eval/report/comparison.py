"""Where two policies of a run differ: the verdict on each task, and the samples on which their answers part ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_prune.eval.records import choose
from vlm_prune.eval.report.looks import DASHES
from vlm_prune.eval.report.overlay import data_uri, outline, outside, plates, veil
from vlm_prune.eval.report.page import render
from vlm_prune.eval.report.results import Entry, Results, read_results
from vlm_prune.eval.report.samples import label_text, spread, verdict
from vlm_prune.eval.runs.folder import Record, RunFolder, write_whole
from vlm_prune.eval.runs.standings import JUDGED, Pair, Played, judge


@dataclass(frozen=True)
class Meeting:
    """Two policies on one task.

    Attributes:
        pairs: the verdicts, one a figure, of the first policy over the second.
        parted: both records of each sample that they answer differently: those that only the first got right, those
            that only the second did, then the rest.
        n: samples in all.
    """

    model: str
    task: str
    kind: str
    first: Entry
    second: Entry
    pairs: list[Pair]
    parted: list[tuple[Record, Record]]
    n: int


def compare(folder: RunFolder, first: str, second: str, model: str | None = None) -> list[Meeting]:
    """All meetings of two policies, by their labels in the run: on each model and task, at each budget that both had.

    The unpruned model, and a policy without a budget, meet the other one at all of its budgets.

    Raises:
        ValueError: the run has no such policy or model, or the two never met.
    """
    results = read_results(folder)
    for name in (first, second):
        choose("policy", name, results.policies)
    if model is not None:
        choose("model", model, results.models)
    if first == second:
        raise ValueError(f"compare {first!r} with another policy than itself: {', '.join(results.policies)}")
    found = [
        _meet(folder, results, task, one, other)
        for one in results.entries
        for other in results.entries
        if (one.policy, other.policy) == (first, second) and one.model == other.model
        if model in (None, one.model)
        if one.budget == other.budget or any(e.unpruned or not e.has_budget for e in (one, other))
        for task in results.tasks
        if task in one.cells and task in other.cells
    ]
    if not found:
        raise ValueError(
            f"{first} and {second} never met: there is no model, task and budget that both have finished cells of"
        )
    return found


def _meet(folder: RunFolder, results: Results, task: str, one: Entry, other: Entry) -> Meeting:
    rows = {row["cell"]: row for row in results.rows}
    played = [Played.read(folder, rows[entry.cells[task]]) for entry in (one, other)]
    if played[0].ids != played[1].ids:
        raise ValueError(f"{folder.path}: {one.cells[task]} and {other.cells[task]} have different samples")
    kind = results.tasks[task]
    both = zip(*(folder.samples(entry.cells[task]) for entry in (one, other)), strict=True)
    parted = [(a, b) for a, b in both if a["answer"] != b["answer"]]

    def order(pair: tuple[Record, Record]) -> int:
        first, second = (verdict(kind, record["scores"]) for record in pair)
        return {("right", "wrong"): 0, ("wrong", "right"): 1}.get((first, second), 2)

    return Meeting(
        one.model, task, kind, one, other, judge(one.model, task, played), sorted(parted, key=order), len(played[0].ids)
    )  # fmt: skip


def sentence(meeting: Meeting, pair: Pair) -> str:
    """A verdict in words, with all that it rests on; its p-value is of this comparison alone."""
    test = "McNemar's exact test" if pair.test == "McNemar" else "paired bootstrap"
    said = {"beats": "beats", "ties": "ties with", "loses": "loses to"}[pair.verdict]
    figure = next(judged.title for judged in JUDGED[meeting.kind] if judged.name == pair.metric)
    return (
        f"{meeting.first.name} {said} {meeting.second.name} on {figure}: {pair.value:+.3f} [{pair.low:+.3f}, "
        f"{pair.high:+.3f}], better on {pair.wins} and worse on {pair.losses} of {pair.n} samples, p = "
        f"{pair.p:.2g} ({test})"
    )


def write_comparison(folder: RunFolder, meetings: Sequence[Meeting], out: Path, samples: int) -> Path:
    """One self-contained page; of each meeting at most ``samples`` of the samples that part the two are shown."""
    sources: dict[str, str] = {}
    shown = []
    for meeting in meetings:
        some = [meeting.parted[i] for i in spread(len(meeting.parted), samples)]
        shown.append(
            {
                "title": f"{meeting.model}: {meeting.task}, {meeting.first.name} and {meeting.second.name}",
                "verdicts": [sentence(meeting, pair) for pair in meeting.pairs],
                "parted": len(meeting.parted),
                "n": meeting.n,
                "samples": [_sample(folder, meeting, pair, sources) for pair in some],
            }
        )
    names = meetings[0].first.policy, meetings[0].second.policy
    looks = read_results(folder).looks
    page = {
        "title": f"{names[0]} and {names[1]}: where they differ",
        "run": folder.path.resolve().name,
        "meetings": shown,
        "sources": [{"id": f"i{i}", "href": href} for i, href in enumerate(sources.values())],
        "looks": [
            {
                "path": looks[n].path,
                "colour": looks[n].variable,
                "dash": " ".join(map(str, DASHES[looks[n].dash])),
            }
            for n in names
        ],
    }
    write_whole(out, render("compare.html", page))
    return out


def _sample(
    folder: RunFolder, meeting: Meeting, pair: tuple[Record, Record], sources: dict[str, str]
) -> dict[str, Any]:
    record = pair[0]
    path, size = record["image"]["path"], tuple(record["image"]["size"])
    if path not in sources:
        try:
            sources[path] = data_uri(folder.image(record))
        except ValueError:  # the answers can be read without it
            sources[path] = ""
    return {
        "id": record["id"],
        "question": record["question"],
        "label": label_text(record["label"]),
        "image": f"i{list(sources).index(path)}" if sources[path] else "",
        "width": size[0],
        "height": size[1],
        "sides": [
            {
                "name": entry.name,
                "answer": one["answer"],
                "verdict": verdict(meeting.kind, one["scores"]),
                "tokens": f"{one['tokens']} of {one['visual_tokens']} tokens",
                "plates": _plates(one["tiles"], (size[0], size[1])),
            }
            for entry, one in zip((meeting.first, meeting.second), pair, strict=True)
        ],
    }


def _plates(tiles: Sequence[Record], size: tuple[int, int]) -> list[dict[str, Any]]:
    boxes = [tuple(tile["box"]) for tile in tiles]
    drawn = []
    for plate in plates(boxes, size):
        left, top, right, bottom = plate.view
        mine = [tiles[i] for i in plate.tiles]
        drawn.append(
            {
                "view": f"{left:.6g} {top:.6g} {right - left:.6g} {bottom - top:.6g}",
                "edge": outline(plate.view),
                "unseen": outside([boxes[i] for i in plate.tiles], plate.view),
                "veil": "".join(veil(tuple(t["box"]), tuple(t["grid"]), t["kept"]) for t in mine),
                "later": "".join(_later(t) for t in mine),
                "thumbnail": plate.thumbnail,
            }
        )
    return drawn


def _later(tile: Record) -> str:
    """What a policy keeps at first and drops inside the language model."""
    if (last := tile.get("last")) is None:
        return ""
    count = tile["grid"][0] * tile["grid"][1]
    entered = set(range(count)) if tile["kept"] is None else set(tile["kept"])
    shown = set(last) | (set(range(count)) - entered)
    return veil(tuple(tile["box"]), tuple(tile["grid"]), shown)
