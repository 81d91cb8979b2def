"""What pruning has to give, computed the slow and obvious way with the unpruned stock model.

`choose` keeps tokens and computes their features one tile at a time, with no hook, no hole and no batch. `shorten`
builds the inputs that the stock decoder would have been given had the dropped tokens never existed.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.models import IMAGE, Prompt
from tests.packed import PackedPrompt
from tests.reference_packed import PackedKept, PackedShort, packed_choose, packed_shorten
from vlm_prune.policies.baselines import random_ranking, uniform_index
from vlm_prune.tower import content_key


@dataclass
class Kept:
    """Kept units and their projected features (CLS in front where the model keeps it), a list entry per tile."""

    units: list[list[int]]
    features: list[torch.Tensor]


def choose(model: nn.Module, prompt: Prompt, policy: str, target: int) -> Kept:
    """Keep ``target`` units of every tile."""
    tiles = prompt.pixels if prompt.pixels is not None else []
    chosen = [POLICIES[policy](model, tile, target) for tile in tiles]
    return Kept([units for units, _ in chosen], [features for _, features in chosen])


@dataclass
class Short:
    """Inputs of the stock decoder without the dropped tokens. ``rows[b]`` are the live positions of prompt ``b``."""

    embeds: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    rows: list[list[int]]

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {"inputs_embeds": self.embeds, "attention_mask": self.mask, "position_ids": self.positions}

    def given(self, model: nn.Module) -> AbstractContextManager[None]:
        """What the decoder needs beside `inputs`: nothing, see `PackedShort.given`."""
        return nullcontext()


def shorten(model: nn.Module, prompt: Prompt, kept: Kept, positions: str) -> Short:
    """The prompt's embeddings without dropped tokens and padding, padded on the left to a batch."""
    table, rows, embeds, places = model.get_input_embeddings(), [], [], []
    for ids, mask, tiles in zip(prompt.ids, prompt.mask.bool(), prompt.tiles, strict=True):
        is_image = ids == IMAGE
        live = mask & ~is_image
        number = (mask.long().cumsum(0) - 1).clamp(min=0)
        embedded, slots = table(ids).clone(), iter(is_image.nonzero()[:, 0].tolist())
        for tile in tiles:
            cls = _cls(model)
            alive = [*range(cls), *(u + cls for u in kept.units[tile])]
            mine = [next(slots) for _ in range(_placeholders(model))]
            chosen = torch.tensor([mine[i] for i in alive])
            live[chosen] = True
            embedded = embedded.index_copy(0, chosen, kept.features[tile])
        rows.append(live.nonzero()[:, 0].tolist())
        embeds.append(embedded[live])
        places.append(number[live] if positions == "original" else torch.arange(int(live.sum())))
    length = max(map(len, rows))

    def pad(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.new_zeros(length - len(x), *x.shape[1:]), x])

    return Short(
        torch.stack([pad(x) for x in embeds]),
        torch.stack([pad(torch.ones(len(row), dtype=torch.long)) for row in rows]),
        torch.stack([pad(x) for x in places]),
        rows,
    )


CASES = [
    ("flowcut", "llava", "compact"),
    ("flowcut", "internvl", "original"),
    ("random", "llava-gqa", "original"),
    ("uniform", "llava-full", "compact"),
    ("flowcut", "qwen2_5_vl", "original"),
    ("random", "qwen2_vl", "original"),
    ("uniform", "qwen3_vl", "original"),
]
"""(policy, family, positions), for tests too slow for all of them: every policy, family and rule once."""

RATIO = 1 / 3
"""The budget of the tests."""


def budget(policy: str) -> dict[str, float]:
    """The budget as `prune` takes it."""
    return {} if policy == "none" else {"ratio": RATIO}


def expect(
    model: nn.Module, prompt: Prompt | PackedPrompt, policy: str, positions: str | None = None
) -> tuple[Kept, Short] | tuple[PackedKept, PackedShort]:
    """What ``prune(model, policy, positions=positions, **budget(policy))`` has to keep, and to compute with."""
    if isinstance(prompt, PackedPrompt):
        kept = packed_choose(model, prompt, policy, RATIO)
        return kept, packed_shorten(model, prompt, kept)
    positions = positions or "compact"
    kept = choose(model, prompt, policy, round(RATIO * _units(model)))
    return kept, shorten(model, prompt, kept, positions)


