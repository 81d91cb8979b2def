"""One image under one policy, layer by layer: which patches each layer still computes, and what the model then says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from vlm_prune import Receipt, pruned
from vlm_prune.call.survivors import Grids, Units
from vlm_prune.contract.stages import Stages
from vlm_prune.eval.measure import model_inputs, prompt_text, receipt_of
from vlm_prune.eval.models import MODELS, exit_gates
from vlm_prune.eval.report.overlay import Box, data_uri, outline, outside, plates, veil
from vlm_prune.eval.report.page import render
from vlm_prune.eval.runs.folder import write_whole
from vlm_prune.eval.runs.tiles import Tiles, boxes_of_grids

LONGEST = 1600
"""Side in pixels of the picture in a page, which is shown as wide as that."""


@dataclass(frozen=True)
class Stage:
    """Layers in a row that computed the same patches.

    Attributes:
        where: such as "vision tower, layers 0-2".
        units: per tile, the raster numbers of these patches.
        boxes: the part of the image that each tile shows.
        grids: rows and columns of each tile's patches before pruning.
    """

    where: str
    units: Units
    boxes: list[Box]
    grids: Grids

    @property
    def total(self) -> int:
        """Patches of all tiles before pruning."""
        return sum(rows * columns for rows, columns in self.grids)

    @property
    def count(self) -> int:
        """Patches of all tiles."""
        return sum(map(len, self.units))


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        before: the unpruned model's answer, ``after`` the pruned one's.
        remarks: what the pictures do not show by themselves.
    """

    image: Image.Image
    prompt: str
    model: str
    receipt: Receipt
    stages: list[Stage]
    before: str
    after: str
    remarks: list[str]

    @property
    def title(self) -> str:
        """The policy, and how much it keeps."""
        last = self.stages[-1]
        return f"{self.receipt.policy} on {self.model}: {last.count} of {last.total} patches"


def own_settings(policy: str, model: str) -> dict[str, Any]:
    """What a policy needs and a shipped model brings along: exit gates for DyVTE."""
    names = policy.split("+")
    if "dyvte" not in names or model not in MODELS:
        return {}
    gates = {"gates": str(exit_gates(model))}
    return gates if len(names) == 1 else {"dyvte": gates}


