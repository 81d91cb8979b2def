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

from tests.arranged import ArrangedPrompt
from tests.models import IMAGE, Prompt
from tests.packed import PackedPrompt
from tests.reference_packed import PackedKept, PackedShort, packed_choose, packed_shorten
from vlm_prune.adapters.versions import consumed_layers
from vlm_prune.encode.fixed import content_key
from vlm_prune.policies.baselines import random_ranking, uniform_index


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

    @classmethod
    def padded(cls, embeds: list[torch.Tensor], places: list[torch.Tensor], rows: list[list[int]]) -> Short:
        """From each prompt's embeddings, positions and live rows, padded on the left to a batch."""
        length = max(map(len, rows))

        def pad(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x.new_zeros(length - len(x), *x.shape[1:]), x])

        masks = [torch.ones(len(row), dtype=torch.long) for row in rows]
        return cls(*(torch.stack([pad(x) for x in part]) for part in (embeds, masks, places)), rows)


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
    return Short.padded(embeds, places, rows)


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
    model: nn.Module, prompt: Any, policy: str, positions: str | None = None
) -> tuple[Kept, Short] | tuple[PackedKept, PackedShort]:
    """What ``prune(model, policy, positions=positions, **budget(policy))`` has to keep, and to compute with."""
    if isinstance(prompt, PackedPrompt):
        kept = packed_choose(model, prompt, policy, RATIO)
        return kept, packed_shorten(model, prompt, kept)
    positions = positions or "compact"
    if isinstance(prompt, ArrangedPrompt):
        from tests.reference_arranged import arranged_choose, arranged_shorten

        kept = arranged_choose(model, prompt, policy, RATIO)
        return kept, arranged_shorten(model, prompt, kept, positions)
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
    alive, features = flowcut_tower(model, tile, target, _parts(model)[2])
    return alive, _live(model, features, alive)


