"""`tests.reference` for towers of packed images: one frame at a time through stock modules, no hook, no hole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.packed import IMAGE, MERGE, VIDEO, PackedPrompt, Visual
from vlm_prune.encode.stage import content_key
from vlm_prune.policies.baselines import random_ranking, uniform_index

GROUP = MERGE * MERGE


@dataclass
class PackedKept:
    """Of each tile: the kept units, their features, and the features for the decoder's first layers."""

    units: list[list[int]]
    features: list[torch.Tensor]
    deepstack: list[list[torch.Tensor]]


@dataclass
class PackedShort:
    """Inputs of the stock decoder without the dropped tokens. ``rows[b]`` are the live positions of prompt ``b``."""

    embeds: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    rows: list[list[int]]
    visual: torch.Tensor
    deepstack: list[torch.Tensor]

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {"inputs_embeds": self.embeds, "attention_mask": self.mask, "position_ids": self.positions}

    @contextmanager
    def given(self, model: nn.Module) -> Iterator[None]:
        """Hands the features for its first layers to the stock decoder, which ``inputs_embeds`` cannot carry."""
        if not self.deepstack:
            yield
            return

        def hand(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            repeats, length = divmod(len(kwargs["inputs_embeds"]), len(self.embeds))[0], self.embeds.shape[1]
            if kwargs["inputs_embeds"].shape[1] != length:
                return None
            visual = self.visual.repeat_interleave(repeats, 0)
            features = []
            for rows in self.deepstack:
                full = rows.new_zeros(*self.visual.shape, rows.shape[1])
                full[self.visual] = rows
                features.append(full.repeat_interleave(repeats, 0)[visual])
            return args, {**kwargs, "visual_pos_masks": visual, "deepstack_visual_embeds": features}

        handle = model.model.language_model.register_forward_pre_hook(hand, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def packed_choose(model: nn.Module, prompt: PackedPrompt, policy: str, ratio: float) -> PackedKept:
    """Keep a share of the units of every tile."""
    chosen = []
    for tile in prompt.shown:
        rows, columns = tile.units
        target = rows * columns if policy == "none" else max(1, round(ratio * rows * columns))
        chosen.append(PACKED_POLICIES[policy](model, tile, target))
    return PackedKept(*(list(x) for x in zip(*chosen, strict=True))) if chosen else PackedKept([], [], [])


def packed_shorten(model: nn.Module, prompt: PackedPrompt, kept: PackedKept) -> PackedShort:
    """The prompt's embeddings without dropped tokens and padding, padded on the left to a batch."""
    inputs, length = prompt.inputs, prompt.ids.shape[1]
    embeds = model.get_input_embeddings()(prompt.ids).clone()
    is_visual = (prompt.ids == IMAGE) | (prompt.ids == VIDEO)
    live = prompt.mask.bool() & ~is_visual
    text = (prompt.mask.cumsum(-1) - 1).clamp(min=0)
    if prompt.media:
        grids = {name: x for name, x in inputs.items() if name.endswith("grid_thw")}
        places, _ = model.model.get_rope_index(
            prompt.ids, inputs["mm_token_type_ids"], attention_mask=prompt.mask, **grids
        )
    else:
        places = text.expand(3, -1, -1)
    number, deep = 0, []
    for b, visuals in enumerate(prompt.visuals):
        slots = iter(is_visual[b].nonzero()[:, 0].tolist())
        for tile in (tile for v in visuals for tile in v.tiles):
            mine = [next(slots) for _ in range(tile.units[0] * tile.units[1])]
            chosen = torch.tensor([mine[i] for i in kept.units[number]], dtype=torch.long)
            live[b, chosen] = True
            embeds[b] = embeds[b].index_copy(0, chosen, kept.features[number])
            deep.append(kept.deepstack[number])
            number += 1
    rows = [row.nonzero()[:, 0].tolist() for row in live]
    width = max(map(len, rows))
    order = torch.tensor([[*[-1] * (width - len(row)), *row] for row in rows])
    there, index = order >= 0, order.clamp(min=0)
    batch = torch.arange(len(rows))[:, None]
    positions = torch.cat([text[None], places]).gather(-1, index.expand(4, -1, -1)).masked_fill(~there, 0)
    assert length == embeds.shape[1]
    return PackedShort(
        embeds[batch, index].masked_fill(~there[..., None], 0),
        there.long(),
        positions,
        rows,
        is_visual[batch, index] & there,
        [torch.cat(layer) for layer in zip(*deep, strict=True)] if deep and deep[0] else [],
    )


# --- policies ---

Chosen = tuple[list[int], torch.Tensor, list[torch.Tensor]]


def none(model: nn.Module, tile: Visual, target: int) -> Chosen:
    """All units."""
    return _pick(model, tile, range(target))


def uniform(model: nn.Module, tile: Visual, target: int) -> Chosen:
    """An even grid."""
    return _pick(model, tile, uniform_index(tile.units, target))


def random(model: nn.Module, tile: Visual, target: int) -> Chosen:
    """Units drawn by lot."""
    lots = random_ranking(content_key(tile.patches[None]), tile.units[0] * tile.units[1], seed=0)[0]
    return _pick(model, tile, lots.topk(target).indices.sort().values.tolist())


def _pick(model: nn.Module, tile: Visual, units: Iterable[int]) -> Chosen:
    output = model.model.visual(tile.patches, grid_thw=torch.tensor([tile.size]))
    units = list(units)
    return (
        units,
        output.pooler_output[units],
        [x[units] for x in getattr(output, "deepstack_features", None) or []],
    )


def flowcut(model: nn.Module, tile: Visual, target: int) -> Chosen:
    """FlowCut on one frame, by the paper's loop, the mean query in the place of CLS."""
    tower = model.model.visual
    calls: list[Any] = []
    handle = tower.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True
    )
    tower(tile.patches, grid_thw=torch.tensor([tile.size]))
    handle.remove()
    hidden, named = calls[0]
    cos, sin = named["position_embeddings"]
    raster, window = _windows(model, tile)
    # attention does not mind the order of its tokens: put units in raster order, and remember who sees whom
    back = torch.tensor(sorted(range(len(raster)), key=lambda i: raster[i]))
    patches = (back[:, None] * GROUP + torch.arange(GROUP)).flatten()
    hidden, cos, sin = hidden[patches], cos[patches], sin[patches]
    rooms = torch.tensor([window[i] for i in back.tolist()])
    alive, flow, deep = torch.arange(len(raster)), None, {}
    whole = getattr(tower.config, "fullatt_block_indexes", range(len(tower.blocks)))
    consumed = len(tower.blocks) - 1
    for number, block in enumerate(tower.blocks):
        room = (torch.zeros_like(rooms) if number in whole else rooms)[alive].repeat_interleave(GROUP)
        hidden, query, key, value = _block(block, hidden, cos, sin, room)
        if number < consumed and len(alive) > target:
            attention = (
                (query.mean(1, keepdim=True) @ key.mT * key.shape[-1] ** -0.5).softmax(-1)[:, 0].mean(0)
            )
            score = (attention * value.mean(0).abs().sum(-1)).view(-1, GROUP).sum(-1)
            attention = attention.view(-1, GROUP).sum(-1)
            flow = score if flow is None else (flow + score) / 2
            remaining = consumed - 1 - number
            if remaining % 2 == 0:
                drop = len(alive) - target
                if remaining:
                    evenness = float(-(attention * attention.log()).sum().detach()) / float(
                        torch.tensor(len(alive)).log()
                    )
                    drop = round(drop / remaining**0.5 * (1 - evenness**2))
                best = flow.topk(max(len(alive) - drop, target)).indices.sort().values
                rows = (best[:, None] * GROUP + torch.arange(GROUP)).flatten()
                hidden, cos, sin, flow, alive = hidden[rows], cos[rows], sin[rows], flow[best], alive[best]
        if number in getattr(tower, "deepstack_visual_indexes", ()):
            merged = tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(number)](hidden)
            deep[number] = (alive, merged)
    stacked = [merged[torch.isin(then, alive)] for then, merged in deep.values()]
    return alive.tolist(), tower.merger(hidden), stacked