@torch.no_grad()
def inspect(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    prompt: str,
    policy: str = "flowcut",
    options: Mapping[str, Any] = MappingProxyType({}),
    *,
    name: str = "",
    max_new_tokens: int = 64,
) -> Inspection:
    """Ask an unpruned ``model`` about one image, without and with a policy; it is unpruned again afterwards.

    ``options`` are those of `prune`: a budget, and settings of the policy. ``name`` is what to call the model.
    """
    inputs = model_inputs(processor, [image], [prompt_text(processor, prompt)], ["to inspect"]).to(
        model.device, model.dtype
    )

    def ask() -> str:
        new = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        text: str = processor.batch_decode(new[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[
            0
        ]
        return text.strip()

    before = ask()
    with pruned(model, policy, **options):
        after, receipt = ask(), receipt_of(model)
        acts = model.pruning.acts
    return Inspection(
        image=image,
        prompt=prompt,
        model=name or type(model).__name__,
        receipt=receipt,
        stages=stages(receipt, Tiles(processor).boxes(image.size), image.size),
        before=before,
        after=after,
        remarks=remarks(receipt, acts),
    )


def stages(receipt: Receipt, boxes: Sequence[Sequence[int]], size: tuple[int, int]) -> list[Stage]:
    """The layers of tower and language model, those that computed the same patches taken together.

    ``boxes`` are the parts of the image, ``size`` (width, height), that the tower's tiles show.
    """
    tower: list[Box] = [(box[0], box[1], box[2], box[3]) for box in boxes]
    decoder: list[Box] = [
        (b[0], b[1], b[2], b[3]) for b in boxes_of_grids(list(map(list, boxes)), receipt.grids, size)
    ]
    found = []
    for part, layers, places, grids in (
        ("vision tower", receipt.tower_units, tower, receipt.tower_grids),
        ("language model", receipt.decoder_units, decoder, receipt.grids),
    ):
        for units, group in groupby(enumerate(layers), key=lambda pair: pair[1]):
            numbers = [number for number, _ in group]
            found.append(Stage(f"{part}, {_layers(numbers)}", units, places, grids))
    return found


def _layers(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    return f"layers {numbers[0]}–{numbers[-1]}"  # noqa: RUF001


def remarks(receipt: Receipt, acts: Stages) -> list[str]:
    """What is to be known beside the pictures. ``acts`` are the stages that the policies act in."""
    found = []
    if not acts.prunes:
        edited = " and ".join(["attention"] * acts.edits + ["logits"] * acts.guides) or "nothing"
        found.append(f"{receipt.policy} edits {edited} and drops nothing: every layer computes every patch.")
    elif acts.edits:
        found.append("Attention is edited as well, which a picture of kept patches does not show.")
    if acts.prunes and acts.guides:
        found.append("Logits are edited as well, which a picture of kept patches does not show.")
    if receipt.tower_units and len(receipt.tower_units[0][0]) < receipt.units:
        found.append(
            "The tower is shown a smaller image from the start: a patch that is kept stands in the middle of the "
            "area that its token covers."
        )
    if any(keep.rows is not None for keep in receipt.keeps or ()):
        found.append("Dropped patches are not all lost: some are merged into kept ones.")
    if acts.evicts:
        found.append("Rows leave the KV cache as well, after the prompt or while the answer is written.")
    return found


def write_page(found: Inspection, out: Path) -> Path:
    """The inspection as one self-contained HTML file."""
    size = found.image.size
    drawn = [plate for stage in found.stages for plate in plates(stage.boxes, size)]
    views = [plate.view for plate in drawn]
    stages: list[dict[str, Any]] = [
        {"where": s.where, "count": s.count, "total": s.total, "plates": _plates(s, size)}
        for s in found.stages
    ]
    page = {
        "title": found.title,
        "found": found,
        "dropped": any(stage.count < stage.total for stage in found.stages),
        "cropped": any(plate["unseen"] for stage in stages for plate in stage["plates"]),
        "padded": any(view != (0, 0, *size) for view in views),
        "tiled": any(len(plate.tiles) > 1 for plate in drawn),
        "hatch": f"{max(size) / 90:.6g}",
        "width": found.image.width,
        "height": found.image.height,
        "source": data_uri(found.image, LONGEST),
        "stages": stages,
        "receipt": str(found.receipt),
    }
    write_whole(out, render("inspect.html", page))
    return out


def _plates(stage: Stage, size: tuple[int, int]) -> list[dict[str, Any]]:
    """What the template draws of a stage: for each copy of the image its paths."""
    drawn: list[dict[str, Any]] = []
    whole = (0.0, 0.0, float(size[0]), float(size[1]))
    for plate in plates(stage.boxes, size):
        left, top, right, bottom = plate.view
        boxes = [stage.boxes[i] for i in plate.tiles]
        veils = (veil(stage.boxes[i], stage.grids[i], stage.units[i]) for i in plate.tiles)
        drawn.append(
            {
                "view": f"{left:.6g} {top:.6g} {right - left:.6g} {bottom - top:.6g}",
                "edge": outline(plate.view),
                "unseen": outside(boxes, plate.view),
                "seams": "".join(map(outline, boxes)) if len(boxes) > 1 else "",
                "veil": "".join(veils),
                "thumbnail": plate.thumbnail,
                # widths in proportion to shapes make plates that stand side by side equally high
                "share": f"{(0.3 if plate.thumbnail else 1) * (right - left) / (bottom - top):.4g}",
                "beyond": outline(plate.view) + outline(whole) if plate.view != whole else "",
            }
        )
    return drawn
