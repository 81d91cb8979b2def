"""Asking a pruned model: prompts in batches of similar length, a record for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature

from vlm_prune.call.receipt import Receipt
from vlm_prune.eval.measure import model_inputs, prompt_text, receipt_of
from vlm_prune.eval.runs.folder import Record
from vlm_prune.eval.runs.models import Loaded
from vlm_prune.eval.runs.samples import Sample
from vlm_prune.eval.runs.tiles import Box, boxes_of_grids


def batches(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Batches: prompts of one split, with images of one size and similar lengths, so that there is little padding.

    They depend on the samples and ``size`` alone, not on what is finished already or how many processes share the
    work: so a sample meets the same neighbours, hence the same rounding, in every start of a run.
    """
    for _, group in groupby(samples, key=lambda sample: sample.split):
        order = sorted(group, key=lambda sample: (sample.picture.size, len(sample.question)))
        yield from (order[start : start + size] for start in range(0, len(order), size))


@torch.no_grad()
def ask(loaded: Loaded, batch: Sequence[Sample], max_new_tokens: int, folder: Path) -> list[Record]:
    """Greedy answers of a pruned model, as records without scores."""
    processor = loaded.processor
    inputs = inputs_of(loaded, batch, padding=True, padding_side="left")
    output = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    new = output[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(new, skip_special_tokens=True)
    seen = tiles_of(loaded, batch, receipt_of(loaded.model))
    return [
        record(sample, tiles, folder) | {"answer": text.strip()}
        for sample, text, tiles in zip(batch, texts, seen, strict=True)
    ]


def inputs_of(loaded: Loaded, batch: Sequence[Sample], **options: Any) -> BatchFeature:
    """What the model takes for a batch; ``options`` are the processor's."""
    return model_inputs(
        loaded.processor,
        [sample.picture.load() for sample in batch],
        [prompt_text(loaded.processor, sample.question) for sample in batch],
        [sample.picture.named for sample in batch],
        **options,
    ).to(loaded.model.device, loaded.model.dtype)


def record(sample: Sample, tiles: list[Record], folder: Path) -> Record:
    """The part of a sample's record that does not depend on its answer."""
    units = [tile["grid"][0] * tile["grid"][1] for tile in tiles]
    kept = [
        every if tile["kept"] is None else len(tile["kept"]) for every, tile in zip(units, tiles, strict=True)
    ]
    picture = sample.picture
    return {
        "id": sample.id,
        "split": sample.split,
        "image": {"path": picture.keep(folder), "size": list(picture.size), "id": picture.name},
        "question": sample.question,
        "label": sample.label,
        "answer": "",
        "tiles": tiles,
        "tokens": sum(kept),
        "visual_tokens": sum(units),
        "scores": {},
    }


def tiles_of(loaded: Loaded, batch: Sequence[Sample], receipt: Receipt) -> list[list[Record]]:
    """For each sample, the tiles of the vision tower and the tokens kept of them."""
    kept = receipt.kept
    last = receipt.decoder_units[-1] if receipt.decoder_tokens else kept
    seen = list(zip(receipt.grids, kept, last, strict=True))
    at, found = 0, []
    for sample in batch:
        size = sample.picture.size
        boxes = boxes_of_grids(loaded.tiles.boxes(size), receipt.grids[at:], size)
        found.append([_tile(box, *one) for box, one in zip(boxes, seen[at:], strict=False)])
        at += len(boxes)
    if at != len(seen):
        raise RuntimeError(f"{len(batch)} images are cut into {at} tiles, but the model reports {len(seen)}")
    return found


def _tile(box: Box, grid: tuple[int, int], kept: list[int], last: list[int]) -> Record:
    return {
        "box": box,
        "grid": list(grid),
        "kept": None if len(kept) == grid[0] * grid[1] else kept,
        "last": None if last == kept else last,
    }