PACKED_POLICIES = {"flowcut": flowcut, "random": random, "uniform": uniform, "none": none}


def _windows(model: nn.Module, tile: Visual) -> tuple[list[int], list[int]]:
    """Raster number, and number of the window, of each unit in the order in which the tower has them."""
    rows, columns = tile.units
    config = model.model.visual.config
    side = getattr(config, "window_size", 0) // (config.spatial_merge_size * config.patch_size)
    if not side:
        return list(range(rows * columns)), [0] * (rows * columns)
    units = [(r // side, c // side, r, c) for r in range(rows) for c in range(columns)]
    units.sort()
    numbers = sorted({unit[:2] for unit in units})
    return [r * columns + c for _, _, r, c in units], [numbers.index(unit[:2]) for unit in units]


def _block(
    block: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, room: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """A vision block in which patches see those of the same ``room``; and its queries, keys and values."""
    attention = block.attn
    qkv = attention.qkv(block.norm1(hidden)).unflatten(-1, (3, attention.num_heads, -1))
    query, key, value = qkv.permute(1, 2, 0, 3)

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    query, key = turned(query), turned(key)
    seen = room[:, None] == room[None]
    weights = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    hidden = hidden + attention.proj((weights @ value).transpose(0, 1).flatten(1))
    return hidden + block.mlp(block.norm2(hidden)), query, key, value
