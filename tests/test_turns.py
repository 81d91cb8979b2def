"""Conversations: a cache carried over turns gives what the whole prompt gives at once."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.models import IMAGE, PACKED, Prompt, prompt, shared
from tests.packed import PackedPrompt, skip_unless_it_counts_on
from tests.reference import budget
from tests.test_generate import cases, generate
from vlm_prune import pruned
from vlm_prune.versions import CACHE, CHUNKS_BRING_IMAGES, cache_of, takes_encoded


def follow_up(output, mask, rows, family, seed):
    """The prompt of the next turn: everything so far, and what the user adds to each row."""
    new = prompt(family, rows, seed=seed)
    answered = torch.ones(len(mask), output.shape[1] - mask.shape[1], dtype=mask.dtype)
    return new, torch.cat([output, new.ids], 1), torch.cat([mask, answered, new.mask], 1)


def said(family, ids, mask):
    """The text part of a call."""
    kinds = {"mm_token_type_ids": (ids == IMAGE).int()} if family in PACKED else {}
    return {"input_ids": ids, "attention_mask": mask, **kinds}


def all_media(turns: list[Prompt | PackedPrompt]):
    """Images of a conversation in the order of its placeholders."""
    first, rows = turns[0], range(len(turns[0].ids))
    if isinstance(first, PackedPrompt):
        return replace(first, visuals=[[v for turn in turns for v in turn.visuals[b]] for b in rows]).media
    tiles = [turn.pixels[turn.tiles[b]] for b in rows for turn in turns if turn.tiles[b]]
    return {"pixel_values": torch.cat(tiles)} if tiles else {}


def new_media(model, turns: list[Prompt | PackedPrompt]):
    """Images of the last turn. M-RoPE positions need the sizes of all images, so there the new ones come encoded."""
    turn = turns[-1]
    if not turn.media or not isinstance(turn, PackedPrompt):
        return turn.media
    if not takes_encoded(model):
        pytest.skip("this version of transformers takes no encoded images")
    if not CHUNKS_BRING_IMAGES:  # came together, after 5.19
        pytest.skip("stock code gives an image after a cache the positions of text")
    encoded = model.get_image_features(**turn.media, return_dict=True)
    sizes = all_media(turns)["image_grid_thw"]
    return {"mm_encoder_outputs": {"image": encoded}, "image_grid_thw": sizes}


CONVERSATIONS = {
    "text-follows": [[(3, -1, 5)], [(4,)], [(1,)]],
    "image-follows": [[(3, -1, 5)], [(2, -1, 3)], [(4,)]],
    "image-comes-late": [[(6,)], [(2, -1, 3)], [(3,)]],
    "ragged": [[(3, -1, 5), (2, -1, 1, -1, 4)], [(4,), (7,)], [(2, -1, 2), (1,)], [(3,), (3,)]],
}


@cases
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_cache_carried_over_turns_gives_what_a_fresh_prompt_gives(conversation, policy, family, positions):
    model, (first, *later) = shared(family), CONVERSATIONS[conversation]
    skip_unless_it_counts_on(model, family)
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 4}
    turns = [prompt(family, first)]
    ids, mask = turns[0].ids, turns[0].mask
    with pruned(model, policy, positions=positions, **budget(policy)):
        output = generate(model, turns[0].inputs, **options)
        for number, rows in enumerate(later):
            turn, ids, mask = follow_up(output.sequences, mask, rows, family, seed=number + 5)
            turns.append(turn)
            inputs = said(family, ids, mask)
            want = generate(model, {**inputs, **all_media(turns)}, **options)
            output = generate(
                model, {**inputs, **new_media(model, turns), CACHE: cache_of(output)}, **options
            )
            assert torch.equal(output.sequences, want.sequences)
            for a, b in zip(output.logits, want.logits, strict=True):
                torch.testing.assert_close(a, b, atol=3e-4, rtol=1e-3)
            assert cache_of(output).get_seq_length() == cache_of(want).get_seq_length()


@cases
def test_a_prefix_is_computed_once_and_continued_twice(policy, family, positions):
    """The cache of a prompt with an image is copied, and each copy goes its own way."""
    model, batch = shared(family), prompt(family, [(3, -1, 4)])
    skip_unless_it_counts_on(model, family)
    ends = [torch.tensor([[7, 8, 9]]), torch.tensor([[20, 21]])]
    with torch.no_grad(), pruned(model, policy, positions=positions, **budget(policy)):
        prefix = cache_of(model(**batch.inputs))
        for end in ends:
            ids = torch.cat([batch.ids, end], 1)
            inputs = said(family, ids, torch.ones_like(ids))
            want = model.generate(**inputs, **batch.media, max_new_tokens=4)
            ours = model.generate(**inputs, **{CACHE: copy.deepcopy(prefix)}, max_new_tokens=4)
            assert torch.equal(ours, want)
        assert prefix.get_seq_length() == batch.ids.shape[1]
        prefix.reset()
        again = model(**batch.inputs, **{CACHE: prefix})
        torch.testing.assert_close(again.logits, model(**batch.inputs).logits)