def none(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """All units."""
    return _pick(model, tile, range(_units(model)))


def uniform(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """An even grid."""
    side = round(_units(model) ** 0.5)
    return _pick(model, tile, uniform_index((side, side), target))


def random(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """Units drawn by lot."""
    lots = random_ranking(content_key(tile[None]), _units(model), seed=0)[0]
    return _pick(model, tile, lots.topk(target).indices.sort().values.tolist())


def flowcut(model: nn.Module, tile: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """FlowCut on one tile, by the paper's loop: the kept units and their projected features."""
    layers, consumed, merge = _parts(model)
    calls: list[Any] = []
    handle = layers[0].register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    _tower(model, tile[None])
    handle.remove()
    (entering, *others), named = calls[0]
    side, group = int((entering.shape[1] - 1) ** 0.5), merge * merge
    cells = torch.arange(side * side).view(side // merge, merge, side // merge, merge).transpose(1, 2)
    cells = cells.reshape(-1, group)
    # self-attention does not mind the order of its tokens, so let the patches of a unit stand together from the start
    hidden = torch.cat([entering[:, :1], entering[:, 1:][:, cells.flatten()]], 1)
    alive, flow = list(range(len(cells))), None
    for number, layer in enumerate(layers[: consumed + 1]):
        before, hidden = hidden, _first(layer(hidden, *others, **named))
        if len(alive) == target or number == consumed:
            continue
        attention, score = (x.view(-1, group).sum(-1) for x in _scores(layer, before))
        flow = score if flow is None else (flow + score) / 2
        remaining = consumed - 1 - number
        if remaining % 2:
            continue
        drop = len(alive) - target
        if remaining:
            share = attention / attention.sum()
            evenness = float(-(share * share.log()).sum().detach()) / float(
                torch.tensor(float(len(alive))).log()
            )
            drop = round(drop / remaining**0.5 * (1 - evenness**2))
        best = flow.topk(max(len(alive) - drop, target)).indices.sort().values
        patches = hidden[:, 1:].unflatten(1, (-1, group))[:, best].flatten(1, 2)
        hidden, flow, alive = torch.cat([hidden[:, :1], patches], 1), flow[best], [alive[i] for i in best]
    alive = [int(i) for i in alive]
    full = hidden.new_zeros(1, 1 + side * side, hidden.shape[2])
    full[:, :1] = hidden[:, :1]
    full[:, 1 + cells[alive].flatten()] = hidden[:, 1:]
    return alive, _live(model, full, alive)


POLICIES = {"flowcut": flowcut, "random": random, "uniform": uniform, "none": none}
"""Policy -> the kept units of one tile and their projected features. Adding a policy to the tests is one row."""


def _scores(layer: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of CLS to each patch, and FlowCut's information score, as an eager model would get them."""
    attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
    normed = (layer.layer_norm1 if hasattr(layer, "layer_norm1") else layer.layernorm_before)(hidden)[0]
    heads = attention.num_heads
    query, key, value = (
        getattr(attention, f"{name}_proj")(normed).unflatten(1, (heads, -1)).transpose(0, 1) for name in "qkv"
    )
    full_map = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    attended = full_map[:, 0].mean(0)[1:]
    similar = (value[:, :1] @ value.mT).softmax(-1)[:, 0].mean(0)[1:]
    magnitude = value.mean(0)[1:].abs().sum(-1)
    return attended, (attended / attended.sum() + similar / similar.sum()) * magnitude


def _parts(model: nn.Module) -> tuple[list[nn.Module], int, int]:
    """The vision layers, the number of the consumed one, and the side of a unit in patches."""
    config = model.config
    layers = next(list(m) for m in model.model.vision_tower.modules() if isinstance(m, nn.ModuleList))
    merge = round(1 / getattr(config, "downsample_ratio", 1))
    return layers, range(len(layers) + 1)[config.vision_feature_layer] - 1, merge


def _tower(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Hidden states behind the consumed layer."""
    layers, consumed, _ = _parts(model)
    leaving: list[Any] = []
    handle = layers[consumed].register_forward_hook(lambda _, args, output: leaving.append(_first(output)))
    model.model.vision_tower(pixels)
    handle.remove()
    return leaving[0]


def _pick(model: nn.Module, tile: torch.Tensor, units: Iterable[int]) -> tuple[list[int], torch.Tensor]:
    return list(units), _live(model, _tower(model, tile[None]), list(units))


def _live(model: nn.Module, hidden: torch.Tensor, units: list[int]) -> torch.Tensor:
    """The chosen tokens of the language model, from hidden states of all patches."""
    cls = _cls(model)
    return _project(model, hidden)[0][[*range(cls), *(u + cls for u in units)]]


def _project(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """From hidden states of all patches to tokens of the language model."""
    features = hidden[:, 1 - _cls(model) :]
    if hasattr(model.model, "pixel_shuffle"):
        side = int(features.shape[1] ** 0.5)
        features = model.model.pixel_shuffle(features.view(len(features), side, side, -1))
        features = features.flatten(1, 2)
    return model.model.multi_modal_projector(features)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _cls(model: nn.Module) -> int:
    return int(model.config.vision_feature_select_strategy == "full")


def _placeholders(model: nn.Module) -> int:
    return int(model.config.image_seq_length)


def _units(model: nn.Module) -> int:
    return _placeholders(model) - _cls(model)
