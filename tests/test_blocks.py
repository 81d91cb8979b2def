"""Models that make the masks of their decoder themselves: tokens of an image, or of a prompt, look at each other.

The stock model is given what is left, with the token types of what is left, and makes its own masks of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, StaticCache

from tests.models import IMAGE, VOCAB, peaky
from tests.padding import padded
from tests.test_generate import generate
from vlm_prune import PolicyError, prune, pruned
from vlm_prune.policies.baselines import uniform_index
from vlm_prune.versions import CACHE, cache_of

WINDOW, SIDE, PATCH = 7, 24, 4
MIXED = ["sliding_attention", "full_attention"] * 2
HEADS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TEXT = {
    **HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    **HEADS,
    "num_hidden_layers": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
WINDOWS = {"sliding_window": WINDOW, "layer_types": MIXED}


@dataclass(frozen=True)
class Family:
    """How a family is built, how many tokens an image has, and what its token types are called."""

    model_type: str
    text: dict[str, Any]
    others: dict[str, Any]
    tokens: int
    types: str = "token_type_ids"


def _gemma4(**text: Any) -> Family:
    tower = {**HEADS, "num_key_value_heads": 4, "head_dim": 8, "num_hidden_layers": 2, "patch_size": PATCH}
    others = {
        "vision_config": {
            "model_type": "gemma4_vision",
            **tower,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        "audio_config": None,
        "image_token_id": IMAGE,
        "video_token_id": 61,
        "audio_token_id": 58,
        "boi_token_id": 57,
        "eoi_token_id": 56,
    }
    text = {
        "model_type": "gemma4_text",
        **WINDOWS,
        "use_bidirectional_attention": "vision",
        "per_layer_config": {},
        **text,
    }
    return Family("gemma4", text, others, 9, "mm_token_type_ids")


OWN = {"image_token_index": IMAGE, "image_token_id": IMAGE}
FAMILIES = {
    "gemma3": Family(
        "gemma3",
        {"model_type": "gemma3_text", **WINDOWS},
        {
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 9,
            "boi_token_index": 61,
            "eoi_token_index": 62,
            **OWN,
        },
        9,
    ),
    "paligemma": Family(
        "paligemma",
        {"model_type": "gemma"},
        {"vision_config": {**SIGLIP, "projection_dim": 32}, "projection_dim": 32, **OWN},
        36,
    ),
    "gemma4": _gemma4(
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=2
    ),
    "gemma4-plain": _gemma4(hidden_size_per_layer_input=0, num_kv_shared_layers=0),
}
families = pytest.mark.parametrize(
    "family", [f for f, x in FAMILIES.items() if x.model_type in CONFIG_MAPPING]
)
LAYOUTS = {"single": [(3, -1, 5)], "ragged": [(2, -1, 4), (1, -1, 2, -1, 3), (-1, 9)]}


@cache
def shared(family: str) -> nn.Module:
    spec = FAMILIES[family]
    config = CONFIG_MAPPING[spec.model_type](text_config={**TEXT, **spec.text}, **spec.others)
    return peaky(AutoModelForImageTextToText.from_config(config))


def inputs_of(family: str, layout: str) -> dict[str, torch.Tensor]:
    """A batch as a processor returns it."""
    spec, generator, sequences = FAMILIES[family], torch.Generator().manual_seed(1), []
    for row in LAYOUTS[layout]:
        parts = [
            torch.randint(3, 55, (n,), generator=generator).tolist() if n > 0 else [IMAGE] * spec.tokens
            for n in row
        ]
        sequences.append([token for part in parts for token in part])
    ids, mask = padded(sequences, "left", 0)
    images = sum(part < 0 for row in LAYOUTS[layout] for part in row)
    pixels = torch.randn(images, 3, SIDE, SIDE, generator=generator)
    types = torch.zeros_like(ids) if spec.model_type == "paligemma" else (ids == IMAGE).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, spec.types: types}
    if spec.model_type == "gemma4":
        count = SIDE // PATCH
        patches = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1)
        place = torch.cartesian_prod(torch.arange(count), torch.arange(count)).flip(-1)
        inputs["pixel_values"] = patches.reshape(images, count**2, -1)
        inputs["image_position_ids"] = place.expand(images, -1, -1)
    return inputs


def shorten(
    model: nn.Module, family: str, inputs: dict[str, Any], keep: list[int]
) -> tuple[dict[str, Any], list[Any]]:
    """What the stock model has to be given in place of ``inputs``, and the live rows of each sequence."""
    spec, ids, mask = FAMILIES[family], inputs["input_ids"], inputs["attention_mask"]
    media = {name: inputs[name] for name in ("pixel_values", "image_position_ids") if name in inputs}
    features = model.model.get_image_features(**media, return_dict=True).pooler_output
    features = torch.cat(list(features)).view(-1, spec.tokens, 32)
    tiles, text = iter(features), torch.where(ids == IMAGE, 0, ids)
    rows, parts = [], []
    for b, sequence in enumerate(ids):
        live = mask[b].bool() & (sequence != IMAGE)
        embeds = model.get_input_embeddings()(text[b]).clone()
        for mine in (sequence == IMAGE).nonzero()[:, 0].view(-1, spec.tokens):
            live[mine[keep]] = True
            embeds[mine] = next(tiles)
        place = mask[b].cumsum(0) - int(spec.model_type != "paligemma")
        rows.append(live.nonzero()[:, 0].tolist())
        parts.append([x[live] for x in (embeds, mask[b], place, inputs[spec.types][b], text[b])])
    longest = max(map(len, rows))
    joined = [
        torch.stack([torch.cat([x.new_zeros(longest - len(x), *x.shape[1:]), x]) for x in column])
        for column in zip(*parts, strict=True)
    ]
    names = ("inputs_embeds", "attention_mask", "position_ids", spec.types)
    short: dict[str, Any] = dict(zip(names, joined, strict=False))
    if spec.text.get("hidden_size_per_layer_input"):
        short["per_layer_inputs"] = model.model.language_model.get_per_layer_inputs(joined[4], None)
    return short, rows


def greedy(model: nn.Module, short: dict[str, Any], steps: int) -> list[list[int]]:
    """What the stock model says to the shortened prompt, token by token."""
    output, mask, place, said = model(**short), short["attention_mask"], short["position_ids"][:, -1:], []
    for _ in range(steps):
        logits = output.logits[:, -1].clone()
        logits[:, [IMAGE, 61]] = -torch.inf
        said.append(logits.argmax(-1, keepdim=True))
        mask, place = torch.nn.functional.pad(mask, (0, 1), value=1), place + 1
        past = {CACHE: cache_of(output)}
        output = model(input_ids=said[-1], attention_mask=mask, position_ids=place, **past)
    return torch.cat(said, 1).tolist()


@families
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_are_those_of_what_is_left(layout, family):
    model, inputs, count = shared(family), inputs_of(family, layout), FAMILIES[family].tokens
    side, target = round(count**0.5), count // 3
    keep = [int(unit) for unit in uniform_index((side, side), target)]
    places = {}
    if family == "paligemma":  # which numbers padding too, where it is not told the positions
        places["position_ids"] = inputs["attention_mask"].cumsum(-1).clamp(min=1)
    with torch.no_grad():
        short, rows = shorten(model, family, inputs, keep)
        want, said = model(**short).logits, greedy(model, short, 6)
        with pruned(model, "uniform", tokens=target, positions="original"):
            ours = model(**inputs, **places).logits
            spoken = generate(model, inputs)[:, inputs["input_ids"].shape[1] :]
            room = StaticCache(config=model.config.get_text_config(), max_cache_len=130)
            static = generate(model, inputs, **{CACHE: room})[:, inputs["input_ids"].shape[1] :]
    for b, live in enumerate(rows):
        torch.testing.assert_close(ours[b, live], want[b, -len(live) :], atol=1e-3, rtol=1e-3)
    assert spoken.tolist() == static.tolist() == said


@families
def test_none_is_bit_identical(family):
    model, inputs = shared(family), inputs_of(family, "ragged")
    with torch.no_grad():
        want, said = model(**inputs).logits, generate(model, inputs)
        with pruned(model, "none"):
            assert torch.equal(model(**inputs).logits, want)
            assert torch.equal(generate(model, inputs), said)
        assert torch.equal(model(**inputs).logits, want)


@families
def test_beams(family):
    model, inputs = shared(family), inputs_of(family, "single")
    with pruned(model, "uniform", ratio=0.3):
        want = generate(model, inputs, num_beams=3)
        assert torch.equal(generate(model, inputs, num_beams=3, use_cache=False), want)


def test_tokens_that_look_at_each_other_leave_before_the_first_layer_or_not_at_all():
    with pytest.raises(PolicyError, match=r"look at each other by a mask.*encode stage"):
        prune(shared("gemma3"), "fastv", k=2, ratio=0.3)
