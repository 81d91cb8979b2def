"""Bad calls of a pruned model: one clear error before anything is computed, and the model is as it was."""

from __future__ import annotations

import re

import pytest
import torch

from tests.models import IMAGE, LAYOUTS, make, prompt
from tests.refusal import refuses
from vlm_prune import UnsupportedCallError, prune, pruned, unprune
from vlm_prune.versions import cache_of


def one_placeholder(batch, more):
    ids = batch.ids.clone()
    if more:
        ids[ids.ne(IMAGE).nonzero()[-1].unbind()] = IMAGE
    else:
        ids[ids.eq(IMAGE).nonzero()[0].unbind()] = 7
    return {**batch.inputs, "input_ids": ids}


BAD_CALLS = {
    "attentions": (
        lambda b: {**b.inputs, "output_attentions": True},
        ["output_attentions=True", "unprune(model)"],
    ),
    "one placeholder missing": (
        lambda b: one_placeholder(b, more=False),
        ["71 image placeholders", "2 images of 36 tokens", "72", "processor"],
    ),
    "one placeholder too many": (lambda b: one_placeholder(b, more=True), ["73 image placeholders", "72"]),
    "no placeholder": (
        lambda b: {**b.inputs, "input_ids": torch.full_like(b.ids, 5)},
        ["0 image placeholders", "72", "one <image> for every image"],
    ),
    "an image too many": (
        lambda b: {**b.inputs, "pixel_values": torch.cat([b.pixels, b.pixels[:1]])},
        ["72 image placeholders", "3 images of 36 tokens", "108"],
    ),
    "mask in four dimensions": (
        lambda b: {**b.inputs, "attention_mask": torch.ones(2, 1, b.ids.shape[1], b.ids.shape[1])},
        ["4-D", "2-D padding mask"],
    ),
    "masks by kind of layer": (
        lambda b: {**b.inputs, "attention_mask": {"full_attention": None}},
        ["dict", "2-D"],
    ),
    "other feature layer": (
        lambda b: {**b.inputs, "vision_feature_layer": -1},
        ["vision_feature_layer=-1", "-2", "prune it again"],
    ),
    "other selection": (
        lambda b: {**b.inputs, "vision_feature_select_strategy": "full"},
        ["vision_feature_select_strategy='full'", "default"],
    ),
}


@pytest.mark.parametrize("policy", ["flowcut", "random"])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_calls(case, policy):
    arguments, words = BAD_CALLS[case]
    model, batch = make("llava"), prompt("llava", [(3, -1, 4), (2, -1, 4)])
    stock = model(**batch.inputs).logits
    prune(model, policy)
    with refuses(model, UnsupportedCallError, *words):
        model(**arguments(batch))
    unprune(model)
    assert torch.equal(model(**batch.inputs).logits, stock)


def test_placeholders_of_tiles():
    model, batch = make("internvl"), prompt("internvl", LAYOUTS["several-images"])
    ids = batch.ids.index_fill(1, torch.tensor([batch.ids.shape[1] - 5]), 9)
    missing = int((ids == IMAGE).sum())
    with (
        pruned(model),
        refuses(model, UnsupportedCallError, f"{missing} image placeholders", "5 tiles of 16 tokens need 80"),
    ):
        model(**{**batch.inputs, "input_ids": ids})


GENERATE = {
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, ["output_attentions=True"]),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate(case):
    """``generate`` encodes images before it calls the model: by then the tower has run, the decoder has not."""
    options, words = GENERATE[case]
    model, batch = make("llava"), prompt("llava", LAYOUTS["single"])
    with pruned(model), refuses(model.model.language_model, UnsupportedCallError, *words):
        model.generate(**batch.inputs, max_new_tokens=3, **options)


@pytest.mark.parametrize("more", [True, False])
def test_generate_with_wrong_placeholders(more):
    model, batch = make("llava"), prompt("llava", LAYOUTS["single"])
    with (
        pruned(model),
        refuses(
            model.model.language_model.layers,
            UnsupportedCallError,
            "image placeholders",
            "1 image of 36 tokens",
        ),
    ):
        model.generate(**one_placeholder(batch, more), max_new_tokens=3)


def test_cropping_into_a_pruned_prompt():
    model, batch = make("llava"), prompt("llava", LAYOUTS["single"])
    with pruned(model, "uniform", ratio=0.3), torch.no_grad():
        cache = cache_of(model(**batch.inputs))
        length = cache.get_seq_length()
        cache.crop(-3)
        assert cache.get_seq_length() == length - 3
        with pytest.raises(
            UnsupportedCallError, match=re.escape(f"from {length - 3} to {length - 13} tokens")
        ):
            cache.crop(-10)
        assert cache.get_seq_length() == length - 3


def test_features_that_overflowed():
    """NaN from the tower itself must not be taken for dropped tokens."""
    model, batch = make("llava"), prompt("llava", LAYOUTS["ragged"])
    with pruned(model, "uniform", ratio=0.3), torch.no_grad():
        batch.pixels[1, 0, 5, 5] = torch.nan
        with pytest.raises(UnsupportedCallError, match=r"rows of NaN.*overflowed.*bfloat16"):
            model(**batch.inputs)
