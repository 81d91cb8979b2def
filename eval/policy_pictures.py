"""Small pictures for docs/policies.md: what each policy keeps of a scene, or which attention rows and heads it edits.

Every one shows a forward of a shipped test model. What was kept is read off the receipt; edits inside the decoder are
noted by a subclass that hands on what the policy answered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm_prune import pruned, viz
from vlm_prune.call.receipt import Receipt
from vlm_prune.contract.policy import Policy
from vlm_prune.eval.measure import prompt_text, receipt_of
from vlm_prune.eval.models import load_model
from vlm_prune.eval.policy_charts import Drawing, bars, heat, image, pairs, save
from vlm_prune.eval.scenes import make_scenes
from vlm_prune.policies.pooling import pooling_cells, smaller_grid
from vlm_prune.registry import POLICIES, policy_class

MODEL, RATIO, SEED, QUESTION = "tiny-llava", 0.25, 11, "Please describe this image in detail."
SETTINGS: dict[str, dict[str, Any]] = {"dyvte": {"exit_layer": 4}, "var": {"tau": 2.4}}
"""DyVTE needs one of two fields; at the default ``tau`` the test model has no sinks, and VAR nothing to show."""

SLIGHT = 1e-4
"""Relative change below which a row was recomputed, not edited."""


@dataclasses.dataclass
class Seen:
    """What a policy changed inside the decoder, for one sequence.

    Attributes:
        edits: (layer, relative change of each head's output ``(rows, heads)``).
        visual: bool ``(rows,)`` of the prompt.
        lifted: bool per visual token that PAINT lifts, in any layer.
        cached: by layer, the visual tokens that stay in the cache of its first KV head.
        said: probabilities of the next token before and after guiding ``(2, vocabulary)``.
    """

    edits: list[tuple[int, torch.Tensor]] = dataclasses.field(default_factory=list)
    visual: torch.Tensor | None = None
    lifted: torch.Tensor | None = None
    cached: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    said: torch.Tensor | None = None


def watched(policy: Policy, seen: Seen) -> Policy:
    """The same policy, writing what it changes into ``seen``."""
    base: Any = type(policy)

    @dataclasses.dataclass(frozen=True)
    class Watched(base):
        def modulate(self, view: Any) -> Any:
            before = view.output.clone()
            output = super().modulate(view)
            if output is not None:
                moved = (output - before)[0].norm(dim=-1) / before[0].norm(dim=-1).clamp(min=1e-9)
                seen.edits.append((view.layer, moved))
                seen.visual = view.visual[0]
            if "paint_local" in view.carry:
                chosen = (view.carry["paint_local"] + view.carry["paint_summary"])[0] > 0
                seen.lifted = chosen[view.visual[0]]
            return output

        def evict(self, view: Any) -> Any:
            answer = super().evict(view)
            keep = answer[0] if isinstance(answer, tuple) else answer
            first = keep[0] if keep.dim() == 2 else keep[0, 0]
            seen.cached[view.layer] = first[view.visual[0]].nonzero()[:, 0].tolist()
            return answer

        def guide(self, view: Any) -> Any:
            new = super().guide(view)
            seen.said = torch.stack([view.logits[0, -1], new[0, -1]]).softmax(-1)
            return new

    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    watcher: Policy = Watched(**fields)
    return watcher


def draw_all(folder: Path, names: Sequence[str] = tuple(POLICIES)) -> list[Path]:
    """One ``<policy>.png`` each."""
    model, processor = load_model(MODEL)
    scenes = [scene.image for scene in make_scenes(3, SEED, min_names=4)]
    inputs = [
        processor(images=[image], text=[prompt_text(processor, QUESTION)], return_tensors="pt")
        for image in scenes
    ]
    return [draw(name, folder / f"{name}.png", model, processor, inputs) for name in names]


@torch.no_grad()
def draw(name: str, path: Path, model: Any, processor: Any, inputs: Sequence[Any]) -> Path:
    """The picture of one policy; ``inputs`` are those of several scenes, of which diagrams take the first."""
    policy = policy_class(name)(**SETTINGS.get(name, {}))
    acts = policy.acts
    inside = acts.cuts or acts.evicts or acts.edits or acts.guides
    drawings: list[Drawing] = []
    for one in inputs[: 1 if inside else len(inputs)]:
        seen = Seen()
        with pruned(model, watched(policy, seen), **({"ratio": RATIO} if policy.prunes else {})):
            model(**one)
            receipt = receipt_of(model)
        pixels = processor.image_processor
        tile = viz.denormalise(one["pixel_values"], pixels.image_mean, pixels.image_std)[0]
        if acts.edits:
            drawings += modulation(tile, receipt, seen)
        elif acts.guides:
            pass
        elif acts.cuts:
            drawings += cuts(tile, receipt)
        elif acts.evicts:
            drawings += caches(tile, receipt, seen)
        else:
            kept = receipt.kept[0]
            shown = COARSE[name](tile, receipt) if name in COARSE else viz.fade(tile, kept, receipt.grid)
            drawings.append(image(shown, f"{len(kept)} of {receipt.units}"))
        if policy.second_pass == "image":
            noised = policy.distort(one["pixel_values"])
            drawings.append(
                image(viz.denormalise(noised, pixels.image_mean, pixels.image_std)[0], "second pass")
            )
        if seen.said is not None:
            drawings += guided(seen.said, processor.tokenizer)
    if len(set(receipt.tower_tokens)) > 1:
        drawings.append(bars(receipt.tower_tokens, "tokens per vision layer"))
    if len(set(receipt.decoder_tokens)) > 1:
        drawings.append(bars(receipt.decoder_tokens, "rows per decoder layer"))
    return save(drawings, path)


def cuts(tile: viz.Pixels, receipt: Receipt) -> list[Drawing]:
    """What entered the decoder, and what was left after the first and the last cut in it."""
    alive = [units[0] for units in receipt.decoder_units]
    stages = [(f"{len(alive[0])} of {receipt.units} enter", alive[0])]
    for layer, (before, behind) in enumerate(pairwise(alive)):
        if behind != before:
            stages.append((f"{len(behind)} behind layer {layer}", behind))
    shown = stages if len(stages) < 4 else [*stages[:2], stages[-1]]
    return [image(viz.fade(tile, kept, receipt.grid), title) for title, kept in shown]


def caches(tile: viz.Pixels, receipt: Receipt, seen: Seen) -> list[Drawing]:
    """What stays in the first KV head's cache, in the first, the middle and the last layer."""
    layers = sorted(seen.cached)
    return [
        image(viz.fade(tile, seen.cached[layer], receipt.grid), f"{len(seen.cached[layer])} in layer {layer}")
        for layer in (layers[0], layers[len(layers) // 2], layers[-1])
    ]


def modulation(tile: viz.Pixels, receipt: Receipt, seen: Seen) -> list[Drawing]:
    """How much each head of the last row changes, and how many heads of which rows."""
    if seen.visual is None:
        raise ValueError("the policy edited nothing, so there is nothing to draw")
    depth, heads = receipt.text_config.num_hidden_layers, receipt.text_config.num_attention_heads
    places = seen.visual.nonzero()[:, 0]
    begin, end = int(places[0]), int(places[-1]) + 1
    strength, share = np.zeros((depth, heads)), np.zeros((depth, 2 + len(seen.visual) - end))
    for layer, moved in seen.edits:
        strength[layer] = moved[-1].numpy()
        edited = (moved > SLIGHT).float().mean(-1)
        share[layer] = [edited[:begin].mean(), edited[begin:end].mean(), *edited[end:]]
    drawings = []
    if seen.lifted is not None:
        chosen = seen.lifted.nonzero()[:, 0].tolist()
        title = f"{len(chosen)} of {receipt.units} lifted"
        drawings.append(image(viz.fade(tile, chosen, receipt.grid), title))
    names = {0: "text", 1: "image", 2: "next", share.shape[1] - 1: "last"}
    return [
        *drawings,
        heat(strength, "head", "change of the last row"),
        heat(share, "row of the prompt", "share of heads edited", limit=1.0, names=names),
    ]


def guided(said: torch.Tensor, tokenizer: Any) -> list[Drawing]:
    """How likely the six likeliest tokens are before and after guiding."""
    likely = said[0].topk(6).indices
    words = tokenizer.convert_ids_to_tokens(likely.tolist())
    before, after = said[:, likely].tolist()
    return [pairs(before, after, [word.strip("▁Ġ") for word in words], "light: before, dark: guided")]


def _pooled(tile: viz.Pixels, receipt: Receipt) -> viz.Pixels:
    """Each cell of `Pool` in its mean colour."""
    cell = np.array(pooling_cells(receipt.grid, receipt.planned)[0]).reshape(receipt.grid)
    rows, columns = receipt.grid
    down = np.arange(tile.shape[0]) * rows // tile.shape[0]
    right = np.arange(tile.shape[1]) * columns // tile.shape[1]
    number = cell[down][:, right]
    count = np.bincount(number.ravel())
    sums = np.stack([np.bincount(number.ravel(), tile[..., c].ravel()) for c in range(3)], -1)
    return (sums / count[:, None])[number].astype(np.uint8)


def _smaller(tile: viz.Pixels, receipt: Receipt) -> viz.Pixels:
    """The image that `Downsample` shows the tower, its pixels enlarged."""
    rows, columns = smaller_grid(receipt.grid, receipt.planned)
    height, width = tile.shape[0] * rows // receipt.grid[0], tile.shape[1] * columns // receipt.grid[1]
    small = Image.fromarray(tile).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(small.resize((tile.shape[1], tile.shape[0]), Image.Resampling.NEAREST))


COARSE: dict[str, Callable[[viz.Pixels, Receipt], viz.Pixels]] = {"pool": _pooled, "downsample": _smaller}
"""Policies that mix patches instead of choosing some."""
