"""Caches other than the default one: their size, several turns, a new prompt, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from tests.models import IMAGE, LAYOUTS, PACKED, prompt, shared
from tests.packed import VIDEO
from tests.policy_table import IN_DECODER, TABLE, options
from tests.reference import CASES, budget, expect
from tests.refusal import refuses
from tests.test_generate import generate
from tests.test_modes import exact_cache
from tests.test_turns import CONVERSATIONS, all_media, follow_up, new_media, said
from vlm_prune import UnsupportedCallError, pruned
from vlm_prune.versions import CACHE, cache_of

ROOM = 260
CLOSE = {"atol": 3e-4, "rtol": 1e-3}
cases = pytest.mark.parametrize(("policy", "family", "positions"), CASES)
CACHES = {
    "static": lambda model: StaticCache(config=model.config.get_text_config(), max_cache_len=ROOM),
    "static-made-early": lambda model: early(model),
    "quantized": lambda model: exact_cache(model)[CACHE],
}


def early(model):
    config, cache = model.config.get_text_config(), CACHES["static"](model)
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cache.early_initialization(2, heads, size, torch.float32, torch.device("cpu"))
    return cache


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@cases
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_conversation_in_it_gives_what_fresh_prompts_give(attention, kind, policy, family, positions):
    model, (first, *later) = shared(family, attention), CONVERSATIONS["ragged"]
    turns = [prompt(family, first)]
    ids, mask, cache = turns[0].ids, turns[0].mask, CACHES[kind](model)
    with pruned(model, policy, positions=positions, **budget(policy)):
        output = generate(model, turns[0].inputs, **{CACHE: cache})
        for number, rows in enumerate(later):
            turn, ids, mask = follow_up(output, mask, rows, family, seed=number + 5)
            turns.append(turn)
            inputs = said(family, ids, mask)
            want = generate(model, {**inputs, **all_media(turns)})
            output = generate(model, {**inputs, **new_media(model, turns), CACHE: cache})
            assert torch.equal(output, want)


@pytest.mark.parametrize("policy", IN_DECODER)
@pytest.mark.parametrize("kind", CACHES)
def test_a_conversation_in_it_gives_what_a_growing_cache_gives(kind, policy):
    model, (first, *later) = shared("llava"), CONVERSATIONS["ragged"]
    with pruned(model, **options(policy)):
        outputs = []
        for cache in (DynamicCache(), CACHES[kind](model)):
            turn = prompt("llava", first)
            mask, output = turn.mask, generate(model, turn.inputs, **{CACHE: cache})
            for number, rows in enumerate(later):
                turn, ids, mask = follow_up(output, mask, rows, "llava", seed=number + 5)
                inputs = {**turn.inputs, "input_ids": ids, "attention_mask": mask}
                output = generate(model, inputs, **{CACHE: cache})
            outputs.append(output)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("policy", sorted(TABLE))
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_a_static_cache_is_as_small_as_what_is_kept(policy, family):
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"])
    length = batch.ids.shape[1]
    with pruned(model, **options(policy)):
        grown = cache_of(model(**batch.inputs))
        plain = model.pruning.receipt
        cache = CACHES["static"](model)
        model(**batch.inputs, **{CACHE: cache})
        receipt = model.pruning.receipt
    for ours, theirs in zip(cache.layers, grown.layers, strict=True):
        assert ours.keys.shape[2] == ROOM - length + theirs.keys.shape[2]
        assert int(ours.get_seq_length()) == length
    assert receipt.decoder_tokens == plain.decoder_tokens
    assert receipt.kv_bytes == sum(t.nbytes for x in cache.layers for t in (x.keys, x.values))
    one = cache.layers[0].keys
    assert receipt.kv_bytes_dense == 2 * len(cache.layers) * one.nbytes // one.shape[2] * ROOM


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_a_static_cache_is_cut_where_only_the_decoder_drops(family):
    """MustDrop that merges nothing: layer 0 takes whole prompts in, and loses tokens after prefill."""
    model, batch = shared(family), prompt(family, [(3, -1, 5)])
    settings = {"layers": (0, 1), "merge_threshold": 1.0, "ratio": 0.5}
    with pruned(model, "mustdrop", **settings):
        want = generate(model, batch.inputs)
        assert len(set(model.pruning.receipt.decoder_tokens)) > 1
        cache = CACHES["static"](model)
        assert torch.equal(generate(model, batch.inputs, **{CACHE: cache}), want)
    assert len({layer.keys.shape[2] for layer in cache.layers}) == 1
    assert cache.layers[0].keys.shape[2] < ROOM


@cases
@pytest.mark.parametrize("kind", CACHES)
def test_it_can_be_reset(kind, policy, family, positions):
    """After a pruned prompt comes one that needs all the room there was."""
    model, batch = shared(family), prompt(family, LAYOUTS["several-images"])
    cache = CACHES[kind](model)
    long = prompt(family, [(ROOM - 8,), (ROOM - 9,)])
    with pruned(model, policy, positions=positions, **budget(policy)):
        want = generate(model, batch.inputs), generate(model, long.inputs)
        for _ in range(2):
            assert torch.equal(generate(model, batch.inputs, **{CACHE: cache}), want[0])
            cache.reset()
            assert torch.equal(generate(model, long.inputs, **{CACHE: cache}), want[1])
            cache.reset()


@cases
def test_a_loop_of_my_own_with_a_static_cache(policy, family, positions):
    """Padding masks and no others, right padding, as in the loop with a growing cache."""
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"], pad="right")
    _, short = expect(model, batch, policy, positions)
    with short.given(model):
        want = generate(model, short.inputs)
    last, mask, tokens = batch.mask.sum(-1) - 1, batch.mask, []
    with pruned(model, policy, positions=positions, **budget(policy)):
        cache = CACHES["static"](model)
        logits = model(**batch.inputs, **{CACHE: cache}).logits[torch.arange(len(last)), last]
        ends = short.positions[1:].amax((0, 2)) if family in PACKED else last
        for step in range(6):
            logits[:, [IMAGE, VIDEO]] = -torch.inf
            tokens.append(logits.argmax(-1))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            places = {"attention_mask": mask, "position_ids": (ends + 1 + step)[:, None]}
            logits = model(input_ids=tokens[-1][:, None], **places, **{CACHE: cache}).logits[:, -1]
    assert torch.stack(tokens, 1).tolist() == want.tolist()


def test_a_cache_of_other_layers_is_refused():
    model, batch = shared("llava"), prompt("llava", LAYOUTS["single"])
    cache = Cache(layers=[DynamicSlidingWindowLayer(sliding_window=8) for _ in range(3)])
    with pruned(model), refuses(model, UnsupportedCallError, "DynamicSlidingWindowLayer", "StaticCache"):
        model(**batch.inputs, **{CACHE: cache})


def test_a_mask_of_slots_that_hides_something_else_is_refused():
    model, batch = shared("llava"), prompt("llava", LAYOUTS["single"])
    length = batch.ids.shape[1]
    mask = torch.ones(1, 1, length, ROOM, dtype=torch.bool).tril()
    with pruned(model):
        want = model(**batch.inputs).logits
        cache = CACHES["static"](model)
        inputs = {**batch.inputs, "attention_mask": mask}
        torch.testing.assert_close(model(**inputs, **{CACHE: cache}).logits, want)
        mask[0, 0, 20, 3] = False
        with refuses(model, UnsupportedCallError, "4-D", "more than the future and padding", "2-D"):
            model(**inputs, **{CACHE: CACHES["static"](model)})


def test_an_offloaded_layer_moves_what_it_holds():
    model, batch = shared("llava"), prompt("llava", LAYOUTS["single"])
    with pruned(model):
        cache = DynamicCache()
        model(**batch.inputs, **{CACHE: cache})
        moved = []
        for layer in cache.layers:
            layer.inner.offload = lambda: moved.append("away")
            layer.inner.prefetch = lambda: moved.append("back")
        cache.offload(0)
        cache.layers[0].prefetch()
    assert moved == ["away", "back"]