def flowcut_tower(
    model: nn.Module, tile: torch.Tensor, target: int, merge: int
) -> tuple[list[int], torch.Tensor]:
    """The kept units, squares of ``merge`` patches, and the consumed features of all patches; zeros if dropped."""
    layers, consumed, _ = _parts(model)
    front, last = _front(model), max(consumed)
    entering, others, named = _entering(model, tile)
    side, group = int((entering.shape[1] - front) ** 0.5), merge * merge
    cells = torch.arange(side * side).view(side // merge, merge, side // merge, merge).transpose(1, 2)
    cells = cells.reshape(-1, group)
    # self-attention does not mind the order of its tokens, so let the patches of a unit stand together from the start
    hidden = torch.cat([entering[:, :front], entering[:, front:][:, cells.flatten()]], 1)
    alive, flow, seen = list(range(len(cells))), None, {}

    def full() -> torch.Tensor:
        x = hidden.new_zeros(1, front + side * side, hidden.shape[2])
        x[:, :front] = hidden[:, :front]
        x[:, front + cells[alive].flatten()] = hidden[:, front:]
        return x

    for number, layer in enumerate(layers[: last + 1]):
        before, hidden = hidden, _first(layer(hidden, *others, **named))
        if len(alive) != target and number != last:
            attention, score = (x.view(-1, group).sum(-1) for x in _scores(layer, before, front))
            flow = score if flow is None else (flow + score) / 2
            remaining = last - 1 - number
            drop = len(alive) - target if remaining % 2 == 0 else 0
            if remaining and drop:
                share = attention / attention.sum()
                evenness = float(-(share * share.log()).sum().detach()) / float(
                    torch.tensor(float(len(alive))).log()
                )
                drop = round(drop / remaining**0.5 * (1 - evenness**2))
            if drop:
                best = flow.topk(max(len(alive) - drop, target)).indices.sort().values
                patches = hidden[:, front:].unflatten(1, (-1, group))[:, best].flatten(1, 2)
                hidden, flow = torch.cat([hidden[:, :front], patches], 1), flow[best]
                alive = [alive[int(i)] for i in best]
        if number in consumed:
            seen[number] = full()
    return alive, torch.cat([seen[number] for number in consumed], -1)


def flow_scores(model: nn.Module, tile: torch.Tensor) -> torch.Tensor:
    """FlowCut's score of every patch of one tile, ``(patches,)``, averaged over the layers while nothing is cut."""
    layers, consumed, _ = _parts(model)
    hidden, others, named = _entering(model, tile)
    flow = None
    for layer in layers[: max(consumed)]:
        score = _scores(layer, hidden, _front(model))[1]
        flow = score if flow is None else (flow + score) / 2
        hidden = _first(layer(hidden, *others, **named))
    return flow


POLICIES = {"flowcut": flowcut, "random": random, "uniform": uniform, "none": none}
"""Policy -> the kept units of one tile and their projected features. Adding a policy to the tests is one row."""


def _entering(model: nn.Module, tile: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """What the first vision layer is called with: hidden states, further arguments, named ones."""
    calls: list[Any] = []
    handle = _parts(model)[0][0].register_forward_pre_hook(
        lambda _, *call: calls.append(call), with_kwargs=True
    )
    model.model.vision_tower(tile[None])
    handle.remove()
    (hidden, *others), named = calls[0]
    return hidden, tuple(others), named


def _scores(layer: nn.Module, hidden: torch.Tensor, front: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of CLS (or of the mean query) to each patch, and FlowCut's score, as eager code has them."""
    attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
    normed = (layer.layer_norm1 if hasattr(layer, "layer_norm1") else layer.layernorm_before)(hidden)[0]
    heads = attention.num_heads
    query, key, value = (
        getattr(attention, f"{name}_proj")(normed).unflatten(1, (heads, -1)).transpose(0, 1) for name in "qkv"
    )
    asking = query[:, :1] if front else query.mean(1, keepdim=True)
    attended = (asking @ key.mT * query.shape[-1] ** -0.5).softmax(-1)[:, 0].mean(0)[front:]
    magnitude = value.mean(0)[front:].abs().sum(-1)
    if not front:
        return attended, attended * magnitude
    similar = (value[:, :1] @ value.mT).softmax(-1)[:, 0].mean(0)[1:]
    return attended, (attended / attended.sum() + similar / similar.sum()) * magnitude


def _parts(model: nn.Module) -> tuple[list[nn.Module], tuple[int, ...], int]:
    """The vision layers, the numbers of the consumed ones, and the side of a unit in patches."""
    config = model.config
    layers = next(list(m) for m in model.model.vision_tower.modules() if isinstance(m, nn.ModuleList))
    merge, setting = round(1 / getattr(config, "downsample_ratio", 1)), consumed_layers(config)
    settings = [setting] if isinstance(setting, int) else setting
    return layers, tuple(range(len(layers) + 1)[s] - 1 for s in settings), merge


def _tower(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Hidden states after the consumed layers, side by side."""
    layers, consumed, _ = _parts(model)
    leaving: dict[int, torch.Tensor] = {}
    handles = [
        layers[n].register_forward_hook(lambda _, args, output, n=n: leaving.update({n: _first(output)}))
        for n in consumed
    ]
    model.model.vision_tower(pixels)
    for handle in handles:
        handle.remove()
    return torch.cat([leaving[n] for n in consumed], -1)


def _pick(model: nn.Module, tile: torch.Tensor, units: Iterable[int]) -> tuple[list[int], torch.Tensor]:
    return list(units), _live(model, _tower(model, tile[None]), list(units))


def _live(model: nn.Module, hidden: torch.Tensor, units: list[int]) -> torch.Tensor:
    """The chosen tokens of the language model, from hidden states of all patches."""
    cls = _cls(model)
    return _project(model, hidden)[0][[*range(cls), *(u + cls for u in units)]]


def _project(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """From hidden states of all patches to tokens of the language model."""
    features = hidden[:, _front(model) - _cls(model) :]
    if hasattr(model.model, "pixel_shuffle"):
        side = int(features.shape[1] ** 0.5)
        features = model.model.pixel_shuffle(features.view(len(features), side, side, -1))
        features = features.flatten(1, 2)
    return model.model.multi_modal_projector(features)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _front(model: nn.Module) -> int:
    """Tokens in front of the patches: CLS, or none."""
    return int("siglip" not in model.config.vision_config.model_type)


def _cls(model: nn.Module) -> int:
    return int(getattr(model.config, "vision_feature_select_strategy", "") == "full") * _front(model)


def _placeholders(model: nn.Module) -> int:
    return _units(model) + _cls(model)


def _units(model: nn.Module) -> int:
    vision = model.config.vision_config
    size, patch = (x if isinstance(x, int) else x[0] for x in (vision.image_size, vision.patch_size))
    return (size // patch // _parts(model)[2]) ** 2
